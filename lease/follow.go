package lease

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// Why a watch ended, when it was not etcd's error.
var (
	errStalled = errors.New("the connection to etcd went silent")
	errRewound = errors.New("etcd is older than before, or another cluster")
	errDiffers = errors.New("the leases differ from what the watch delivered")
	errReset   = errors.New("the connection to etcd is made anew")
	errSettled = errors.New("the time to re-claim leases after a roll back is over")
)

// follow keeps the table equal to etcd until ctx ends: list, watch, resume where
// the watch ended, list again when that is not possible.
func (m *Manager) follow(ctx context.Context) {
	retry := m.newBackoff()
	listed := false
	for ctx.Err() == nil {
		started := time.Now()
		var err error
		if !listed {
			err = m.relist(ctx)
		}
		if err == nil {
			listed = true
			err = m.watch(ctx)
		}
		if ctx.Err() != nil {
			return
		}
		switch {
		case errors.Is(err, errDiffers), errors.Is(err, errSettled), errors.Is(err, errCompacted), errors.Is(err, errRewound):
			// etcd is there, only the place where the watch stood is not.
			m.log.Info("reading all leases again", "reason", err)
			listed = false
		case errors.Is(err, errReset):
			// It is no news unless the next try fails.
		default:
			m.disconnected(err)
		}
		if errors.Is(err, errCompacted) {
			m.count(func(c *Counters) { c.Compactions++ })
		}
		// A try that waited long was paused enough.
		if time.Since(started) > m.timing.retryMax {
			retry.reset()
		}
		if retry.wait(ctx) != nil {
			return
		}
	}
}

func (m *Manager) connected() {
	m.mu.Lock()
	was := m.state.Connected
	m.mu.Unlock()
	if was {
		return
	}
	m.trouble(&m.watchError, "", nil)
	m.change(func() { m.state.Connected = true })
	m.log.Info("connected to etcd", "revision", m.State().Revision)
}

func (m *Manager) disconnected(err error) {
	m.mu.Lock()
	was := m.state.Connected
	m.mu.Unlock()
	if was {
		m.change(func() { m.state.Connected = false })
	}
	m.trouble(&m.watchError, "not connected to etcd", err)
}

// relist reads everything at one revision and applies it in one step.
func (m *Manager) relist(ctx context.Context) error {
	snap, err := m.reg.list(ctx)
	if err != nil {
		return err
	}
	m.applyList(snap)
	return nil
}

func (m *Manager) applyList(snap listing) {
	m.mu.Lock()
	rolledBack := m.state.Synced && (snap.clusterID != m.clusterID || snap.rev < m.table.rev)
	if rolledBack {
		// A restored or new etcd does not know the leases of nodes that are alive.
		// They are about to claim them again; until then nothing is removed.
		m.state.Counters.Rollbacks++
		m.mergeUntil = time.Now().Add(m.timing.mergeHold)
		m.configRev = 0
	}
	before := m.table.rev
	findings, changed := m.table.replace(snap.leases, snap.rev, time.Now().Before(m.mergeUntil))
	m.clusterID = snap.clusterID
	m.state.Counters.Relists++
	mass := m.holdDeleted()
	for _, f := range findings {
		m.countFinding(f)
	}
	if !m.state.Synced {
		m.state.Synced, changed = true, true
	}
	var own *keyValue
	for i, kv := range snap.leases {
		if kv.name == subnetKey(m.state.Own.Subnet) {
			own = &snap.leases[i]
		}
	}
	m.ownEvent(own)
	note := m.applyConfig(snap.config, max(snap.rev, m.configRev))
	changed = changed || note != ""
	if changed {
		m.built = nil
	}
	m.mu.Unlock()

	if rolledBack {
		m.log.Warn("etcd was restored or replaced; leases that it does not know are kept for now",
			"revision", snap.rev, "before", before, "hold", m.timing.mergeHold)
	}
	m.report(findings, note)
	m.reportMass(mass)
	if changed {
		m.notify()
	}
}

// session is one watch, from its creation to its end.
type session struct {
	m      *Manager
	stream *watchStream
	// created counts the watches that etcd confirmed: leases, then config.
	created            int
	leasesID, configID int64
	// One anti-entropy list at a time: auditing until its result is compared;
	// pending is the list that waits for the watch to reach its revision, and
	// doubts how often it differed from the table after that.
	auditing bool
	audits   chan audit
	pending  *listing
	doubts   int
	wg       sync.WaitGroup
}

// audit is the result of an anti-entropy list.
type audit struct {
	snap listing
	err  error
}

// watch follows etcd from where the table stands until the watch ends, and says
// why it did.
func (m *Manager) watch(ctx context.Context) (err error) {
	m.mu.Lock()
	// From the last revision that is applied, not the one after it: etcd answers
	// no progress request while a watch of the stream starts in the future (server
	// storage/mvcc/watchable_store.go, progressIfSync), and a quiet etcd may stay
	// at this revision for hours. What comes twice is dropped.
	leasesFrom, configFrom := max(m.table.rev, 1), max(m.configRev, 1)
	settle := time.Until(m.mergeUntil)
	m.deleted = nil
	m.mu.Unlock()

	ctx, cancel := context.WithCancel(ctx)
	s := &session{m: m, stream: m.reg.watch(ctx, leasesFrom, configFrom), audits: make(chan audit, 1)}
	defer s.wg.Wait()
	defer func() {
		if s.created == 2 && !errors.Is(err, context.Canceled) {
			m.count(func(c *Counters) { c.WatchRestarts++ })
		}
	}()
	defer s.stream.close()
	defer cancel()

	progress := time.NewTicker(m.timing.progress)
	defer progress.Stop()
	stall := time.NewTimer(m.timing.stall)
	defer stall.Stop()
	entropy := time.NewTimer(jittered(m.timing.antiEntropy))
	defer entropy.Stop()
	var settled <-chan time.Time
	if settle > 0 {
		t := time.NewTimer(settle)
		defer t.Stop()
		settled = t.C
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case resp, ok := <-s.stream.responses:
			if !ok {
				return s.ended(ctx)
			}
			stall.Reset(m.timing.stall)
			if err := s.handle(resp); err != nil {
				return err
			}
		case <-progress.C:
			s.stream.requestProgress()
		case <-stall.C:
			return s.stalled(ctx)
		case <-settled:
			return errSettled
		case <-entropy.C:
			s.startAudit(ctx)
			entropy.Reset(jittered(m.timing.antiEntropy))
		case a := <-s.audits:
			s.audited(a)
		}
	}
}

// ended explains the end of the stream.
func (s *session) ended(ctx context.Context) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if s.m.reg.wasReset(s.stream.gen) {
		return errReset
	}
	return s.m.reg.explain(ctx, s.stream.err)
}

// stalled gives up on a silent connection. Closing the stream is not enough: the
// next one would use the same connection, which nothing else declares dead for
// another ten seconds or more.
func (s *session) stalled(ctx context.Context) error {
	s.stream.close()
	s.m.reg.drop(s.stream.gen)
	if s.created == 0 {
		return s.m.reg.explain(ctx, context.DeadlineExceeded)
	}
	s.m.count(func(c *Counters) { c.WatchStalls++ })
	return errStalled
}

// handle applies one response.
func (s *session) handle(resp *pb.WatchResponse) error {
	m := s.m
	if err := watchEnd(resp); err != nil {
		return err
	}
	if h := resp.Header; h != nil {
		m.mu.Lock()
		// A future revision would make the watch wait in silence for a long time.
		rewound := h.ClusterId != m.clusterID || resp.Created && h.Revision < m.table.rev
		m.mu.Unlock()
		if rewound {
			return errRewound
		}
	}
	switch {
	case resp.Created && s.created == 0:
		s.leasesID, s.created = resp.WatchId, 1
	case resp.Created:
		s.configID, s.created = resp.WatchId, 2
		m.connected()
	case isProgress(resp):
		return s.progressed(resp.Header.GetRevision())
	case resp.WatchId == s.leasesID:
		m.applyLeaseEvents(resp.Events)
	case resp.WatchId == s.configID:
		m.applyConfigEvents(resp.Events)
	}
	return nil
}

// applyLeaseEvents applies the events of one response in one step.
func (m *Manager) applyLeaseEvents(events []*mvccpb.Event) {
	var findings []finding
	m.mu.Lock()
	changed := false
	applied := m.table.rev
	own := ""
	if m.state.OwnStatus != "" {
		own = subnetKey(m.state.Own.Subnet)
	}
	for _, ev := range events {
		if ev.Kv.ModRevision <= applied {
			if ev.Kv.ModRevision < applied {
				m.state.Counters.StaleEvents++
			}
			continue
		}
		kv := m.reg.keyValue(ev.Kv)
		m.table.rev = ev.Kv.ModRevision
		changed = true
		if ev.Type == mvccpb.Event_DELETE {
			m.table.del(kv.name)
			if m.deleted != nil {
				m.deleted[kv.name] = true
			}
			if kv.name == own {
				m.ownEvent(nil)
			}
			continue
		}
		f, found, _ := m.table.put(kv)
		if found {
			m.countFinding(f)
			findings = append(findings, f)
		}
		if kv.name == own {
			m.ownEvent(&kv)
		}
	}
	mass := m.holdDeleted()
	if changed {
		m.built = nil
	}
	m.mu.Unlock()
	m.report(findings, "")
	m.reportMass(mass)
	if changed {
		m.notify()
	}
}

// applyConfigEvents applies the newest of the events.
func (m *Manager) applyConfigEvents(events []*mvccpb.Event) {
	m.mu.Lock()
	note := ""
	for i, ev := range events {
		switch {
		case ev.Kv.ModRevision < m.configRev:
			m.state.Counters.StaleEvents++
		case ev.Kv.ModRevision == m.configRev:
		case i == len(events)-1 && ev.Type == mvccpb.Event_DELETE:
			note = m.applyConfig(nil, ev.Kv.ModRevision)
		case i == len(events)-1:
			note = m.applyConfig(ev.Kv.Value, ev.Kv.ModRevision)
		}
	}
	if note != "" {
		m.built = nil
	}
	m.mu.Unlock()
	m.report(nil, note)
	if note != "" {
		m.notify()
	}
}

// startAudit lists everything beside the watch, to compare.
func (s *session) startAudit(ctx context.Context) {
	if s.auditing || s.created < 2 {
		return
	}
	s.auditing = true
	s.m.mu.Lock()
	s.m.deleted = make(map[string]bool)
	s.m.mu.Unlock()
	s.wg.Go(func() {
		snap, err := s.m.reg.list(ctx)
		s.audits <- audit{snap, err}
	})
}

func (s *session) audited(a audit) {
	if a.err != nil {
		s.auditing = false
		return
	}
	s.pending, s.doubts = &a.snap, 0
	s.stream.requestProgress()
}

// progressed is told by etcd that the watch delivered everything up to rev. A
// pending comparison is made once that covers the list. etcd before 3.5.8 may say
// so while events are still on their way, so a difference has to last.
func (s *session) progressed(rev int64) error {
	const enough = 3
	m := s.m
	if s.pending == nil || rev < s.pending.rev {
		return nil
	}
	snap := s.pending
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.table.diff(snap.leases, snap.rev, m.deleted)
	if snap.configRev > m.configRev {
		n++
	}
	if n > 0 {
		if s.doubts++; s.doubts < enough {
			return nil
		}
	}
	s.pending, s.auditing, m.deleted = nil, false, nil
	m.state.Counters.AntiEntropyRuns++
	m.state.Counters.AntiEntropyDiffs += uint64(n)
	if n > 0 {
		return fmt.Errorf("%w: %d keys", errDiffers, n)
	}
	// Everything up to the list is applied: a resume need not go back further, so
	// that a quiet overlay does not fall behind etcd's compaction.
	m.table.rev = max(m.table.rev, snap.rev)
	m.configRev = max(m.configRev, snap.rev)
	return nil
}

// countFinding counts an unusable key or value. Called under the lock.
func (m *Manager) countFinding(f finding) {
	if f.badKey {
		m.state.Counters.BadKeys++
	} else {
		m.state.Counters.BadValues++
	}
}

// report logs what was found, outside the lock.
func (m *Manager) report(findings []finding, note string) {
	const most = 100 // lines at once; State has them all
	for i, f := range findings {
		if i == most {
			m.log.Warn("more lease keys ignored", "count", len(findings)-most)
			break
		}
		m.log.Warn("lease key ignored", "key", f.Key, "revision", f.Revision, "reason", f.Reason)
	}
	if note != "" {
		m.log.Warn("network config", "note", strings.TrimPrefix(note, "lease: "))
	}
}

// reportMass logs that most of the overlay was deleted.
func (m *Manager) reportMass(n int) {
	if n > 0 {
		m.log.Warn("most leases were deleted at once; they are kept for now", "count", n, "hold", m.timing.massHold)
	}
}

// jittered is d give or take a twentieth.
func jittered(d time.Duration) time.Duration { return d - d/20 + rand.N(d/10+1) }
