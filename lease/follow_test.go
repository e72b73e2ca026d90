package lease

import (
	"context"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestWatchFollowsOthers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.config(config16)
	w.put("10.77.2.0-24", `{"PublicIP":"192.0.2.2"}`, w.leased(600)) // before
	r := w.run(w.node(1))
	w.put("10.77.3.0-24", `{"PublicIP":"192.0.2.3"}`, w.leased(600)) // after
	s := r.until("both", hasPeer("10.77.3.0/24"))
	if got := subnets(s.Peers); !reflect.DeepEqual(got, []string{"10.77.2.0/24", "10.77.3.0/24"}) {
		t.Errorf("peers %v", got)
	}
	w.put("10.77.3.0-24", `{"PublicIP":"192.0.2.33","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:33"}}`)
	s = r.until("moved", func(s State) bool { l, ok := s.peer("10.77.3.0/24"); return ok && l.PublicIP == testIP(33) })
	if l, _ := s.peer("10.77.3.0/24"); l.VtepMAC.String() != "02:00:00:00:00:33" || !l.Reservation || l.LeaseID != 0 {
		t.Errorf("peer %+v", l)
	}
	w.del("10.77.3.0-24")
	r.until("gone", lacksPeer("10.77.3.0/24"))

	id := w.grant(2) // dies by itself
	w.put("10.77.4.0-24", `{"PublicIP":"192.0.2.4"}`, clientv3.WithLease(id))
	r.until("come", hasPeer("10.77.4.0/24"))
	r.until("expired", lacksPeer("10.77.4.0/24"))
	if c := r.State().Counters; c.Relists != 1 || c.WatchRestarts != 0 || c.StaleEvents != 0 {
		t.Errorf("counters %+v", c)
	}
}

func TestNodesSeeEachOtherAndNeverThemselves(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	var nodes []*running
	for i := range 4 {
		nodes = append(nodes, w.run(w.node(i+1)))
	}
	for _, r := range nodes {
		s := r.until("three peers", func(s State) bool { return len(s.Peers) == 3 })
		if _, ok := s.peer(s.Own.Subnet.String()); ok {
			t.Errorf("%s sees itself", s.Own.Subnet)
		}
		for _, l := range s.Peers {
			if l.NodeID == "" || l.NodeName == "" {
				t.Errorf("peer %+v", l)
			}
		}
	}
}

// Junk of every kind hurts nobody, is counted, and is logged once each.
func TestJunkInEtcdChangesNothingElse(t *testing.T) {
	w := newWorld(t)
	var logs logBuffer
	w.log = slog.New(slog.NewTextHandler(&logs, nil))
	w.config(config16)
	w.put("10.77.2.0-24", `{"PublicIP":"192.0.2.2"}`)
	r := w.run(w.node(1))
	before := r.until("the peer", hasPeer("10.77.2.0/24"))

	w.put("junk", "{")
	w.put("10.77.3.0-24", `{"PublicIP":`)
	w.put("10.77.2.0-24", `{"PublicIP":"nonsense"}`) // the last good one of this stays
	for _, k := range badKeys {
		if k != "" && len(k) < 1000 {
			w.put(k, `{"PublicIP":"192.0.2.66"}`)
		}
	}
	for i, v := range badValues {
		w.put(fmt.Sprintf("10.77.%d.0-24", 110+i), v)
	}
	w.putRaw(w.prefix+"/subnets-old/10.77.60.0-24", `{"PublicIP":"192.0.2.60"}`)
	w.putRaw(w.prefix+"/subnetsx", `{`)
	s := r.caughtUp(w)
	if !reflect.DeepEqual(s.Own, before.Own) {
		t.Errorf("own %+v, was %+v", s.Own, before.Own)
	}
	if got := subnets(s.Peers); !reflect.DeepEqual(got, []string{"10.77.2.0/24", "10.77.250.0/24"}) {
		t.Errorf("peers %v", got)
	}
	if l, _ := s.peer("10.77.2.0/24"); l.PublicIP != testIP(2) {
		t.Errorf("peer %+v", l)
	}
	keys, values := s.Counters.BadKeys, s.Counters.BadValues
	// Two of badKeys cannot be put, but "junk" is put twice.
	if int(keys) != len(badKeys)-1 || int(values) != len(badValues)+2 {
		t.Errorf("counted %d keys and %d values", keys, values)
	}
	if len(s.Ignored) < len(badValues) {
		t.Errorf("only %d keys are reported as ignored", len(s.Ignored))
	}
	lines := logs.lines("lease key ignored")
	if lines != int(keys+values) {
		t.Errorf("%d log lines for %d findings", lines, keys+values)
	}
	// Reading everything again finds the same and says nothing.
	if err := r.relist(w.ctx()); err != nil {
		t.Fatal(err)
	}
	s = r.State()
	if s.Counters.BadKeys != keys || s.Counters.BadValues != values || logs.lines("lease key ignored") != lines {
		t.Errorf("counted or logged twice: %+v", s.Counters)
	}
	// A good value cures it.
	w.put("10.77.2.0-24", `{"PublicIP":"192.0.2.22"}`)
	r.until("cured", func(s State) bool { l, _ := s.peer("10.77.2.0/24"); return l.PublicIP == testIP(22) })
}

func TestTwoResyncsInARowChangeNothing(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	w.put("10.77.2.0-24", `{"PublicIP":"192.0.2.2"}`)
	r := w.run(w.node(1))
	before := r.until("the peer", hasPeer("10.77.2.0/24"))
	r.stop()
	for len(r.updates) > 0 {
		<-r.updates
	}
	for range 2 {
		if err := r.relist(w.ctx()); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-r.Updates():
		t.Error("a resync that found nothing is told as a change")
	default:
	}
	select {
	case <-r.kick:
		t.Error("a resync woke the keeper of the own lease")
	default:
	}
	after := r.State()
	if !reflect.DeepEqual(after.Peers, before.Peers) || !reflect.DeepEqual(after.Own, before.Own) || after.Counters.Relists != 3 {
		t.Errorf("got  %+v\nwant %+v", after, before)
	}
}

// While the node is cut off, leases come, go and change, and etcd compacts what
// the watch would resume from.
func TestCompactionDuringAGapIsFollowedExactly(t *testing.T) {
	t.Parallel()
	w := newWorldAt(t, ownEtcd(t, nil).endpoint) // the histories in the shared one must stay whole
	w.config(config16)
	vxlan := func(ip, mac string) string {
		return fmt.Sprintf(`{"PublicIP":%q,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":%q}}`, ip, mac)
	}
	w.put("10.77.2.0-24", vxlan("192.0.2.2", "02:00:00:00:00:02"))
	w.put("10.77.3.0-24", vxlan("192.0.2.3", "02:00:00:00:00:03"))
	w.put("10.77.4.0-24", vxlan("192.0.2.4", "02:00:00:00:00:04"))
	link := newLink(t, w.endpoint)
	r := w.run(w.node(1, func(c *ManagerConfig) { c.Registry = w.registryAt(link.endpoint) }))
	before := r.until("three peers", func(s State) bool { return len(s.Peers) == 3 })

	link.blackHole(true)
	link.cut()
	r.until("disconnected", func(s State) bool { return !s.Connected })
	w.put("10.77.2.0-24", vxlan("192.0.2.22", "02:00:00:00:00:02")) // new address
	w.put("10.77.3.0-24", vxlan("192.0.2.3", "02:00:00:00:00:33"))  // new MAC
	w.del("10.77.4.0-24")
	w.put("10.77.5.0-24", vxlan("192.0.2.5", "02:00:00:00:00:05"))
	rev := w.put("10.77.6.0-24", `{`)
	if _, err := w.etcd.Compact(w.ctx(), rev); err != nil {
		t.Fatal(err)
	}
	if s := r.State(); !reflect.DeepEqual(s.Peers, before.Peers) || s.OwnStatus != OwnHeld || s.LastError == "" {
		t.Errorf("being cut off changed something: %+v", s)
	}
	link.open()
	link.cut()
	s := r.until("resynced", func(s State) bool { return s.Connected && s.Revision >= rev })
	want := map[string]string{
		"10.77.2.0/24": "192.0.2.22 02:00:00:00:00:02",
		"10.77.3.0/24": "192.0.2.3 02:00:00:00:00:33",
		"10.77.5.0/24": "192.0.2.5 02:00:00:00:00:05",
	}
	got := make(map[string]string)
	for _, l := range s.Peers {
		got[l.Subnet.String()] = l.PublicIP.String() + " " + l.VtepMAC.String()
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	if s.Counters.Compactions == 0 || s.Counters.BadValues != 1 {
		t.Errorf("counters %+v", s.Counters)
	}
	if !reflect.DeepEqual(s.Own, before.Own) || s.Counters.LeaseRetaken != 0 {
		t.Errorf("own %+v, was %+v", s.Own, before.Own)
	}
}

// The connection swallows everything without a sign while new ones would work.
func TestSilentConnectionIsNoticedAndReplaced(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	link := newLink(t, w.endpoint)
	m := w.node(1, func(c *ManagerConfig) { c.Registry = w.registryAt(link.endpoint) })
	m.reg.pingAfter = time.Hour // gRPC would notice as well, much later
	m.timing.stall = 500 * time.Millisecond
	r := w.run(m)
	opened := link.count()
	link.blackHole(false)
	w.put("10.77.2.0-24", `{"PublicIP":"192.0.2.2"}`)
	s := r.until("the change behind the silence", hasPeer("10.77.2.0/24"))
	if s.Counters.WatchStalls == 0 || link.count() == opened {
		t.Errorf("counters %+v, %d connections were opened", s.Counters, link.count()-opened)
	}
	if s.Counters.Relists != 1 {
		t.Errorf("resumed by %d lists instead of from its revision", s.Counters.Relists)
	}
}

// Nothing is written for a long time: the answers to progress requests alone
// must keep the watch.
func TestWatchOnAQuietEtcdIsNotTakenForDead(t *testing.T) {
	t.Parallel()
	w := newWorldAt(t, ownEtcd(t, nil).endpoint)
	w.config(config16)
	m := w.node(1)
	m.timing.stall = 2 * time.Second
	r := w.run(m)
	time.Sleep(3 * m.timing.stall)
	if s := r.State(); !s.Connected || s.Counters.WatchStalls != 0 || s.Counters.WatchRestarts != 0 || s.Counters.Relists != 1 {
		t.Errorf("state %+v", s)
	}
	w.put("10.77.2.0-24", `{"PublicIP":"192.0.2.2"}`)
	r.until("the peer", hasPeer("10.77.2.0/24"))
}

func TestStallIsNoticedWithinFiveSeconds(t *testing.T) {
	d := defaultTiming()
	if d.stall >= 5*time.Second || d.progress*2 > d.stall {
		t.Errorf("progress every %s, stall after %s", d.progress, d.stall)
	}
	if d.retryMax+reconnectMax > 2*time.Second {
		t.Errorf("a node may wait %s after etcd's return", d.retryMax+reconnectMax)
	}
}

// A busy stream of connection losses loses no event.
func TestWatchResumesWhereItEnded(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	link := newLink(t, w.endpoint)
	r := w.run(w.node(1, func(c *ManagerConfig) { c.Registry = w.registryAt(link.endpoint) }))
	for i := range 60 {
		w.put(fmt.Sprintf("10.77.%d.0-24", 110+i%20), fmt.Sprintf(`{"PublicIP":"192.0.2.%d"}`, 50+i))
		if i%6 == 5 {
			link.cut()
		}
	}
	s := r.caughtUp(w)
	for i := 40; i < 60; i++ {
		if l, _ := s.peer(fmt.Sprintf("10.77.%d.0/24", 110+i%20)); l.PublicIP != testIP(50+i) {
			t.Errorf("peer %d is %+v", i, l)
		}
	}
	if s.Counters.WatchRestarts == 0 || s.Counters.Relists != 1 {
		t.Errorf("counters %+v", s.Counters)
	}
}

func TestEtcdKilledCompactedAndRestartedIsFollowedExactly(t *testing.T) {
	t.Parallel()
	server := ownEtcd(t, nil)
	w := newWorldAt(t, server.endpoint)
	var logs logBuffer
	w.log = slog.New(slog.NewTextHandler(&logs, nil))
	w.config(config16)
	w.put("10.77.2.0-24", `{"PublicIP":"192.0.2.2"}`)
	w.put("10.77.3.0-24", `{"PublicIP":"192.0.2.3"}`)
	m := w.node(1)
	r := w.run(m)
	before := r.until("two peers", func(s State) bool { return len(s.Peers) == 2 })

	server.restart(t, nil, func() {
		r.until("disconnected", func(s State) bool { return !s.Connected && strings.Contains(s.LastError, "connection refused") })
		time.Sleep(2 * time.Second)
		if s := r.State(); !reflect.DeepEqual(s.Peers, before.Peers) || s.OwnStatus != OwnHeld {
			t.Errorf("the outage changed something: %+v", s)
		}
		if n := logs.lines("problem="); n > 6 {
			t.Errorf("%d log lines about one outage", n)
		}
	})
	// Between its return and ours: a change and a compaction.
	rev := w.put("10.77.2.0-24", `{"PublicIP":"192.0.2.22"}`)
	w.del("10.77.3.0-24")
	if _, err := w.etcd.Compact(w.ctx(), rev+1); err != nil {
		t.Fatal(err)
	}
	s := r.until("exact", func(s State) bool { return s.Connected && s.Revision > rev })
	if l, _ := s.peer("10.77.2.0/24"); len(s.Peers) != 1 || l.PublicIP != testIP(22) {
		t.Errorf("peers %+v", s.Peers)
	}
	r.until("no error", func(s State) bool { return s.LastError == "" })
	if !reflect.DeepEqual(r.State().Own, before.Own) {
		t.Errorf("own %+v, was %+v", r.State().Own, before.Own)
	}
}

// etcd comes back empty, as after a restore or a new installation.
func TestEtcdThatLostEverythingRemovesNobodyAtOnce(t *testing.T) {
	t.Parallel()
	server := ownEtcd(t, nil)
	w := newWorldAt(t, server.endpoint)
	w.config(config16)
	for i := range 20 { // history, so that the new one is older
		w.put("10.77.2.0-24", fmt.Sprintf(`{"PublicIP":"192.0.2.%d"}`, i+2))
	}
	link := newLink(t, w.endpoint)
	server.cut = link.cut
	m := w.node(1, func(c *ManagerConfig) { c.Registry = w.registryAt(link.endpoint) })
	m.timing.mergeHold = 6 * time.Second
	r := w.run(m)
	r.until("the peer", hasPeer("10.77.2.0/24"))
	server.dir = t.TempDir()
	server.restart(t, nil, nil)
	s := r.until("its own lease back", func(s State) bool { return s.Connected && s.Counters.Rollbacks > 0 && s.OwnStatus == OwnHeld })
	if _, ok := s.peer("10.77.2.0/24"); !ok || !strings.Contains(s.PendingConfig, "deleted") {
		t.Errorf("state %+v", s)
	}
	if kv := w.get("10.77.201.0-24"); kv == nil {
		r.until("its key written again", func(State) bool { return w.get("10.77.201.0-24") != nil })
	}
	w.put("10.77.3.0-24", `{"PublicIP":"192.0.2.3"}`)
	r.until("new leases", hasPeer("10.77.3.0/24"))
	r.until("the end of the hold", lacksPeer("10.77.2.0/24"))
}

func TestAntiEntropyFindsNothingOnAHealthyWatch(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	m := w.node(1)
	m.timing.antiEntropy = 50 * time.Millisecond
	r := w.run(m)
	for i := range 100 {
		w.put(fmt.Sprintf("10.77.%d.0-24", 110+i%30), fmt.Sprintf(`{"PublicIP":"192.0.2.%d"}`, 50+i))
		if i%3 == 0 {
			w.del(fmt.Sprintf("10.77.%d.0-24", 110+i%30))
		}
	}
	s := r.until("five comparisons", func(s State) bool { return s.Counters.AntiEntropyRuns >= 5 })
	if s.Counters.AntiEntropyDiffs != 0 || s.Counters.Relists != 1 {
		t.Errorf("counters %+v", s.Counters)
	}
}

func TestAntiEntropyRepairsWhatTheWatchMissed(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	w.put("10.77.2.0-24", `{"PublicIP":"192.0.2.2"}`)
	m := w.node(1)
	m.timing.antiEntropy = 50 * time.Millisecond
	r := w.run(m)
	r.until("the peer", hasPeer("10.77.2.0/24"))
	m.change(func() { delete(m.table.records, "10.77.2.0-24") }) // as if the put had never arrived
	s := r.until("the peer again", hasPeer("10.77.2.0/24"))
	if s.Counters.AntiEntropyDiffs == 0 {
		t.Errorf("counters %+v", s.Counters)
	}
}

func TestEventsThatWereAppliedAlreadyAreDropped(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	m := w.node(1)
	if _, err := m.Acquire(w.ctx()); err != nil {
		t.Fatal(err)
	}
	if err := m.relist(w.ctx()); err != nil {
		t.Fatal(err)
	}
	rev := m.State().Revision
	stale := event("10.77.2.0-24", `{"PublicIP":"192.0.2.2"}`, rev-1, w)
	last := event("10.77.4.0-24", `{"PublicIP":"192.0.2.4"}`, rev, w) // a resume repeats the last revision
	fresh := event("10.77.3.0-24", `{"PublicIP":"192.0.2.3"}`, rev+1, w)
	m.applyLeaseEvents([]*mvccpb.Event{stale, last, fresh, stale})
	s := m.State()
	if got := subnets(s.Peers); !reflect.DeepEqual(got, []string{"10.77.3.0/24"}) || s.Counters.StaleEvents != 2 {
		t.Errorf("peers %v, counters %+v", got, s.Counters)
	}
}

func event(name, value string, rev int64, w *world) *mvccpb.Event {
	return &mvccpb.Event{Type: mvccpb.Event_PUT, Kv: &mvccpb.KeyValue{
		Key: []byte(w.prefix + "/subnets/" + name), Value: []byte(value), CreateRevision: rev, ModRevision: rev,
	}}
}

func TestNetworkThatGrewIsPutInForce(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	r := w.run(w.node(1))
	before := r.State()
	w.put("10.64.9.0-24", `{"PublicIP":"192.0.2.9"}`) // outside as yet
	s := r.caughtUp(w)
	if _, ok := s.peer("10.64.9.0/24"); ok || len(s.Ignored) != 1 {
		t.Errorf("peers %v, ignored %v", subnets(s.Peers), s.Ignored)
	}
	w.config(`{"Network":"10.64.0.0/12","SubnetLen":24}`)
	s = r.until("grown", func(s State) bool { return s.Config.Network.Bits() == 12 })
	if _, ok := s.peer("10.64.9.0/24"); !ok || s.PendingConfig != "" || len(s.Ignored) != 0 {
		t.Errorf("state %+v", s)
	}
	if !reflect.DeepEqual(s.Own, before.Own) {
		t.Errorf("own %+v, was %+v", s.Own, before.Own)
	}
}

func TestConfigThatCannotBeAppliedLeavesTheLastGoodOneInForce(t *testing.T) {
	w := newWorld(t)
	var logs logBuffer
	w.log = slog.New(slog.NewTextHandler(&logs, nil))
	w.config(config16)
	r := w.run(w.node(1))
	w.put("10.77.2.0-24", `{"PublicIP":"172.16.5.5"}`)
	r.until("the peer", hasPeer("10.77.2.0/24"))
	good := r.State().Config
	for _, tc := range []struct{ json, want string }{
		{`{"Network":"10.77.0.0/16","Backend":{"Type":"vxlan"}}`, "Backend.Type udp -> vxlan): it takes effect when this node is restarted"},
		{`{"Network":"10.77.192.0/18","SubnetLen":24}`, "Network 10.77.0.0/16 -> 10.77.192.0/18"},
		{`{"Network":"10.77.0.0/17","SubnetLen":24}`, "with another subnet than 10.77.201.0/24"},
		{`{"Network":"10.77.0.0/16","SubnetLen":25}`, "SubnetLen 24 -> 25"},
		{`{"Network":"10.64.0.0/12","SubnetLen":24,"Backend":{"Type":"udp","Port":9}}`, "Backend.Port 0 -> 9"},
		{`{"Network":"10.77.0.0/16","EnableNFTables":true}`, "EnableNFTables false -> true"},
		{`{"Network":"10.77.0.0/16","SubnetMax":"10.77.99.0"}`, "SubnetMax 10.77.255.0 -> 10.77.99.0"},
		{`{"Network":"0.0.0.0/0","SubnetLen":24}`, "public IP"},
		{`{"Network":"10.77.0.0/16","SubnetLen":"/24"}`, `not valid, the last good one stays in force: SubnetLen is "/24"`},
		{`{`, "not valid JSON"},
		{"", "was deleted: the last good one stays in force"},
	} {
		if tc.json == "" {
			if _, err := w.etcd.Delete(w.ctx(), w.prefix+"/config"); err != nil {
				t.Fatal(err)
			}
		} else {
			w.config(tc.json)
		}
		s := r.until(tc.json, func(s State) bool { return strings.Contains(s.PendingConfig, tc.want) })
		if s.Config != good || s.OwnStatus != OwnHeld || len(s.Peers) != 1 {
			t.Errorf("%s: state %+v", tc.json, s)
		}
	}
	w.config(config16)
	s := r.until("good again", func(s State) bool { return s.PendingConfig == "" })
	if s.Config != good || logs.lines("newest one again") != 1 {
		t.Errorf("config %s, %d log lines", s.Config, logs.lines("newest one again"))
	}
	// The same after a gap, by list instead of by watch.
	w.config(`{"Network":"10.77.0.0/16","Backend":{"Type":"vxlan"}}`)
	if err := r.relist(w.ctx()); err != nil {
		t.Fatal(err)
	}
	if s := r.State(); !strings.Contains(s.PendingConfig, "udp -> vxlan") {
		t.Errorf("pending %q", s.PendingConfig)
	}
}

func TestGrowthThatWouldCoverAPeersAddressWaits(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	r := w.run(w.node(1))
	w.put("10.77.2.0-24", `{"PublicIP":"10.64.0.2"}`)
	r.until("the peer", hasPeer("10.77.2.0/24"))
	w.config(`{"Network":"10.64.0.0/12","SubnetLen":24}`)
	s := r.until("pending", func(s State) bool { return s.PendingConfig != "" })
	if !strings.Contains(s.PendingConfig, "10.64.0.2") || len(s.Peers) != 1 {
		t.Errorf("state %+v", s)
	}
}

func TestStalledConsumerGetsTheLastState(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	r := w.run(w.node(1))
	var rev int64
	for i := range 300 { // nobody looks at Updates meanwhile
		rev = w.put(fmt.Sprintf("10.77.%d.0-24", 110+i%10), fmt.Sprintf(`{"PublicIP":"192.0.2.%d"}`, 10+i%200))
	}
	for r.State().Revision < rev {
		time.Sleep(10 * time.Millisecond)
	}
	select {
	case <-r.Updates():
	case <-time.After(patience):
		t.Error("no signal is pending")
	}
	if s := r.State(); len(s.Peers) != 10 {
		t.Errorf("%d peers", len(s.Peers))
	}
}

func TestRunNeedsALease(t *testing.T) {
	w := newWorld(t)
	if err := w.node(1).Run(context.Background()); err == nil {
		t.Error("ran without a lease")
	}
}
