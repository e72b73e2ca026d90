package lease

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func value(ip string) []byte { return fmt.Appendf(nil, `{"PublicIP":%q,"PublicIPv6":null}`, ip) }

var testPolicy = policy{
	network:  netip.MustParsePrefix("10.77.0.0/16"),
	own:      netip.MustParsePrefix("10.77.1.0/24"),
	publicIP: testIP(1),
	nodeID:   "id-1",
}

func subnets(leases []Lease) []string {
	var out []string
	for _, l := range leases {
		out = append(out, l.Subnet.String())
	}
	return out
}

func TestPeersLeaveOutWhatCannotBeReached(t *testing.T) {
	table := newLeaseTable()
	for i, kv := range []struct{ name, value string }{
		{"10.77.1.0-24", `{"PublicIP":"192.0.2.1"}`}, // our own
		{"10.77.2.0-24", `{"PublicIP":"192.0.2.2"}`},
		{"10.77.3.0-24", `{"PublicIP":"10.77.3.1"}`},                            // inside the overlay
		{"10.77.4.0-24", `{"PublicIP":"192.0.2.1"}`},                            // our own address
		{"10.77.5.0-24", `{"PublicIP":"192.0.2.5","Tweed":{"NodeID":"id-1"}}`},  // our own node id
		{"10.78.1.0-24", `{"PublicIP":"192.0.2.6"}`},                            // outside the network
		{"10.77.0.0-16", `{"PublicIP":"192.0.2.7"}`},                            // the whole network
		{"10.77.1.128-25", `{"PublicIP":"192.0.2.8"}`},                          // inside our subnet
		{"10.77.2.0-25", `{"PublicIP":"192.0.2.9"}`},                            // inside an older lease
		{"10.77.16.0-20", `{"PublicIP":"192.0.2.10"}`},                          // another size
		{"10.77.17.0-24", `{"PublicIP":"192.0.2.11"}`},                          // inside an older lease
		{"10.77.6.0-24", `{"PublicIP":"192.0.2.12","BackendType":"wireguard"}`}, // for the node to judge
	} {
		table.put(keyValue{name: kv.name, value: []byte(kv.value), create: int64(i + 1), mod: int64(i + 1), leaseID: 9})
	}
	peers, ignored := table.peers(testPolicy)
	if got, want := subnets(peers), []string{"10.77.2.0/24", "10.77.6.0/24", "10.77.16.0/20"}; !slices.Equal(got, want) {
		t.Errorf("peers %v, want %v", got, want)
	}
	var names []string
	for _, i := range ignored {
		names = append(names, i.Key)
	}
	want := []string{"10.77.0.0-16", "10.77.1.128-25", "10.77.17.0-24", "10.77.2.0-25", "10.77.3.0-24", "10.77.4.0-24", "10.77.5.0-24", "10.78.1.0-24"}
	if !slices.Equal(names, want) {
		t.Errorf("ignored %v\nwant    %v", names, want)
	}
}

func TestOverlapIsDecidedByCreationNotByArrival(t *testing.T) {
	for _, order := range [][]int{{0, 1}, {1, 0}} {
		table := newLeaseTable()
		kvs := []keyValue{
			{name: "10.77.8.0-22", value: value("192.0.2.8"), create: 5, mod: 50},
			{name: "10.77.9.0-24", value: value("192.0.2.9"), create: 6, mod: 6},
		}
		for _, i := range order {
			table.put(kvs[i])
		}
		if peers, _ := table.peers(testPolicy); len(peers) != 1 || peers[0].Subnet.Bits() != 22 {
			t.Errorf("order %v: got %v", order, subnets(peers))
		}
	}
}

func TestUnparsableValueKeepsTheLastGoodOneOfThatKey(t *testing.T) {
	table := newLeaseTable()
	table.put(keyValue{name: "10.77.2.0-24", value: value("192.0.2.2"), create: 1, mod: 1})
	if f, found, _ := table.put(keyValue{name: "10.77.2.0-24", value: []byte("{"), create: 1, mod: 2}); !found || f.badKey || f.Revision != 2 {
		t.Errorf("finding %+v, %t", f, found)
	}
	if peers, ignored := table.peers(testPolicy); len(peers) != 1 || peers[0].ModRevision != 1 || len(ignored) != 1 {
		t.Errorf("peers %v, ignored %v", peers, ignored)
	}
	if _, found, _ := table.put(keyValue{name: "10.77.2.0-24", value: []byte("{"), create: 1, mod: 2}); found {
		t.Error("the same revision was found twice")
	}
	// Deleted and created again in between: the old value is another node's.
	table.put(keyValue{name: "10.77.2.0-24", value: []byte("{"), create: 3, mod: 3})
	if peers, _ := table.peers(testPolicy); len(peers) != 0 {
		t.Errorf("the value of a deleted lease is still used: %v", peers)
	}
	table.put(keyValue{name: "10.77.2.0-24", value: value("192.0.2.3"), create: 3, mod: 4})
	if peers, ignored := table.peers(testPolicy); len(peers) != 1 || peers[0].PublicIP != testIP(3) || len(ignored) != 0 {
		t.Errorf("peers %v, ignored %v", peers, ignored)
	}
}

// model is etcd: the keys as they are, and everything that happened to them.
type model struct {
	rev  int64
	keys map[string]keyValue
	log  []change
}

type change struct {
	kv      keyValue // mod is the revision of the change
	deleted bool
}

func (m *model) list() []keyValue {
	return slices.SortedFunc(maps.Values(m.keys), func(a, b keyValue) int { return cmp.Compare(a.name, b.name) })
}

func (m *model) step(t *rapid.T) {
	names := []string{"10.77.1.0-24", "10.77.2.0-24", "10.77.3.0-24", "10.77.2.0-23", "10.77.0.0-20", "10.99.0.0-24", "junk"}
	name := rapid.SampledFrom(names).Draw(t, "key")
	m.rev++
	if _, ok := m.keys[name]; ok && rapid.Bool().Draw(t, "delete") {
		delete(m.keys, name)
		m.log = append(m.log, change{kv: keyValue{name: name, mod: m.rev}, deleted: true})
		return
	}
	kv := keyValue{name: name, create: m.rev, mod: m.rev, leaseID: rapid.Int64Range(0, 2).Draw(t, "lease")}
	if old, ok := m.keys[name]; ok {
		kv.create = old.create
	}
	kv.value = value(testIP(rapid.IntRange(1, 9).Draw(t, "ip")).String())
	m.keys[name] = kv
	m.log = append(m.log, change{kv: kv})
}

func (t *leaseTable) follow(log []change) {
	for _, c := range log {
		if c.kv.mod <= t.rev {
			continue
		}
		t.rev = c.kv.mod
		if c.deleted {
			t.del(c.kv.name)
		} else {
			t.put(c.kv)
		}
	}
}

// However changes arrive, one by one, twice, or as a list in between, the table
// shows what a fresh reader would see, and beside that only what is held.
func TestTableIsExactWhateverWayChangesArrive(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &model{keys: make(map[string]keyValue)}
		table := newLeaseTable()
		for range rapid.IntRange(1, 30).Draw(t, "rounds") {
			from := len(m.log)
			for range rapid.IntRange(0, 4).Draw(t, "changes") {
				m.step(t)
			}
			switch rapid.IntRange(0, 2).Draw(t, "how") {
			case 0:
				table.follow(m.log[from:])
			case 1: // an etcd that repeats itself
				table.follow(m.log)
			case 2:
				table.replace(m.list(), m.rev, false)
			}
			table.rev = m.rev
			fresh := newLeaseTable()
			fresh.replace(m.list(), m.rev, false)
			table.holdUntil(time.Unix(1e9, 0))
			if rapid.Bool().Draw(t, "time passes") {
				table.release(time.Unix(1e9, 0))
			}
			all, gotIgnored := table.peers(testPolicy)
			gotPeers := exact(all)
			wantPeers, wantIgnored := fresh.peers(testPolicy)
			if !reflect.DeepEqual(gotPeers, wantPeers) || !reflect.DeepEqual(gotIgnored, wantIgnored) {
				t.Fatalf("got  %v %v\nwant %v %v", gotPeers, gotIgnored, wantPeers, wantIgnored)
			}
			if n := table.diff(m.list(), m.rev, nil); n != 0 {
				t.Fatalf("anti-entropy finds %d differences in an exact table", n)
			}
			if _, changed := table.replace(m.list(), m.rev, false); changed {
				t.Fatal("the same list again is a change")
			}
			checkPeers(t, all)
		}
	})
}

// exact leaves out the leases that are held, whose addresses nobody else may have.
func exact(peers []Lease) []Lease {
	in := slices.DeleteFunc(slices.Clone(peers), func(l Lease) bool { return !l.HeldUntil.IsZero() })
	for _, l := range peers {
		if !l.HeldUntil.IsZero() && slices.ContainsFunc(in, func(o Lease) bool { return o.PublicIP == l.PublicIP }) {
			panic(fmt.Sprintf("%+v is held although its address has another subnet", l))
		}
	}
	return in
}

func checkPeers(t *rapid.T, peers []Lease) {
	for i, l := range peers {
		if l.Subnet.Overlaps(testPolicy.own) || !testPolicy.network.Overlaps(l.Subnet) || l.PublicIP == testPolicy.publicIP {
			t.Fatalf("%+v must not be a peer", l)
		}
		if i > 0 && peers[i-1].Subnet.Overlaps(l.Subnet) {
			t.Fatalf("%s and %s overlap", peers[i-1].Subnet, l.Subnet)
		}
	}
}

func TestAntiEntropyFindsWhatTheWatchMissed(t *testing.T) {
	table := newLeaseTable()
	old := []keyValue{
		{name: "10.77.2.0-24", value: value("192.0.2.2"), create: 1, mod: 1},
		{name: "10.77.3.0-24", value: value("192.0.2.3"), create: 2, mod: 2},
	}
	table.replace(old, 2, false)
	list := []keyValue{
		{name: "10.77.2.0-24", value: value("192.0.2.4"), create: 1, mod: 3}, // changed
		{name: "10.77.5.0-24", value: value("192.0.2.5"), create: 4, mod: 4}, // created
	} // and 10.77.3.0-24 deleted
	if n := table.diff(list, 5, nil); n != 3 {
		t.Errorf("found %d of 3 differences", n)
	}
	// What happened after the list is no difference.
	table.replace(list, 5, false)
	table.put(keyValue{name: "10.77.6.0-24", value: value("192.0.2.6"), create: 6, mod: 6})
	table.put(keyValue{name: "10.77.2.0-24", value: value("192.0.2.7"), create: 1, mod: 7})
	table.del("10.77.5.0-24")
	if n := table.diff(list, 5, map[string]bool{"10.77.5.0-24": true}); n != 0 {
		t.Errorf("found %d differences in later changes", n)
	}
}
