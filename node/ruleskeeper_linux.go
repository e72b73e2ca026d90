package node

import (
	"errors"
	"log/slog"
	"sync"
	"time"

	"tweed/netns"
)

// rulesKeeper keeps the traffic rules in force, in a goroutine of its own
// because iptables may wait seconds for its lock.
type rulesKeeper struct {
	log    *slog.Logger
	resync time.Duration

	want chan rulesRequest
	done chan struct{}

	mu     sync.Mutex
	status RulesStatus
}

type rulesRequest struct {
	set  ruleSet
	done chan error
}

func startRules(home *netns.Namespace, resync time.Duration, log *slog.Logger) *rulesKeeper {
	k := &rulesKeeper{
		log: log, resync: resync,
		want: make(chan rulesRequest), done: make(chan struct{}),
		status: RulesStatus{Mode: "none"},
	}
	goIn(home, k.run)
	return k
}

// set puts s in force and returns the error of the attempt; a missing one is
// repeated with every resync.
func (k *rulesKeeper) set(s ruleSet) error {
	r := rulesRequest{set: s, done: make(chan error, 1)}
	k.want <- r
	return <-r.done
}

// close stops keeping; the rules stay, as flannel's do.
func (k *rulesKeeper) close() {
	close(k.want)
	<-k.done
}

func (k *rulesKeeper) current() RulesStatus {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.status
}

func (k *rulesKeeper) run(nsErr error) {
	defer close(k.done)
	var set ruleSet
	tick := time.NewTicker(k.resync)
	defer tick.Stop()
	for {
		select {
		case r, ok := <-k.want:
			if !ok {
				return
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
