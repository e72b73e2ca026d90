package lease

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const config16 = `{"Network":"10.77.0.0/16"}`

func TestAcquireWritesFlannelsKeyAndValue(t *testing.T) {
	w := newWorld(t)
	w.config(`{"Network":"10.77.0.0/16","SubnetMin":"10.77.5.0","SubnetMax":"10.77.5.0","Backend":{"Type":"vxlan","VNI":7}}`)
	m := w.node(1, func(c *ManagerConfig) {
		c.Attrs = func(cfg NetworkConfig) Attrs {
			return Attrs{BackendType: cfg.Backend.Type, VNI: cfg.Backend.VNI, VtepMAC: mac(t, "02:11:22:33:44:55"), PartialChecksums: true}
		}
	})
	own, err := m.Acquire(w.ctx())
	if err != nil {
		t.Fatal(err)
	}
	kv := w.get("10.77.5.0-24")
	want := `{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":7,"VtepMAC":"02:11:22:33:44:55"},` +
		`"Tweed":{"NodeID":"id-1","Name":"node-1","Caps":["partial-checksum"]}}`
	if kv == nil || string(kv.Value) != want {
		t.Fatalf("got  %s\nwant %s", kv, want)
	}
	info, err := m.reg.leaseInfo(w.ctx(), kv.Lease)
	if err != nil || !info.alive || info.granted != DefaultTTL || info.keys != 1 {
		t.Errorf("etcd lease is %+v, %v, want 24 h", info, err)
	}
	if own.Subnet.String() != "10.77.5.0/24" || own.LeaseID != kv.Lease || own.ModRevision != kv.ModRevision || own.Reservation {
		t.Errorf("got %+v", own)
	}
	if s := m.State(); s.OwnStatus != OwnHeld || s.Own.Subnet != own.Subnet || s.LastError != "" {
		t.Errorf("state %+v", s)
	}
}

func TestTwentyNodesAtOnceClaimTwentySubnets(t *testing.T) {
	w := newWorld(t)
	// A range this tight makes them collide: 20 nodes, 24 subnets.
	w.config(`{"Network":"10.77.0.0/16","SubnetMin":"10.77.1.0","SubnetMax":"10.77.24.0"}`)
	nodes := make([]*Manager, 20)
	for i := range nodes {
		nodes[i] = w.node(i + 1)
	}
	got := make([]Lease, len(nodes))
	var wg sync.WaitGroup
	for i, m := range nodes {
		wg.Go(func() {
			var err error
			if got[i], err = m.Acquire(w.ctx()); err != nil {
				t.Errorf("node %d: %v", i+1, err)
			}
		})
	}
	wg.Wait()
	holders := make(map[netip.Prefix]int)
	for i, l := range got {
		if other, taken := holders[l.Subnet]; taken {
			t.Errorf("nodes %d and %d both hold %s", other, i+1, l.Subnet)
		}
		holders[l.Subnet] = i + 1
	}
	if keys := w.keys(); len(keys) != len(nodes) {
		t.Errorf("%d keys for %d nodes", len(keys), len(nodes))
	}
	for _, kv := range w.keys() {
		if kv.Version != 1 {
			t.Errorf("%s was written %d times", kv.Key, kv.Version)
		}
	}
}

func TestNinthNodeOfEightIsOutOfSubnets(t *testing.T) {
	w := newWorld(t)
	w.config(`{"Network":"10.77.0.0/21","SubnetLen":24,"SubnetMin":"10.77.0.0"}`)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if _, err := w.node(i + 1).Acquire(w.ctx()); err != nil {
				t.Errorf("node %d: %v", i+1, err)
			}
		})
	}
	wg.Wait()
	ninth := w.node(9)
	_, err := ninth.Acquire(w.ctx())
	if !errors.Is(err, ErrOutOfSubnets) || !strings.Contains(err.Error(), "10.77.0.0/21 holds 8 subnets of /24") {
		t.Errorf("got %v", err)
	}
	if keys := w.keys(); len(keys) != 8 {
		t.Errorf("%d keys", len(keys))
	}
	if s := ninth.State(); s.OwnStatus != "" {
		t.Errorf("own status %q", s.OwnStatus)
	}
}

func TestLostRacePicksAgainAndLeavesNoEtcdLease(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	m := w.node(1)
	m.reg.config = configKey(w.prefix)
	// Taken between the look and the claim.
	w.put("10.77.9.0-24", `{"PublicIP":"192.0.2.9"}`, w.leased(60))
	if _, err := m.create(w.ctx(), netip.MustParsePrefix("10.77.9.0/24"), value("192.0.2.1")); !errors.Is(err, errRaced) {
		t.Fatalf("got %v", err)
	}
	spare := m.spare
	if spare == 0 {
		t.Fatal("no etcd lease is kept for the next try")
	}
	own, err := m.Acquire(w.ctx())
	if err != nil || own.LeaseID != spare || m.spare != 0 {
		t.Errorf("got %+v, %v; the etcd lease %x of the lost race was not used", own, err, spare)
	}
}

func TestFailedAcquireLeavesNothingBehind(t *testing.T) {
	w := newWorld(t)
	w.config(`{"Network":"10.77.0.0/16","SubnetMin":"10.77.1.0","SubnetMax":"10.77.1.0"}`)
	m := w.node(1)
	if _, err := m.spareLease(w.ctx()); err != nil {
		t.Fatal(err)
	}
	spare := m.spare
	w.put("10.77.1.0-24", `{"PublicIP":"192.0.2.9"}`)
	if _, err := m.Acquire(w.ctx()); !errors.Is(err, ErrOutOfSubnets) {
		t.Fatalf("got %v", err)
	}
	if info, err := m.reg.leaseInfo(w.ctx(), spare); err != nil || info.alive {
		t.Errorf("etcd lease left behind: %+v, %v", info, err)
	}
}

func TestPreviousSubnetIsClaimedAgainUnlessTaken(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	own, err := w.node(1, withPrevious("10.77.20.0/24")).Acquire(w.ctx())
	if err != nil || own.Subnet.String() != "10.77.20.0/24" {
		t.Errorf("got %s, %v", own.Subnet, err)
	}
	own, err = w.node(2, withPrevious("10.77.20.0/24")).Acquire(w.ctx())
	if err != nil || own.Subnet.String() == "10.77.20.0/24" {
		t.Errorf("a taken subnet was claimed: %s, %v", own.Subnet, err)
	}
	own, err = w.node(3, withPrevious("10.88.1.0/24")).Acquire(w.ctx())
	if err != nil || !netip.MustParsePrefix("10.77.0.0/16").Contains(own.Subnet.Addr()) {
		t.Errorf("a subnet of another network was claimed: %s, %v", own.Subnet, err)
	}
}

func TestRestartAdoptsKeyAndEtcdLeaseWithoutAWrite(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	first, err := w.node(1).Acquire(w.ctx())
	if err != nil {
		t.Fatal(err)
	}
	again, err := w.node(1).Acquire(w.ctx())
	if err != nil {
		t.Fatal(err)
	}
	if again.Subnet != first.Subnet || again.LeaseID != first.LeaseID || again.ModRevision != first.ModRevision {
		t.Errorf("got %+v, had %+v", again, first)
	}
	if n := len(w.history(subnetKey(first.Subnet))); n != 1 {
		t.Errorf("the key was written %d times", n)
	}
}

func TestRestartWithAnotherAddressKeepsTheSubnet(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	first, err := w.node(1).Acquire(w.ctx())
	if err != nil {
		t.Fatal(err)
	}
	again, err := w.node(1, func(c *ManagerConfig) { c.PublicIP = testIP(99) }).Acquire(w.ctx())
	if err != nil || again.Subnet != first.Subnet || again.LeaseID != first.LeaseID || again.PublicIP != testIP(99) {
		t.Errorf("got %+v, %v, had %+v", again, err, first)
	}
	if kv := w.get(subnetKey(first.Subnet)); kv.Version != 2 || !strings.Contains(string(kv.Value), "192.0.2.99") {
		t.Errorf("the lease is %s", kv)
	}
}

func TestRestartWithAnotherTTLReplacesTheEtcdLease(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	m := w.node(1)
	first, err := m.Acquire(w.ctx())
	if err != nil {
		t.Fatal(err)
	}
	again, err := w.node(1, withTTL(time.Hour)).Acquire(w.ctx())
	if err != nil || again.Subnet != first.Subnet || again.LeaseID == first.LeaseID {
		t.Fatalf("got %+v, %v", again, err)
	}
	if info, err := m.reg.leaseInfo(w.ctx(), first.LeaseID); err != nil || info.alive {
		t.Errorf("the old etcd lease is left: %+v, %v", info, err)
	}
	if info, err := m.reg.leaseInfo(w.ctx(), again.LeaseID); err != nil || info.granted != time.Hour || info.keys != 1 {
		t.Errorf("the new etcd lease is %+v, %v", info, err)
	}
}

func TestLeaseOfFlannelWithOurAddressIsReused(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	id := w.grant(int64(DefaultTTL.Seconds()))
	w.put("10.77.30.0-24", `{"PublicIP":"192.0.2.1","PublicIPv6":null}`, clientv3.WithLease(id))
	w.put("10.77.20.0-24", `{"PublicIP":"192.0.2.2","PublicIPv6":null}`, w.leased(60))
	own, err := w.node(1, withPrevious("10.77.99.0/24")).Acquire(w.ctx())
	if err != nil || own.Subnet.String() != "10.77.30.0/24" || own.LeaseID != int64(id) {
		t.Fatalf("got %+v, %v", own, err)
	}
	if kv := w.get("10.77.30.0-24"); !strings.Contains(string(kv.Value), `"NodeID":"id-1"`) {
		t.Errorf("the lease does not carry our node id: %s", kv.Value)
	}
}

func TestSamePublicIPOnTwoNodesIsRefused(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	first, err := w.node(1).Acquire(w.ctx())
	if err != nil {
		t.Fatal(err)
	}
	second := w.node(2, func(c *ManagerConfig) { c.PublicIP = testIP(1) })
	_, err = second.Acquire(w.ctx())
	var taken *PublicIPTakenError
	if !errors.As(err, &taken) || !errors.Is(err, ErrPublicIPTaken) || taken.Holder.NodeName != "node-1" {
		t.Fatalf("got %v", err)
	}
	for _, want := range []string{"192.0.2.1", `"node-1"`, "id-1", `"node-2"`, "id-2", first.Subnet.String(), "--iface", "--public-ip", "--take-over"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in: %v", want, err)
		}
	}
	if keys := w.keys(); len(keys) != 1 || keys[0].Version != 1 {
		t.Errorf("the refused node wrote: %v", keys)
	}
	// The one who was there restarts undisturbed.
	if again, err := w.node(1).Acquire(w.ctx()); err != nil || again.Subnet != first.Subnet {
		t.Errorf("got %+v, %v", again, err)
	}
}

func TestTwoNodesThatStartTogetherWithOneAddressLeaveOne(t *testing.T) {
	for round := range 5 {
		w := newWorld(t)
		w.config(config16)
		errs := make([]error, 4)
		var wg sync.WaitGroup
		for i := range errs {
			m := w.node(i+1, func(c *ManagerConfig) { c.PublicIP = testIP(50) })
			wg.Go(func() { _, errs[i] = m.Acquire(w.ctx()) })
		}
		wg.Wait()
		held := 0
		for i, err := range errs {
			switch {
			case err == nil:
				held++
			case !errors.Is(err, ErrPublicIPTaken):
				t.Errorf("round %d, node %d: %v", round, i+1, err)
			}
		}
		if keys := w.keys(); held != 1 || len(keys) != 1 {
			t.Errorf("round %d: %d nodes hold a lease, %d keys are left", round, held, len(keys))
		}
	}
}

func TestTakeOverContinuesTheLeaseOfALostState(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	old := w.run(w.node(1))
	lease := old.State().Own
	own, err := w.node(2, func(c *ManagerConfig) { c.PublicIP, c.TakeOver = testIP(1), true }).Acquire(w.ctx())
	if err != nil || own.Subnet != lease.Subnet || own.NodeID != "id-2" || own.LeaseID == lease.LeaseID {
		t.Fatalf("got %+v, %v", own, err)
	}
	// Were the old node alive after all, it would not fight.
	s := old.until("lost", func(s State) bool { return s.OwnStatus == OwnLost })
	if !strings.Contains(s.OwnProblem, `"node-2"`) {
		t.Errorf("problem %q", s.OwnProblem)
	}
	if kv := w.get(subnetKey(lease.Subnet)); kv.Version != 2 || kv.Lease != own.LeaseID {
		t.Errorf("the lease is %v", kv)
	}
}

func TestReservationAssignsASubnetAndStaysWithoutALease(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	w.put("10.77.40.0-24", `{"PublicIP":"192.0.2.1"}`)
	for range 3 {
		m := w.node(1, withTTL(5*time.Second))
		r := w.run(m)
		r.caughtUp(w)
		r.stop()
		if s := r.State(); s.Own.Subnet.String() != "10.77.40.0/24" || !s.Own.Reservation || s.OwnStatus != OwnHeld {
			t.Fatalf("got %+v", s)
		}
		if err := m.Release(w.ctx()); err != nil {
			t.Error(err)
		}
		kv := w.get("10.77.40.0-24")
		if kv == nil || kv.Lease != 0 || kv.Version != 2 {
			t.Fatalf("the reservation is %v", kv)
		}
	}
}

func TestOwnLeaseThatDoesNotFitTheConfigIsReplacedAtStart(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	first, err := w.node(1).Acquire(w.ctx())
	if err != nil {
		t.Fatal(err)
	}
	w.config(`{"Network":"10.88.0.0/16"}`)
	second, err := w.node(1, func(c *ManagerConfig) { c.Previous = first.Subnet }).Acquire(w.ctx())
	if err != nil || !netip.MustParsePrefix("10.88.0.0/16").Contains(second.Subnet.Addr()) {
		t.Fatalf("got %+v, %v", second, err)
	}
	if kv := w.get(subnetKey(first.Subnet)); kv != nil {
		t.Errorf("the old lease is left: %v", kv)
	}
}

func TestReleaseGivesBackOnlyWhatIsOurs(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	m := w.node(1)
	own, err := m.Acquire(w.ctx())
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Release(w.ctx()); err != nil {
		t.Fatal(err)
	}
	if info, err := m.reg.leaseInfo(w.ctx(), own.LeaseID); w.get(subnetKey(own.Subnet)) != nil || err != nil || info.alive {
		t.Errorf("left behind: %v, %+v, %v", w.get(subnetKey(own.Subnet)), info, err)
	}

	m = w.node(1)
	if own, err = m.Acquire(w.ctx()); err != nil {
		t.Fatal(err)
	}
	w.put(subnetKey(own.Subnet), `{"PublicIP":"192.0.2.2"}`, w.leased(60))
	if err := m.Release(w.ctx()); err != nil {
		t.Fatal(err)
	}
	if kv := w.get(subnetKey(own.Subnet)); kv == nil || kv.Version != 2 {
		t.Errorf("the lease of another node is %v", kv)
	}
}

func TestAmbiguousWritesAreReadBack(t *testing.T) {
	// The answer to every n-th message is lost with its connection: the write may
	// have been carried out or not.
	for lost := range 12 {
		t.Run(fmt.Sprint(lost), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.config(config16)
			link := newLink(t, w.endpoint)
			m := w.node(1, func(c *ManagerConfig) { c.Registry = w.registryAt(link.endpoint) })
			if _, err := m.AwaitConfig(w.ctx()); err != nil {
				t.Fatal(err)
			}
			link.cutAfterAnswers(lost)
			own, err := m.Acquire(w.ctx())
			if err != nil {
				t.Fatal(err)
			}
			keys := w.keys()
			if len(keys) != 1 || string(keys[0].Key) != w.prefix+"/subnets/"+subnetKey(own.Subnet) || keys[0].Lease != own.LeaseID {
				t.Errorf("holds %+v, etcd has %v", own, keys)
			}
		})
	}
}

func TestKeyThatChangedSinceTheLookIsNotWritten(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	m := w.node(1)
	own, err := m.Acquire(w.ctx())
	if err != nil {
		t.Fatal(err)
	}
	name := subnetKey(own.Subnet)
	look, err := m.reg.get(w.ctx(), name)
	if err != nil {
		t.Fatal(err)
	}
	rev := w.put(name, `{"PublicIP":"192.0.2.2","Tweed":{"NodeID":"id-2","Name":"node-2"}}`, clientv3.WithLease(clientv3.LeaseID(own.LeaseID)))
	if _, err := m.adopt(w.ctx(), *look, value("192.0.2.1")); !errors.Is(err, errRaced) {
		t.Errorf("adopt: got %v", err)
	}
	m.removeObsolete(w.ctx(), []keyValue{*look})
	look.leaseID, look.value = 0, value("192.0.2.1")
	if err := m.changed(w.ctx(), own, m.ownValue, *look); !errors.Is(err, errRaced) {
		t.Errorf("changed: got %v", err)
	}
	if kv := w.get(name); kv == nil || kv.ModRevision != rev {
		t.Errorf("written: %v", kv)
	}
}

func TestChoosePrefersOwnLeasesInOrder(t *testing.T) {
	cfg := genericConfig(t)
	me := claimant{nodeID: "me", nodeName: "me", publicIP: testIP(1)}
	entry := func(n int, ip, id string, rev int64) keyValue {
		return keyValue{
			name:   fmt.Sprintf("10.77.%d.0-24", n),
			value:  fmt.Appendf(nil, `{"PublicIP":%q,"Tweed":{"NodeID":%q}}`, ip, id),
			create: rev, mod: rev, leaseID: rev,
		}
	}
	const ours, theirs = "192.0.2.1", "192.0.2.2"
	for _, tc := range []struct {
		name     string
		list     []keyValue
		takeOver bool
		want     string // subnet, "new", or "refused"
		obsolete int
	}{
		{name: "nobody", want: "new"},
		{name: "others", list: []keyValue{entry(1, theirs, "you", 1), entry(2, theirs, "", 2)}, want: "new"},
		{name: "our id at another address", list: []keyValue{entry(1, theirs, "me", 1)}, want: "10.77.1.0/24"},
		{name: "our address without an id", list: []keyValue{entry(1, ours, "", 1), entry(2, ours, "", 2)}, want: "10.77.1.0/24", obsolete: 1},
		{name: "our id before our address", list: []keyValue{entry(1, ours, "", 1), entry(2, theirs, "me", 2)}, want: "10.77.2.0/24", obsolete: 1},
		{name: "stranger", list: []keyValue{entry(1, ours, "you", 1)}, want: "refused"},
		{name: "stranger, taken over", list: []keyValue{entry(1, ours, "you", 1)}, takeOver: true, want: "10.77.1.0/24"},
		{name: "stranger who came first", list: []keyValue{entry(1, ours, "you", 1), entry(2, ours, "me", 2)}, want: "refused"},
		{name: "stranger who came later", list: []keyValue{entry(1, ours, "you", 2), entry(2, ours, "me", 1)}, want: "10.77.2.0/24"},
		{name: "two of ours, taken over", list: []keyValue{entry(1, ours, "you", 1), entry(2, ours, "me", 2)}, takeOver: true, want: "10.77.2.0/24", obsolete: 1},
		{name: "ours does not fit", list: []keyValue{{name: "10.77.1.0-25", value: []byte(`{"PublicIP":"192.0.2.1"}`), leaseID: 1}}, want: "new", obsolete: 1},
		{name: "a reservation that does not fit is not ours to delete",
			list: []keyValue{{name: "10.77.1.0-25", value: []byte(`{"PublicIP":"192.0.2.1"}`)}}, want: "new"},
		{name: "broken values are taken", list: []keyValue{{name: "10.77.2.0-24", value: []byte("{")}}, want: "new"},
	} {
		me.takeOver = tc.takeOver
		c, err := choose(cfg, tc.list, me, func(n int) int { return 0 })
		got := c.subnet.String()
		switch {
		case errors.Is(err, ErrPublicIPTaken):
			got = "refused"
		case err != nil:
			got = err.Error()
		case c.now == nil:
			got = "new"
			for _, kv := range tc.list {
				if p, _ := parseSubnetKey(kv.name); p.Overlaps(c.subnet) {
					t.Errorf("%s: the new subnet %s is taken", tc.name, c.subnet)
				}
			}
		}
		if got != tc.want || len(c.obsolete) != tc.obsolete {
			t.Errorf("%s: got %s with %d obsolete, want %s with %d", tc.name, got, len(c.obsolete), tc.want, tc.obsolete)
		}
	}
}

func TestAcquireRefusesWhatItCannotWrite(t *testing.T) {
	w := newWorld(t)
	w.config(config16)
	for _, tc := range []struct {
		change func(*ManagerConfig)
		want   string
	}{
		{func(c *ManagerConfig) { c.NodeID = "" }, "node id is empty"},
		{func(c *ManagerConfig) { c.NodeID = "a\nb" }, "node id"},
		{func(c *ManagerConfig) { c.TTL = time.Millisecond }, "--lease-ttl"},
		{func(c *ManagerConfig) { c.PublicIP = netip.MustParseAddr("127.0.0.1") }, "PublicIP 127.0.0.1"},
		{func(c *ManagerConfig) {
			c.Attrs = func(NetworkConfig) Attrs { return Attrs{BackendType: BackendVXLAN} }
		}, "VtepMAC"},
	} {
		if _, err := w.node(1, tc.change).Acquire(w.ctx()); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("got %v, want %s", err, tc.want)
		}
	}
	own, err := w.node(1, func(c *ManagerConfig) { c.NodeName = "n\x1bö" + strings.Repeat("x", 300) }).Acquire(w.ctx())
	if err != nil || !strings.HasPrefix(own.NodeName, "n??x") || len(own.NodeName) != maxNodeNameLen {
		t.Errorf("got %q, %v", own.NodeName, err)
	}
	if keys := w.keys(); len(keys) != 1 {
		t.Errorf("%d keys", len(keys))
	}
}

func TestAcquireEndsWithItsContext(t *testing.T) {
	w := newWorldAt(t, "http://127.0.0.1:1")
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	if _, err := w.node(1).Acquire(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}
