package lease

import (
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
)

func movedTo(i int) func(State) bool {
	return func(s State) bool { return s.OwnStatus == OwnHeld && s.Own.PublicIP == testIP(i) }
}

func TestANewAddressIsWrittenIntoTheSameLease(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	r, other := w.run(w.node(1)), w.run(w.node(2))
	own := r.State().Own
	other.until("the peer", hasPeer(own.Subnet.String()))
	r.SetPublicIP(testIP(11))
	s := r.until("moved", movedTo(11))
	if s.Own.Subnet != own.Subnet || s.Own.LeaseID != own.LeaseID || s.Own.CreateRevision != own.CreateRevision {
		t.Errorf("own %+v, was %+v", s.Own, own)
	}
	other.until("the new address", func(s State) bool { l, _ := s.peer(own.Subnet.String()); return l.PublicIP == testIP(11) })
	if n := len(w.history(subnetKey(own.Subnet))); n != 2 {
		t.Errorf("%d writes, want the claim and the move", n)
	}
	// It is the lease that others are measured against from now on.
	w.put("10.77.9.0-24", `{"PublicIP":"192.0.2.1"}`)
	r.until("the old address is anybody's", hasPeer("10.77.9.0/24"))
}

// A connection that is closed because the address changed is no trouble to tell of.
func TestANewAddressIsNoTroubleWithEtcd(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	log := &logBuffer{}
	w.log = slog.New(slog.NewTextHandler(log, nil))
	r := w.run(w.node(1))
	r.until("connected", func(s State) bool { return s.Connected })
	for i := range 5 {
		r.SetPublicIP(testIP(11 + i))
		r.until("moved", movedTo(11+i))
		// The watch is on the new connection when an event comes over it.
		w.put("10.77.0.0-24", fmt.Sprintf(`{"PublicIP":%q}`, testIP(100+i)))
		r.until("a lease from the watch", func(s State) bool {
			l, _ := s.peer("10.77.0.0/24")
			return l.PublicIP == testIP(100+i)
		})
	}
	if n, moves := log.lines("not connected"), log.lines("own lease has the new address"); n != 0 || moves != 5 {
		t.Errorf("%d lines say that etcd is away, %d that the lease has another address; want 0 and 5", n, moves)
	}
	if s := r.State(); s.LastError != "" {
		t.Errorf("last error %q", s.LastError)
	}
}

func TestAnAddressOfAnotherNodeIsNotTaken(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	r, other := w.run(w.node(1)), w.run(w.node(2))
	own := r.State().Own
	r.until("the other", hasPeer(other.State().Own.Subnet.String()))
	r.SetPublicIP(testIP(2))
	// Beside the connection, which is made anew.
	s := r.until("refused", func(s State) bool { return strings.Contains(s.LastError, `already used by node "node-2"`) })
	if s.Own.PublicIP != testIP(1) {
		t.Errorf("state %+v", s)
	}
	other.stop()
	if err := other.Release(w.ctx()); err != nil {
		t.Fatal(err)
	}
	if s := r.until("moved when it is free", movedTo(2)); s.Own.Subnet != own.Subnet {
		t.Errorf("state %+v", s)
	}
	r.until("no error", func(s State) bool { return s.LastError == "" })
}

// The answer to the write is lost at any point of the conversation: our own value
// is not taken for somebody else's.
func TestAMoveWhoseFateIsUnknownIsRecognized(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	link := newLink(t, w.endpoint)
	r := w.run(w.node(1, func(c *ManagerConfig) { c.Registry = w.registryAt(link.endpoint) }))
	own := r.State().Own
	for n := range 12 {
		link.cutAfterAnswers(n)
		r.SetPublicIP(testIP(20 + n))
		s := r.until("moved", movedTo(20+n))
		if s.Own.Subnet != own.Subnet || s.Own.CreateRevision != own.CreateRevision {
			t.Fatalf("after %d answers: own %+v, was %+v", n, s.Own, own)
		}
	}
	link.cutAfterAnswers(-1)
}

func TestALeaseTakenBackAfterAMoveHasTheNewAddress(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	m := w.node(1)
	own, err := m.Acquire(w.ctx())
	if err != nil {
		t.Fatal(err)
	}
	w.del(subnetKey(own.Subnet)) // and nobody sees it
	m.SetPublicIP(netip.MustParseAddr("192.0.2.11"))
	r := w.rerun(m)
	if s := r.until("moved", movedTo(11)); s.Own.Subnet != own.Subnet || s.Counters.LeaseRetaken != 1 {
		t.Errorf("state %+v", s)
	}
}
