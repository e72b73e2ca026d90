package lease

import (
	"log/slog"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// holding is a node that keeps deleted leases for so long.
func (w *world) holding(hold, massHold time.Duration) *Manager {
	m := w.node(1)
	m.timing.hold, m.timing.massHold = hold, massHold
	return m
}

func isHeld(subnet string) func(State) bool {
	return func(s State) bool { l, ok := s.peer(subnet); return ok && !l.HeldUntil.IsZero() }
}

func TestADeletedLeaseIsHeldUntilSomebodyElseHasTheSubnetOrTheAddress(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	const own = `{"PublicIP":"192.0.2.2","Tweed":{"NodeID":"id-2"}}`
	w.put("10.77.2.0-24", own)
	w.put("10.77.3.0-24", `{"PublicIP":"192.0.2.3"}`)
	r := w.run(w.holding(time.Hour, time.Hour))
	before, _ := r.until("the peers", hasPeer("10.77.3.0/24")).peer("10.77.2.0/24")

	w.del("10.77.2.0-24")
	held, _ := r.until("held", isHeld("10.77.2.0/24")).peer("10.77.2.0/24")
	if held.PublicIP != before.PublicIP || held.NodeID != "id-2" {
		t.Errorf("held %+v, was %+v", held, before)
	}
	// What cannot be read is nobody's claim.
	w.put("10.77.2.0-24", "{")
	if !isHeld("10.77.2.0/24")(r.caughtUp(w)) {
		t.Error("junk ended the hold")
	}
	// The node itself.
	w.del("10.77.2.0-24")
	w.put("10.77.2.0-24", own)
	r.until("taken back", func(s State) bool { l, ok := s.peer("10.77.2.0/24"); return ok && l.HeldUntil.IsZero() })

	// Another node with the same subnet.
	w.del("10.77.2.0-24")
	r.until("held", isHeld("10.77.2.0/24"))
	w.put("10.77.2.0-24", `{"PublicIP":"192.0.2.22"}`)
	r.until("the new holder", func(s State) bool { l, _ := s.peer("10.77.2.0/24"); return l.PublicIP == testIP(22) })

	// The address in another subnet: the node has moved.
	w.del("10.77.3.0-24")
	r.until("held", isHeld("10.77.3.0/24"))
	w.put("10.77.4.0-24", `{"PublicIP":"192.0.2.3"}`)
	r.until("moved", func(s State) bool { return hasPeer("10.77.4.0/24")(s) && lacksPeer("10.77.3.0/24")(s) })
}

func TestAHoldEndsByItselfButNotWhileEtcdIsSilent(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	w.put("10.77.2.0-24", `{"PublicIP":"192.0.2.2"}`)
	w.put("10.77.3.0-24", `{"PublicIP":"192.0.2.3"}`)
	link := newLink(t, w.endpoint)
	m := w.node(1, func(c *ManagerConfig) { c.Registry = w.registryAt(link.endpoint) })
	m.timing.hold, m.timing.massHold = 100*time.Millisecond, time.Hour
	r := w.run(m)
	r.until("the peers", hasPeer("10.77.3.0/24"))
	w.del("10.77.2.0-24")
	r.until("the end of the hold", lacksPeer("10.77.2.0/24"))

	m.mu.Lock()
	m.timing.hold = time.Hour
	m.mu.Unlock()
	w.del("10.77.3.0-24")
	r.until("held", isHeld("10.77.3.0/24"))
	link.blackHole(true)
	link.cut()
	r.until("disconnected", func(s State) bool { return !s.Connected })
	m.mu.Lock() // an hour later
	l := m.table.held["10.77.3.0-24"]
	l.HeldUntil = time.Now()
	m.table.held["10.77.3.0-24"] = l
	m.mu.Unlock()
	m.endHolds()
	if !hasPeer("10.77.3.0/24")(r.State()) {
		t.Error("forgotten although nobody could claim it again")
	}
	link.open()
	link.cut()
	r.until("connected", func(s State) bool { return s.Connected })
	m.endHolds()
	r.until("the end of the hold", lacksPeer("10.77.3.0/24"))
}

func TestMostLeasesDeletedAtOnceAreHeldLonger(t *testing.T) {
	w := newWorld(t)
	var logs logBuffer
	w.log = slog.New(slog.NewTextHandler(&logs, nil))
	w.config(config16)
	value := map[string]string{}
	for i, name := range []string{"10.77.2.0-24", "10.77.3.0-24", "10.77.4.0-24", "10.77.5.0-24", "10.77.6.0-24"} {
		value[name] = `{"PublicIP":"` + testIP(i+2).String() + `"}`
		w.put(name, value[name])
	}
	r := w.run(w.holding(0, time.Hour))
	before := r.until("the peers", func(s State) bool { return len(s.Peers) == len(value) })
	// rm -r, by mistake: everything, our own included.
	if _, err := w.etcd.Delete(w.ctx(), w.prefix+"/subnets/", clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	r.until("held", isHeld("10.77.2.0/24"))
	if s := r.until("our own back", heldAgain(1)); len(s.Peers) != len(before.Peers) {
		t.Errorf("%d peers, had %d", len(s.Peers), len(before.Peers))
	}
	if n := logs.lines("most leases were deleted at once"); n != 1 {
		t.Errorf("%d log lines", n)
	}
	// Restored from the backup, all but one, which then goes as others do.
	delete(value, "10.77.6.0-24")
	for name, v := range value {
		w.put(name, v)
	}
	r.until("restored", func(s State) bool { return !isHeld("10.77.2.0/24")(s) && isHeld("10.77.6.0/24")(s) })
	w.del("10.77.2.0-24")
	r.until("gone", lacksPeer("10.77.2.0/24"))
}
