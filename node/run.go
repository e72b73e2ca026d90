package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	wgtun "golang.zx2c4.com/wireguard/tun"

	"tweed/engine"
	"tweed/lease"
	"tweed/netns"
	"tweed/tun"
)

const (
	// cacheDelay is how long a start waits for etcd before it forwards from the
	// last good snapshot.
	cacheDelay = 300 * time.Millisecond
	// joinRetry is the mean time between attempts to join while forwarding from
	// a snapshot.
	joinRetry = 3 * time.Second
	// netSettle is how long changes of links and routes are collected before
	// they are looked at.
	netSettle = 100 * time.Millisecond
	// pathInterval is the shortest time between two looks at the ways to all
	// peers, a system call each.
	pathInterval = time.Second
	// reconcileInterval is how often everything is compared with what it shall
	// be, without any hint that it changed.
	reconcileInterval = 10 * time.Second
	// netlinkTimeout is how long the kernel's answer to one question is waited for.
	netlinkTimeout = 5 * time.Second
	// repairRetry is the time between attempts to make the data plane again.
	repairRetry = 500 * time.Millisecond
	// reconcileShare is the inverse of the part of the time spent on comparing
	// when links and routes never stop changing.
	reconcileShare = 10
	// startReport is after how much of a start that takes long it is said what the
	// node works with.
	startReport = 500 * time.Millisecond
	// releaseTimeout bounds giving the lease back on the way out.
	releaseTimeout = 5 * time.Second
)

// runner is the life of a node: everything the goroutine of Run owns. No field
// is touched by another goroutine.
type runner struct {
	*Node
	// etcd is the context of everything that talks to etcd, etcdTasks the
	// goroutines that do, and endEtcd ends them.
	etcd      context.Context
	etcdTasks sync.WaitGroup
	endEtcd   func()
	servers   sync.WaitGroup
	undos     []func()
	made      dirMaker
	keep      bool // the state on disk stays
	newID     bool // node.json was made by this start
	locked    map[string]*nsLock

	home  *netns.Namespace // of the thread that called Run
	nl    *netlink.Handle
	u     underlay
	host  *hostNet
	paths enginePaths
	id    identity

	reg   *lease.Registry
	mgr   *lease.Manager
	saver *saver
	rules *rulesKeeper
	watch *netWatch

	cached *cachedState // what the last run left, nil if nothing

	name    string  // of the TUN device
	overlay overlay // in force
	next    overlay // planned for the config etcd gave, in force after join
	dev     *tun.Device
	events  <-chan wgtun.Event
	link    *overlayLink
	path    *pathCache
	eng     *engine.Engine
	acc     accelerator
	att     *attachments
	started bool // the engine's workers run
	shrunk  bool // what only the start needed was given back

	begin     startup
	phase     Phase
	claiming  bool // a claim is under way, its fate unknown
	joined    bool // a lease is held and followed
	own       lease.Lease
	peers     []lease.Lease
	source    string // where peers are from
	revision  int64
	applied   *engine.Snapshot
	table     *tableView
	file      lease.SubnetFile // as last written
	recreated int
	linkUp    bool
	pathsAt   time.Time     // of the last look at the ways to all peers
	rebuiltAt time.Time     // of the last attempt to make the data plane again
	reconTook time.Duration // the last reconcile
	told      bool          // the underlay was logged
	// gso paces what netChanged, that links or routes changed since the last look,
	// gives a reason to try: segmentation that was given up.
	gso        retryPacer
	netChanged bool
	rulesSet   ruleSet
	// blackholed is the subnet with a blackhole route, invalid if none.
	blackholed netip.Prefix

	// Problems of the node's own parts, empty when there is none.
	joinProblem, dataProblem, linkProblem, fileProblem, holeProblem, underlayProblem string
}

// undo registers what to do when Run returns, in reverse order.
func (r *runner) undo(f func()) { r.undos = append(r.undos, f) }

// cleanup takes back everything the start and the run did, and, after a start
// that failed, what it wrote.
func (r *runner) cleanup() {
	for i := len(r.undos) - 1; i >= 0; i-- {
		r.undos[i]()
	}
	r.undos = nil
	if r.keep {
		r.made.undoExcept(r.paths.stateDir)
		return
	}
	if r.newID {
		_ = os.Remove(filepath.Join(r.paths.stateDir, identityFile))
	}
	r.made.undoExcept("")
}

func (r *runner) run(ctx context.Context) error {
	var cancel context.CancelFunc
	r.etcd, cancel = context.WithCancel(context.Background())
	r.endEtcd = func() { cancel(); r.etcdTasks.Wait() }
	r.undo(r.servers.Wait)
	r.setPhase(PhaseStarting)
	if err := r.prepare(); err != nil {
		return err
	}
	return r.loop(ctx)
}

// setPhase records the phase and tells systemd.
func (r *runner) setPhase(p Phase) {
	if r.phase == p {
		return
	}
	r.phase = p
	sdNotify("STATUS=" + string(p))
}

// prepare does everything that can fail locally, before etcd is asked.
func (r *runner) prepare() error {
	var err error
	if r.home, err = netns.Current(); err != nil {
		return err
	}
	r.undo(func() { r.home.Close() })
	if r.nl, err = netlink.NewHandle(); err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	r.undo(r.nl.Close)
	// An answer that never comes must not stop everything else here for good.
	if err := r.nl.SetSocketTimeout(netlinkTimeout); err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	if r.host, err = readHostNet(r.nl); err != nil {
		return err
	}
	r.u, err = chooseUnderlay(r.choice, r.host, func(e error) { r.log.Warn("underlay option does not match", "err", e) })
	if err != nil {
		return err
	}
	if err := r.lockTUNName(); err != nil {
		return err
	}
	etcd := etcdConfig(&r.cfg)
	etcd.Log = r.log
	if r.reg, err = lease.Open(etcd); err != nil {
		return err
	}
	r.undo(func() { r.reg.Close() })
	r.undo(r.endEtcd)
	r.undo(r.closeData)
	if err := r.openDevice(); err != nil {
		return err
	}
	if err := r.serve(); err != nil {
		return err
	}
	if r.watch, err = watchNet(r.log); err != nil {
		return fmt.Errorf("watch links and routes: %w", err)
	}
	r.undo(func() { r.watch.close() })
	r.rules = startRules(r.home, r.cfg.IPTablesResync, r.log)
	r.undo(r.rules.close)
	r.mgr = lease.NewManager(lease.ManagerConfig{
		Registry: r.reg,
		NodeID:   r.id.NodeID, NodeName: r.hostname,
		PublicIP: r.u.publicIP,
		TTL:      r.cfg.LeaseTTL,
		Previous: r.previousSubnet(),
		TakeOver: r.cfg.TakeOver,
		FailFast: true,
		Attrs:    r.attrs,
		Log:      r.log,
	})
	return nil
}

// lockTUNName settles the device name and takes its lock.
func (r *runner) lockTUNName() error {
	if r.cfg.AttachOnly {
		r.name = attachOnlyName(r.cfg.TUNName)
		return nil
	}
	for _, name := range candidateNames(r.cfg.TUNName) {
		_, err := r.nl.LinkByName(name)
		taken := err == nil
		if taken && name != r.cfg.TUNName {
			continue
		}
		err = r.lock("tun/"+name, "TUN device "+name)
		if err == nil {
			r.name = name
			return nil
		}
		if name == r.cfg.TUNName {
			return err
		}
	}
	return fmt.Errorf("--tun-name %s: no free number from 0 to %d", r.cfg.TUNName, maxTUNNumber)
}

const maxTUNNumber = 255

// candidateNames are the names a TUN name stands for, in the order to try.
func candidateNames(name string) []string {
	base, pattern := cutPattern(name)
	if !pattern {
		return []string{name}
	}
	names := make([]string, 0, maxTUNNumber+1)
	for i := range maxTUNNumber + 1 {
		if n := fmt.Sprintf("%s%d", base, i); len(n) <= maxIfaceName {
			names = append(names, n)
		}
	}
	return names
}

// lock takes a namespace lock once.
func (r *runner) lock(name, what string) error {
	if r.locked[name] != nil {
		return nil
	}
	l, err := lockNamespace(name, what)
	if err != nil {
		return err
	}
	if r.locked == nil {
		r.locked = map[string]*nsLock{}
	}
	r.locked[name] = l
	r.undo(l.release)
	return nil
}

// unlock gives a namespace lock back before the end.
func (r *runner) unlock(name string) {
	r.locked[name].release()
	delete(r.locked, name)
}

// serve opens the listening sockets and the state directory and starts to answer.
func (r *runner) serve() error {
	if r.cfg.HealthzPort != 0 {
		l, err := listenTCP("--healthz-port", r.healthAddr())
		if err != nil {
			return err
		}
		r.serveHTTP(newHTTPServer(r.healthHandler()), l)
	}
	if r.cfg.MetricsAddr != "" {
		l, err := listenTCP("--metrics-addr", r.cfg.MetricsAddr)
		if err != nil {
			return err
		}
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", r.metricsHandler())
		r.serveHTTP(newHTTPServer(mux), l)
	}
	r.paths = defaultDirs(os.Geteuid(), os.Getenv).engine(r.cfg.StateDir, r.cfg.Socket, r.name)
	if err := r.made.mkdirAll(r.paths.stateDir, socketDirMode); err != nil {
		return fmt.Errorf("state directory: %w (choose another with --state-dir)", err)
	}
	l, err := lockDir(r.paths.stateDir, r.paths.socket)
	if err != nil {
		return err
	}
	r.undo(l.release)
	// Under the lock, because the engine before us removes it under the lock.
	if err := r.made.mkdirAll(filepath.Dir(r.paths.socket), socketDirMode); err != nil {
		return fmt.Errorf("socket directory: %w (choose another place with --socket)", err)
	}
	r.undo(r.paths.removeRunDirs)
	if err := r.loadState(); err != nil {
		return err
	}
	api, err := listenAPI(r.paths.socket)
	if err != nil {
		return err
	}
	r.publish()
	r.serveHTTP(r.apiServer(), api)
	r.undo(r.captures.end)
	r.replays.home.Store(r.home)
	r.undo(r.replays.end)
	stopRecorder, err := r.startRecorder()
	if err != nil {
		return err
	}
	r.undo(stopRecorder)
	r.saver = newSaver(r.paths.stateDir, r.log)
	r.undo(r.saver.close)
	r.att = newAttachments(r.paths.stateDir, r.log)
	r.attached.Store(r.att)
	r.undo(r.att.close)
	return nil
}

// serveHTTP serves l until Run returns.
func (r *runner) serveHTTP(s *http.Server, l net.Listener) {
	r.servers.Go(func() { _ = s.Serve(l) }) // ends with ErrServerClosed
	r.undo(func() { _ = s.Close() })
}

// loadState reads what an earlier run left, or makes a new identity.
func (r *runner) loadState() error {
	dir := r.paths.stateDir
	cached, warn := readSnapshot(dir, r.cfg.EtcdPrefix)
	if warn != nil {
		r.log.Warn("snapshot file", "err", warn)
	}
	r.cached = cached
	id, err := readIdentity(dir)
	switch {
	case err == nil:
		r.id = id
		return nil
	case !errors.Is(err, os.ErrNotExist):
		r.log.Warn("node identity is unreadable and made anew", "err", err)
	}
	if r.id, err = newIdentity(); err != nil {
		return err
	}
	if cached != nil {
		// The snapshot knows who we were.
		old := identity{Version: stateVersion, NodeID: cached.nodeID, MACText: cached.mac.String()}
		if old.check() == nil {
			r.id = old
		}
	}
	r.newID = true
	if err := writeIdentity(dir, r.id); err != nil {
		return fmt.Errorf("state directory: %w (choose another with --state-dir)", err)
	}
	return nil
}

// loop is the node's only owner of device, engine and routes.
func (r *runner) loop(ctx context.Context) error {
	r.begin = startup{configs: make(chan configResult, 1), leases: make(chan leaseResult, 1)}
	if r.cached != nil {
		r.begin.useCache = time.After(cacheDelay)
	}
	var settle, repair <-chan time.Time
	long := time.After(startReport)
	reconcile := time.NewTicker(reconcileInterval)
	defer reconcile.Stop()
	r.setPhase(PhaseWaiting)
	r.publish()
	r.awaitConfig()
	for {
		var failed <-chan error
		if r.eng != nil {
			failed = r.eng.Failed()
		}
		var err error
		select {
		case <-ctx.Done():
			return r.stop()
		case c := <-r.begin.configs:
			err = r.configured(c)
		case l := <-r.begin.leases:
			err = r.leased(l)
		case <-r.begin.useCache:
			r.begin.useCache = nil
			err = r.startCached()
		case <-r.begin.rejoin:
			r.awaitConfig()
		case <-r.mgr.Updates():
			r.follow()
		case <-r.watch.changed:
			r.holdAccelerator()
			if settle == nil {
				settle = time.After(r.settleDelay())
			}
		case <-settle:
			settle, r.netChanged = nil, true
			if r.reconcile() {
				settle = time.After(pathInterval)
			}
		case <-reconcile.C:
			r.reconcile()
			r.shrink()
		case e := <-failed:
			r.note(&r.dataProblem, "packet workers stopped; making device and engine again", e)
		case _, open := <-r.events:
			if !open {
				r.events = nil
			} else if settle == nil {
				settle = time.After(r.settleDelay())
			}
		case <-repair:
			repair = nil
			r.rebuild()
		case <-long:
			r.logUnderlay()
		}
		if err != nil {
			return err
		}
		if r.dataProblem != "" && repair == nil {
			repair = time.After(r.repairDelay())
		}
		r.publish()
	}
}
