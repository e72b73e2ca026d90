package lease

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// DefaultTTL is the time to live of a lease, flannel's.
const DefaultTTL = 24 * time.Hour

// ManagerConfig says who this node is and what it writes into its lease.
type ManagerConfig struct {
	Registry *Registry
	// NodeID identifies the node across restarts and changes of address. It is
	// printable, at most 64 bytes, and never empty.
	NodeID string
	// NodeName is for people; characters that are not printable ASCII are replaced.
	NodeName string
	// PublicIP is the underlay address peers send to, as long as SetPublicIP says
	// no other.
	PublicIP netip.Addr
	// TTL is how long the lease outlives the last renewal, at least 1 s; 0 means
	// DefaultTTL.
	// etcd counts whole seconds and raises very short ones (to 2 s by default).
	TTL time.Duration
	// Previous is the subnet the node held before, invalid if it is not known.
	Previous netip.Prefix
	// TakeOver claims the lease of another node id with our PublicIP. It is for
	// a node that lost its state.
	TakeOver bool
	// FailFast makes AwaitConfig return an error for a configuration that cannot
	// be used, instead of waiting for a better one as flannel does.
	FailFast bool
	// Attrs makes the attributes of the lease for a network configuration; nil
	// means PublicIP alone. PublicIP, NodeID and NodeName are filled in by the
	// manager, and so is BackendType if it is empty.
	Attrs func(NetworkConfig) Attrs
	// Log receives what is worth reading; nil means slog.Default.
	Log *slog.Logger
}

// Manager claims this node's lease, keeps it, and follows everybody else's. Use:
// AwaitConfig, Acquire, then Run for as long as the node lives, with State and
// Updates from any goroutine at any time.
type Manager struct {
	cfg     ManagerConfig
	reg     *Registry
	log     *slog.Logger
	timing  timing
	updates chan struct{}
	// kick wakes the keeper of the own lease: its key changed.
	kick chan struct{}

	mu    sync.Mutex
	state State // without Peers and Ignored, which built holds
	table *leaseTable
	built *State // nil after a change

	configured bool   // state.Config was read
	configRev  int64  // revision up to which the config key is known
	clusterID  uint64 // of the last list
	publicIP   netip.Addr
	ownValue   []byte // what we last wrote to our key
	nextValue  []byte // what we tried to write since, its fate unknown
	spare      int64  // etcd lease granted for the own key and not used yet
	adoptedAt  time.Time
	mergeUntil time.Time       // until when a list does not remove leases
	deleted    map[string]bool // keys deleted while an anti-entropy list is under way; nil otherwise
	ended      bool            // Run is not running any more
	watchError string
	ownError   string
}

// timing is every interval of the manager; tests shorten them.
type timing struct {
	progress    time.Duration // between progress requests
	stall       time.Duration // silence after which a watch is dead
	antiEntropy time.Duration // between comparisons with etcd
	retryMin    time.Duration // first and
	retryMax    time.Duration // longest pause between tries
	renewMax    time.Duration // longest time between renewals
	mergeHold   time.Duration // how long a rolled back etcd removes no lease
	hold        time.Duration // how long a deleted lease is still used
	massHold    time.Duration // the same when most of them are deleted
}

func defaultTiming() timing {
	return timing{
		// A silent connection is noticed within 5 s of its last sign of life, with
		// time left for a busy machine.
		progress:    2 * time.Second,
		stall:       4 * time.Second,
		antiEntropy: 5 * time.Minute,
		// The longest pause leaves time to list within 2 s of etcd's return.
		retryMin: 100 * time.Millisecond,
		retryMax: time.Second,
		// With a password each renewal costs etcd a password check, some 100 ms of
		// its CPU.
		renewMax:  10 * time.Minute,
		mergeHold: time.Minute,
		// A node that lives claims its subnet again within milliseconds, and within
		// this if it has to find another way to etcd first.
		hold:     10 * time.Second,
		massHold: time.Minute,
	}
}

// NewManager returns a manager that has not talked to etcd yet.
func NewManager(cfg ManagerConfig) *Manager {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.TTL == 0 {
		cfg.TTL = DefaultTTL
	}
	cfg.NodeName = printableName(cfg.NodeName)
	return &Manager{
		cfg:     cfg,
		reg:     cfg.Registry,
		log:     cfg.Log,
		timing:  defaultTiming(),
		updates: make(chan struct{}, 1),
		kick:    make(chan struct{}, 1),
		table:   newLeaseTable(),

		publicIP: cfg.PublicIP,
	}
}

// Updates signals that State changed. Signals coalesce: one may stand for many
// changes, and the manager never waits for its consumer.
func (m *Manager) Updates() <-chan struct{} { return m.updates }

// State returns everything known now.
func (m *Manager) State() State {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.built == nil {
		s := m.state
		s.Peers, s.Ignored = m.table.peers(m.policy())
		if s.LastError = m.watchError; s.LastError == "" {
			s.LastError = m.ownError
		}
		m.built = &s
	}
	s := *m.built
	s.Revision, s.Counters = m.table.rev, m.state.Counters
	return s
}

// Problem is what the manager is waiting for, in one line, or empty.
func (m *Manager) Problem() string { return m.State().LastError }

func (m *Manager) policy() policy {
	return policy{
		network:  m.state.Config.Network,
		own:      m.state.Own.Subnet,
		publicIP: m.publicIP,
		nodeID:   m.cfg.NodeID,
	}
}

// change runs f under the lock and tells the consumer.
func (m *Manager) change(f func()) {
	m.mu.Lock()
	f()
	m.built = nil
	m.mu.Unlock()
	m.notify()
}

func (m *Manager) notify() {
	select {
	case m.updates <- struct{}{}:
	default:
	}
}

// count runs f under the lock without telling anybody.
func (m *Manager) count(f func(*Counters)) {
	m.mu.Lock()
	f(&m.state.Counters)
	m.mu.Unlock()
}

// trouble records what keeps us from etcd, and logs it if it is new.
func (m *Manager) trouble(place *string, event string, err error) {
	problem := ""
	if err != nil {
		problem = strings.TrimPrefix(err.Error(), "lease: ")
	}
	m.mu.Lock()
	old := *place
	m.mu.Unlock()
	if old == problem {
		return
	}
	m.change(func() { *place = problem })
	if problem != "" {
		m.log.Warn(event, "problem", problem)
	}
}

// AwaitConfig reads the network configuration. While etcd is unreachable, or the
// key is missing or cannot be used, it tries again for as long as ctx lasts; each
// distinct problem is logged once and shown by Problem. It fails at once with
// ErrAccess if etcd refuses us or we refuse etcd, and with FailFast also on a
// configuration that cannot be used.
func (m *Manager) AwaitConfig(ctx context.Context) (NetworkConfig, error) {
	retry := m.newBackoff()
	for {
		cfg, err := m.reg.ReadNetworkConfig(ctx)
		if err == nil {
			err = checkNetwork(cfg, m.address())
		}
		if err == nil {
			m.trouble(&m.watchError, "", nil)
			m.change(func() { m.state.Config, m.configured = cfg, true })
			return cfg, nil
		}
		var etcd *EtcdError
		unusable := !errors.As(err, &etcd) && (!errors.Is(err, ErrNoConfig) || errors.Is(err, ErrV2Keys))
		switch {
		case ctx.Err() != nil:
			return NetworkConfig{}, ctx.Err()
		case errors.Is(err, ErrAccess), errors.Is(err, errClosed), unusable && m.cfg.FailFast:
			return NetworkConfig{}, err
		}
		m.trouble(&m.watchError, "waiting for network config", err)
		if err := retry.wait(ctx); err != nil {
			return NetworkConfig{}, err
		}
	}
}

// checkNetwork refuses a network that covers our own underlay address: no other
// node would take our lease for real.
func checkNetwork(cfg NetworkConfig, publicIP netip.Addr) error {
	if cfg.Network.Contains(publicIP) {
		return fmt.Errorf("lease: network config: Network %s contains this node's public IP %s: overlay and underlay must be apart; "+
			"choose another Network, or another address with --iface or --public-ip", cfg.Network, publicIP)
	}
	return nil
}

// Run keeps the own lease and follows the others until ctx ends. Trouble with
// etcd never ends it: State tells about it, and everything known stays in use.
// Acquire must have succeeded before.
func (m *Manager) Run(ctx context.Context) error {
	if m.State().OwnStatus == "" {
		return errors.New("lease: run: no lease was acquired")
	}
	m.mu.Lock()
	m.ended = false
	m.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() { m.keep(ctx) })
	wg.Go(func() { m.follow(ctx) })
	wg.Wait()
	m.mu.Lock()
	m.ended = true
	m.mu.Unlock()
	return nil
}

// pause is the time between tries: it grows from try to try, with jitter.
type pause struct {
	min, max, next time.Duration
}

func (m *Manager) newBackoff() *pause {
	return &pause{min: m.timing.retryMin, max: m.timing.retryMax}
}

// take returns the next pause: from half of it to all of it, at random.
func (p *pause) take() time.Duration {
	p.next = min(max(2*p.next, p.min), p.max)
	return p.next/2 + rand.N(p.next/2+1)
}

func (p *pause) reset() { p.next = 0 }

// wait sleeps for the next pause; the error is that of ctx.
func (p *pause) wait(ctx context.Context) error {
	timer := time.NewTimer(p.take())
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// printableName replaces what decodeAttrs of the other nodes would refuse.
func printableName(name string) string {
	clean := strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, name)
	return clean[:min(len(clean), maxNodeNameLen)]
}
