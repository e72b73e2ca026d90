package node

import (
	"errors"
	"net/netip"
	"time"
)

// reconcile compares everything on the host with what it shall be and repairs
// it, whoever changed it. It reports whether it has to be called again soon.
func (r *runner) reconcile() (again bool) {
	start := time.Now()
	defer func() { r.reconTook = time.Since(start) }()
	if r.watch.broken.Load() {
		r.renewWatch()
	}
	r.lookAtUnderlay()
	if r.dataProblem != "" || r.eng == nil {
		return false
	}
	if r.link == nil {
		// Attached containers only.
	} else if _, err := r.link.get(); errors.Is(err, errLinkGone) {
		r.note(&r.dataProblem, "TUN device was deleted; making it again", err)
		return false
	}
	if !r.started {
		return false
	}
	again = !r.refreshPaths()
	if r.gso.due(time.Now(), r.netChanged) && !r.eng.RetrySegmentation() {
		r.gso = retryPacer{} // nothing was given up
	}
	r.netChanged = false
	r.note(&r.linkProblem, "device not configured, trying again", r.forward())
	// Without news of routes, the kernel goes on to find the ways.
	r.checkAccelerator(!again && !r.watch.broken.Load())
	if r.cfg.BlackholeRoute {
		r.setBlackhole()
	}
	if r.fileProblem != "" {
		r.announce()
	}
	return again
}

// shrink gives back, once, what only the start needed. The first periodic look is
// late enough: by then everything has been set up and has run.
func (r *runner) shrink() {
	if r.shrunk || !r.started {
		return
	}
	r.shrunk = true
	if err := giveBackMemory(); err != nil {
		r.log.Debug("give memory back", "err", err)
	}
}

// refreshPaths looks again at the ways to all peers, unless it did so a moment
// ago.
func (r *runner) refreshPaths() bool {
	if time.Since(r.pathsAt) < pathInterval {
		return false
	}
	r.pathsAt = time.Now()
	inUse := make(map[netip.Addr]bool, len(r.peers))
	for _, p := range r.peers {
		inUse[p.PublicIP] = true
	}
	if r.path.refresh(inUse) {
		r.log.Info("path MTU to peers changed")
	}
	return true
}

// retryPacer says when to try again what the kernel refused. Such a try costs
// little, but it shall not be made all the time.
type retryPacer struct {
	next  time.Time
	pause time.Duration
}

const (
	// gsoRetryMin and gsoRetryMax are the times between two tries of segmentation
	// that nothing gives a reason for; gsoRetryChange is the one after a change
	// of links or routes.
	gsoRetryMin    = time.Minute
	gsoRetryMax    = time.Hour
	gsoRetryChange = 10 * time.Second
)

// due reports whether it is time, and if so reckons from now on. changed says that
// there is a reason for it to succeed.
func (p *retryPacer) due(now time.Time, changed bool) bool {
	early := changed && !now.Before(p.next.Add(gsoRetryChange-p.pause))
	if now.Before(p.next) && !early {
		return false
	}
	p.pause = min(max(2*p.pause, gsoRetryMin), gsoRetryMax)
	p.next = now.Add(p.pause)
	return true
}

func (r *runner) renewWatch() {
	w, err := watchNet(r.log)
	if err != nil {
		return // the periodic look goes on; the next one tries again
	}
	r.watch.close()
	r.watch = w
}

// settleDelay is how long changes are collected. It grows with what a look
// costs, so that a host with a million routes that flap is not kept busy.
func (r *runner) settleDelay() time.Duration { return max(netSettle, reconcileShare*r.reconTook) }

// repairDelay makes the first attempt to repair the data plane an immediate one
// and paces those that follow.
func (r *runner) repairDelay() time.Duration {
	if time.Since(r.rebuiltAt) > 2*repairRetry {
		return 0
	}
	return repairRetry
}
