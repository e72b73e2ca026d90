package node

import (
	"errors"
	"log/slog"
	"sync"
	"time"

	"tweed/netns"
)

const (
	// firstRules is how long a start waits for the traffic rules: who waits for
	// its readiness expects them. Later nobody waits.
	firstRules = 2 * time.Second
	// closeRules is how long the end waits for a program that waits for a lock.
	closeRules = time.Second
)

// rulesKeeper keeps the traffic rules in force, in a goroutine of its own
// because iptables may wait seconds for its lock, or for ever.
type rulesKeeper struct {
	log    *slog.Logger
	resync time.Duration

	wake chan struct{} // a set is wanted
	stop chan struct{}
	done chan struct{}

	mu     sync.Mutex
	want   *rulesRequest // the newest, nil once it is taken
	status RulesStatus
}

// rulesRequest is a set of rules and where the error of the attempt goes.
type rulesRequest struct {
	set  ruleSet
	done chan error
}

func startRules(home *netns.Namespace, resync time.Duration, log *slog.Logger) *rulesKeeper {
	k := &rulesKeeper{
		log: log, resync: resync,
		wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{}),
		status: RulesStatus{Mode: "none"},
	}
	goIn(home, k.run)
	return k
}

// set says what shall be in force and does not wait for it. The channel delivers
// the error of the attempt, which is also in the status; what failed is tried
// again with every resync. A set that a newer one overtakes is never tried.
func (k *rulesKeeper) set(s ruleSet) <-chan error {
	r := &rulesRequest{set: s, done: make(chan error, 1)}
	k.mu.Lock()
	k.want = r
	k.mu.Unlock()
	select {
	case k.wake <- struct{}{}:
	default:
	}
	return r.done
}

// close stops keeping; the rules stay, as flannel's do.
func (k *rulesKeeper) close() {
	close(k.stop)
	select {
	case <-k.done:
	case <-time.After(closeRules):
		k.log.Warn("a program that sets traffic rules still waits for a lock and is left alone")
	}
}

func (k *rulesKeeper) current() RulesStatus {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.status
}

// taken returns what is wanted, nil if there is nothing new.
func (k *rulesKeeper) taken() *rulesRequest {
	k.mu.Lock()
	defer k.mu.Unlock()
	r := k.want
	k.want = nil
	return r
}

func (k *rulesKeeper) run(nsErr error) {
	defer close(k.done)
	var set ruleSet
	tick := time.NewTicker(k.resync)
	defer tick.Stop()
	for {
		select {
		case <-k.stop:
			return
		case <-k.wake:
			r := k.taken()
			if r == nil {
				continue
			}
			set = r.set
			err := nsErr
			if err == nil {
				err = k.apply(set)
			}
			k.record(set, err)
			r.done <- err
		case <-tick.C:
			if nsErr == nil && set.mode() != "none" {
				k.record(set, k.restore(set))
			}
		}
	}
}

func (k *rulesKeeper) apply(s ruleSet) error {
	if s.mode() == "none" {
		return nil
	}
	t, err := newRuleTool(s.nft)
	if err != nil {
		return err
	}
	return t.apply(s)
}

// restore puts missing rules back.
func (k *rulesKeeper) restore(s ruleSet) error {
	t, err := newRuleTool(s.nft)
	if err != nil {
		return err
	}
	gone, err := t.missing(s)
	if err != nil || !gone {
		return err
	}
	if err := t.apply(s); err != nil {
		return err
	}
	k.mu.Lock()
	k.status.Restored++
	first := k.status.Problem == ""
	k.mu.Unlock()
	if first {
		k.log.Warn("traffic rules were missing and are restored", "mode", s.mode())
	}
	return nil
}

func (k *rulesKeeper) record(s ruleSet, err error) {
	k.mu.Lock()
	before := k.status.Problem
	k.status.Mode, k.status.Masq, k.status.Forward = s.mode(), s.masq, s.forward
	k.status.Problem = ""
	if err != nil {
		k.status.Problem = err.Error()
	}
	after := k.status.Problem
	k.mu.Unlock()
	if after != before && after != "" {
		k.log.Warn("traffic rules not in force", "mode", s.mode(), "err", after)
	}
}

// checkRules finds out, before anything is claimed, whether the rules can be
// made. Masquerading was asked for, so its absence is an error; the forward
// rules are a convenience, so theirs is reported as a problem later.
func checkRules(s ruleSet) error {
	if !s.masq {
		return nil
	}
	if _, err := newRuleTool(s.nft); err != nil {
		return errors.New("--ip-masq: " + err.Error() + "; install it or leave --ip-masq out")
	}
	return nil
}
