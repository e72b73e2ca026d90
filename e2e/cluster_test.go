package e2e

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"tweed/node"
)

// member is one of an etcd of several.
type member struct {
	*process
	name, client string
	argv         []string
}

// newCluster builds an underlay of n nodes with an etcd of three members, each
// the etcd of the distribution.
func newCluster(t *testing.T, n int) (*world, []*member) {
	t.Helper()
	needTool(t, "etcd")
	w := newUnderlay(t, n)
	var all []string
	members := make([]*member, 3)
	for i := range members {
		members[i] = &member{name: fmt.Sprintf("m%d", i), client: fmt.Sprintf("http://%s:%d", w.lan.Gateway, 2379+10*i)}
		all = append(all, fmt.Sprintf("m%d=http://%s:%d", i, w.lan.Gateway, 2380+10*i))
	}
	for i, m := range members {
		peer := strings.TrimPrefix(all[i], m.name+"=")
		m.argv = []string{"etcd", "--name", m.name, "--data-dir", filepath.Join(w.dir, m.name),
			"--listen-client-urls", m.client, "--advertise-client-urls", m.client,
			"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
			"--initial-cluster", strings.Join(all, ","), "--initial-cluster-state", "new",
			"--heartbeat-interval", "100", "--election-timeout", "1000", "--logger", "zap", "--log-level", "error"}
		m.process = w.launch(w.lan.Switch, m.name, m.argv...)
	}
	client, err := clientv3.New(clientv3.Config{
		Endpoints: endpointsOf(members), Logger: zap.NewNop(),
		// etcd can be reached from inside the underlay only.
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, addr string) (c net.Conn, err error) {
			err = w.lan.Switch.Do(func() error {
				var d net.Dialer
				c, err = d.DialContext(ctx, "tcp4", addr)
				return err
			})
			return c, err
		})},
	})
	if err != nil {
		t.Fatal(err)
	}
	w.client = client
	t.Cleanup(func() { client.Close() })
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		for _, m := range members {
			if s := w.memberStatus(m); s != nil {
				t.Logf("%s: revision %d, term %d, raft index %d, applied %d, leader %x", m.name,
					s.Header.Revision, s.RaftTerm, s.RaftIndex, s.RaftAppliedIndex, s.Leader)
			}
		}
	})
	for _, m := range members {
		w.awaitMember(m)
	}
	return w, members
}

func endpointsOf(members []*member) []string {
	var all []string
	for _, m := range members {
		all = append(all, m.client)
	}
	return all
}

// awaitMember waits until a member takes part, with a leader.
func (w *world) awaitMember(m *member) {
	w.t.Helper()
	w.await(m.name+" has a leader", func() bool {
		s := w.memberStatus(m)
		return s != nil && s.Leader != 0
	})
}

// leads reports whether the member is the leader.
func (w *world) leads(m *member) bool {
	s := w.memberStatus(m)
	return s != nil && s.Leader == s.Header.MemberId
}

// memberStatus is what the member says, nil if it does not answer.
func (w *world) memberStatus(m *member) *clientv3.StatusResponse {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second) // asked at the end of a test, too
	defer cancel()
	s, err := w.client.Status(ctx, m.client)
	if err != nil {
		return nil
	}
	return s
}

// write puts a key, by whichever member answers, as often as it takes while the
// members choose a leader.
func (w *world) write(key, value string) {
	w.t.Helper()
	w.await("etcd takes "+key, func() bool {
		ctx, cancel := context.WithTimeout(w.t.Context(), time.Second)
		defer cancel()
		_, err := w.client.Put(ctx, key, value)
		return err == nil
	})
}

// TestEtcdOfThreeLosesMembers, one after the other and the leader first, so that
// each node loses the one it is connected to: killed, and then frozen
// with its connections open. Nothing is lost, no lease is claimed again, and
// every change arrives through those that are left.
func TestEtcdOfThreeLosesMembers(t *testing.T) {
	w, members := newCluster(t, 2)
	w.write(prefix+"/config", vxlanConfig)
	flags := []string{"--etcd-endpoints", strings.Join(endpointsOf(members), ","), "--lease-ttl", "1m"}
	a, b := w.up(0, flags...), w.up(1, flags...)
	awaitPeers(1, a, b)
	own := map[*daemon]int64{a: w.created(leaseKey(a)), b: w.created(leaseKey(b))}
	s := stream(t, a.host(), b.host())
	const foreign = prefix + "/subnets/10.244.200.0-24"
	change := func(i int) {
		t.Helper()
		ip := netip.AddrFrom4([4]byte{192, 0, 2, byte(200 + i)}).String()
		mac := fmt.Sprintf("02:00:00:00:00:%02x", i+1)
		w.write(foreign, vxlanLease(ip, mac))
		for _, e := range []*daemon{a, b} {
			awaitPeer(e, "10.244.200.0/24", ip+":8472", mac)
		}
	}
	w.await("a leader", func() bool {
		i := slices.IndexFunc(members, w.leads)
		if i > 0 { // it goes first
			members[0], members[i] = members[i], members[0]
		}
		return i >= 0
	})
	for i, m := range members {
		m.end(unix.SIGKILL)
		change(2 * i)
		m.process = w.launch(w.lan.Switch, m.name, m.argv...)
		w.awaitMember(m)
	}
	for i, m := range members {
		m.signal(unix.SIGSTOP)
		change(2*i + 1)
		m.signal(unix.SIGCONT)
		w.awaitMember(m)
	}
	awaitFlow(w, s, 500)
	assertClean(t, s)
	assertNoDrops(t, a, b)
	for e, created := range own {
		st := e.await("connected", func(s node.Status) bool { return s.Etcd.Connected && s.Etcd.Synced && s.Lease.State == "held" })
		if now := w.created(leaseKey(e)); now != created || st.Counters.LeaseRetaken != 0 {
			t.Errorf("%s: the lease was claimed again: created at revision %d, was %d", e.name, now, created)
		}
	}
}

// created is the revision at which a key was created.
func (w *world) created(key string) int64 {
	w.t.Helper()
	r, err := w.client.Get(w.ctx(), key)
	if err != nil || len(r.Kvs) != 1 {
		w.t.Fatalf("%s: %v, %d keys", key, err, len(r.Kvs))
	}
	return r.Kvs[0].CreateRevision
}
