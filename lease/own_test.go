package lease

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func heldAgain(retaken uint64) func(State) bool {
	return func(s State) bool { return s.OwnStatus == OwnHeld && s.Counters.LeaseRetaken >= retaken }
}

func TestDeletedOwnLeaseIsTakenBack(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	r := w.run(w.node(1))
	own := r.State().Own
	name := subnetKey(own.Subnet)
	w.del(name)
	s := r.until("held again", heldAgain(1))
	kv := w.get(name)
	if kv == nil || s.Own.Subnet != own.Subnet || kv.ModRevision != s.Own.ModRevision || s.OwnProblem != "" {
		t.Fatalf("own %+v, etcd %v", s.Own, kv)
	}
	if kv.Lease != own.LeaseID {
		t.Errorf("the etcd lease %x was alive but %x is used: one is orphaned", own.LeaseID, kv.Lease)
	}
}

func TestRevokedOwnLeaseIsTakenBack(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	r := w.run(w.node(1))
	own := r.State().Own
	if _, err := w.etcd.Revoke(w.ctx(), clientv3.LeaseID(own.LeaseID)); err != nil {
		t.Fatal(err)
	}
	s := r.until("held again", heldAgain(1))
	if kv := w.get(subnetKey(own.Subnet)); kv == nil || s.Own.Subnet != own.Subnet || kv.Lease != s.Own.LeaseID || kv.Lease == own.LeaseID {
		t.Fatalf("own %+v, etcd %v", s.Own, kv)
	}
}

func TestExpiredLeaseOfASleeperIsTakenBackWhenItWakes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.config(config16)
	m := w.node(1, withTTL(2*time.Second))
	own, err := m.Acquire(w.ctx())
	if err != nil {
		t.Fatal(err)
	}
	for w.get(subnetKey(own.Subnet)) != nil { // asleep: nobody renews
		time.Sleep(50 * time.Millisecond)
	}
	r := w.rerun(m)
	if s := r.until("held again", heldAgain(1)); s.Own.Subnet != own.Subnet {
		t.Errorf("got %s, had %s", s.Own.Subnet, own.Subnet)
	}
}

func TestLeaseIsKeptAliveWithoutBeingWritten(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.config(config16)
	r := w.run(w.node(1, withTTL(6*time.Second)))
	own := r.State().Own
	time.Sleep(13 * time.Second) // more than twice the time to live
	r.caughtUp(w)
	if events := w.history(subnetKey(own.Subnet)); len(events) != 1 {
		t.Errorf("the key saw %d events", len(events))
	}
	if s := r.State(); s.OwnStatus != OwnHeld || s.Own.LeaseID != own.LeaseID || s.Counters.KeepAliveErrors != 0 {
		t.Errorf("state %+v", s)
	}
}

// A node that slept past its expiry while another one claimed its subnet never
// writes the key: etcd's own history is the witness.
func TestSubnetOfAnotherHolderIsNeverOverwritten(t *testing.T) {
	w := newWorld(t)
	var logs logBuffer
	w.log = slog.New(slog.NewTextHandler(&logs, nil))
	w.config(config16)
	m := w.node(1)
	own, err := m.Acquire(w.ctx())
	if err != nil {
		t.Fatal(err)
	}
	name := subnetKey(own.Subnet)
	if _, err := w.etcd.Revoke(w.ctx(), clientv3.LeaseID(own.LeaseID)); err != nil {
		t.Fatal(err)
	}
	claim := w.put(name, `{"PublicIP":"192.0.2.2","Tweed":{"NodeID":"id-2","Name":"node-2"}}`, w.leased(600))

	r := w.rerun(m)
	s := r.until("lost", func(s State) bool { return s.OwnStatus == OwnLost })
	for _, want := range []string{own.Subnet.String(), `"node-2"`, "id-2", "192.0.2.2", "does not overwrite", "restart this node"} {
		if !strings.Contains(s.OwnProblem, want) {
			t.Errorf("%q is not in: %s", want, s.OwnProblem)
		}
	}
	if s.Own.Subnet != own.Subnet {
		t.Errorf("forwarding state is gone: %+v", s.Own)
	}
	if _, ok := s.peer(own.Subnet.String()); ok {
		t.Error("our own subnet is a peer")
	}
	// Give it every chance to be wrong: wake it again and again.
	for range 20 {
		r.kick <- struct{}{}
		r.caughtUp(w)
	}
	for _, ev := range w.history(name) {
		if ev.Kv.ModRevision > claim {
			t.Errorf("written at revision %d by the loser: %v", ev.Kv.ModRevision, ev)
		}
	}
	if n := logs.lines("own lease lost"); n != 1 {
		t.Errorf("%d log lines about the loss", n)
	}

	// When it becomes free it is taken back.
	w.del(name)
	if s := r.until("held again", heldAgain(1)); s.Own.Subnet != own.Subnet || s.OwnProblem != "" {
		t.Errorf("state %+v", s)
	}
}

func TestStolenKeyIsNotFoughtFor(t *testing.T) {
	for _, tc := range []struct{ name, value, problem string }{
		{"another node", `{"PublicIP":"192.0.2.2","Tweed":{"NodeID":"id-2","Name":"node-2"}}`, `held since`},
		{"flannel", `{"PublicIP":"192.0.2.2","PublicIPv6":null}`, "names no id"},
		{"junk", `{`, "not a lease"},
		{"a clone of our state", `{"PublicIP":"192.0.2.2","Tweed":{"NodeID":"id-1","Name":"node-1"}}`, "node.json"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.config(config16)
			r := w.run(w.node(1))
			own := r.State().Own
			rev := w.put(subnetKey(own.Subnet), tc.value, w.leased(600))
			s := r.until("lost", func(s State) bool { return s.OwnStatus == OwnLost })
			if !strings.Contains(s.OwnProblem, tc.problem) {
				t.Errorf("problem %q", s.OwnProblem)
			}
			for range 5 {
				r.kick <- struct{}{}
				r.caughtUp(w)
			}
			if kv := w.get(subnetKey(own.Subnet)); kv.ModRevision != rev {
				t.Errorf("overwritten: %v", kv)
			}
			if info, err := r.reg.leaseInfo(w.ctx(), own.LeaseID); err != nil || info.alive {
				t.Errorf("our etcd lease is left without a key: %+v, %v", info, err)
			}
		})
	}
}

// flannel renews by an unconditional put with our address and no node id, for
// example when it still runs on the same host.
func TestFlannelsPutOnOurKeyIsContinuedOnce(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	r := w.run(w.node(1))
	own := r.State().Own
	name := subnetKey(own.Subnet)
	id := w.grant(600)
	put := func() int64 { return w.put(name, `{"PublicIP":"192.0.2.1","PublicIPv6":null}`, clientv3.WithLease(id)) }
	rev := put()
	s := r.until("continued", func(s State) bool { return s.OwnStatus == OwnHeld && s.Own.ModRevision > rev })
	if s.Own.LeaseID != int64(id) || s.Own.Subnet != own.Subnet {
		t.Errorf("state %+v", s.Own)
	}
	if kv := w.get(name); !strings.Contains(string(kv.Value), `"NodeID":"id-1"`) || kv.Lease != int64(id) {
		t.Errorf("etcd has %v", kv)
	}
	rev = put() // at once again: that is somebody alive
	r.until("lost", func(s State) bool { return s.OwnStatus == OwnLost })
	if kv := w.get(name); kv.ModRevision != rev {
		t.Errorf("fought for: %v", kv)
	}
}

func TestOwnLeaseMadeAReservationIsKeptAsOne(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.config(config16)
	r := w.run(w.node(1, withTTL(2*time.Second)))
	own := r.State().Own
	name := subnetKey(own.Subnet)
	rev := w.put(name, string(w.get(name).Value)) // as flannel's documentation says
	s := r.until("a reservation", func(s State) bool { return s.Own.Reservation })
	if s.OwnStatus != OwnHeld || s.Own.LeaseID != 0 {
		t.Errorf("state %+v", s)
	}
	time.Sleep(3 * time.Second)
	r.caughtUp(w)
	if kv := w.get(name); kv == nil || kv.Lease != 0 || kv.ModRevision != rev {
		t.Errorf("etcd has %v", kv)
	}
	if info, err := r.reg.leaseInfo(w.ctx(), own.LeaseID); err != nil || info.alive {
		t.Errorf("the old etcd lease is left: %+v, %v", info, err)
	}
}

func TestRetakeDoesNotOverwriteWhoWasFaster(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	m := w.node(1)
	own, err := m.Acquire(w.ctx())
	if err != nil {
		t.Fatal(err)
	}
	name := subnetKey(own.Subnet)
	// Claimed between our look, which found nothing, and our claim.
	w.put(name, `{"PublicIP":"192.0.2.2","Tweed":{"NodeID":"id-2","Name":"node-2"}}`, w.leased(600))
	if err := m.retake(context.Background(), own, m.ownValue); err != errRaced {
		t.Errorf("got %v", err)
	}
	if err := m.tend(context.Background()); err != nil || m.State().OwnStatus != OwnLost {
		t.Errorf("got %v, status %s", err, m.State().OwnStatus)
	}
	events := w.history(name)
	if n := len(events); n != 2 || events[n-1].Type != mvccpb.Event_PUT {
		t.Errorf("history %v", events)
	}
}
