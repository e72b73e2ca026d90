package netstack_test

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"tweed/inproc"
	"tweed/netstack"
	"tweed/node"
)

// patience bounds everything that is waited for.
const patience = 60 * time.Second

// engine is one node and its context.
func engine(t testing.TB) (context.Context, *inproc.Node) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	network, err := inproc.NewNetwork(inproc.NetworkConfig{MTU: "1426"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { network.Close() })
	n, err := network.Start(ctx, "n1")
	if err != nil {
		t.Fatal(err)
	}
	return ctx, n
}

// connected are the two ends of a TCP connection from a to b.
func connected(ctx context.Context, t testing.TB, a, b *netstack.Net) (from, to net.Conn) {
	t.Helper()
	l, err := b.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	from, err = a.Dial(ctx, "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { from.Close() })
	to, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { to.Close() })
	deadline, _ := ctx.Deadline()
	for _, c := range []net.Conn{from, to} {
		if err := c.SetDeadline(deadline); err != nil {
			t.Fatal(err)
		}
	}
	return from, to
}

func attach(ctx context.Context, t testing.TB, n *inproc.Node, name string) *netstack.Net {
	t.Helper()
	s, err := netstack.New(ctx, netstack.Config{Engine: n.Node, Name: name})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// stream sends n bytes and compares what arrives.
func stream(t testing.TB, from, to net.Conn, n int) {
	t.Helper()
	data := make([]byte, n)
	rand.NewChaCha8([32]byte{}).Read(data)
	go func() {
		from.Write(data)
		from.(interface{ CloseWrite() error }).CloseWrite()
	}()
	h := sha256.New()
	if got, err := io.Copy(h, to); err != nil || got != int64(len(data)) {
		t.Fatalf("%d bytes of %d arrived: %v", got, len(data), err)
	}
	if [32]byte(h.Sum(nil)) != sha256.Sum256(data) {
		t.Error("what arrived is not what was sent")
	}
}

func TestStreamsBetweenProgramsOfOneEngineArriveWhole(t *testing.T) {
	ctx, n := engine(t)
	b := attach(ctx, t, n, "b")
	for _, a := range n.Node.Status().Attachments {
		if !a.SharedMemory {
			t.Errorf("%s: its packets go through a socket", a.Name)
		}
		if a.Offload != "tso" || a.GSOMaxSize <= a.MTU {
			t.Errorf("%s: offload %s, super-packets of %d bytes, MTU %d", a.Name, a.Offload, a.GSOMaxSize, a.MTU)
		}
	}
	from, to := connected(ctx, t, n.Net, b)
	stream(t, from, to, 64<<20)
	if l := n.Node.Status().Ledger.Tx; l.Packets == 0 || l.Packets != l.Delivered+l.Dropped {
		t.Errorf("the ledger does not add up: %+v", l)
	}
}

// cable is an engine that only connects two programs with each other, and looks
// at what they send.
type cable struct {
	t   *testing.T
	gso int
	// loses is one of how many messages gets lost, 0 for none.
	loses int

	mu     sync.Mutex
	conns  []*net.UnixConn
	most   int // the longest message, in bytes
	supers int
}

const (
	cableMTU  = 1500
	headerLen = 10 // struct virtio_net_hdr
)

func (c *cable) Attach(ctx context.Context, r node.AttachRequest) (node.AttachmentStatus, error) {
	if !r.SuperPackets {
		c.t.Error("the program did not say that it takes super-packets")
	}
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Net: "unixpacket", Name: r.Socket})
	if err != nil {
		return node.AttachmentStatus{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conns = append(c.conns, conn)
	if len(c.conns) == 2 {
		go c.carry(c.conns[0], c.conns[1])
		go c.carry(c.conns[1], c.conns[0])
	}
	return node.AttachmentStatus{
		Name: r.Name, Addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(len(c.conns))}),
		Network: netip.MustParsePrefix("10.0.0.0/24"), MTU: cableMTU, GSOMaxSize: c.gso,
	}, nil
}

func (c *cable) Detach(context.Context, string) error { return nil }

func (c *cable) carry(from, to *net.UnixConn) {
	defer to.Close()
	buf := make([]byte, headerLen+65535)
	for i := 1; ; i++ {
		n, err := from.Read(buf)
		if err != nil || n == 0 {
			return
		}
		c.look(buf[:n])
		if c.loses != 0 && i%c.loses == 0 {
			continue
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// look checks the header against the packet.
func (c *cable) look(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.most = max(c.most, len(b)-headerLen)
	super := b[1] == 1 // VIRTIO_NET_HDR_GSO_TCPV4
	if !super {
		if len(b)-headerLen > cableMTU {
			c.t.Errorf("a packet of %d bytes is no super-packet", len(b)-headerLen)
		}
		return
	}
	c.supers++
	size := int(binary.NativeEndian.Uint16(b[4:]))
	headers := int(binary.NativeEndian.Uint16(b[2:]))
	if b[0]&1 == 0 || size+headers > cableMTU || headers < 40 || len(b)-headerLen <= headers+size {
		c.t.Errorf("a super-packet of %d bytes: flags %d, %d bytes of headers, segments of %d", len(b)-headerLen, b[0], headers, size)
	}
}

func TestSuperPacketsAreSentToAnEngineThatTakesThem(t *testing.T) {
	for name, c := range map[string]*cable{
		"full size": {gso: 65536 - 1}, "small": {gso: 16 << 10}, "none": {}, "with losses": {gso: 65536 - 1, loses: 100},
	} {
		t.Run(name, func(t *testing.T) {
			c.t = t
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			var ends []*netstack.Net
			for range 2 {
				n, err := netstack.New(ctx, netstack.Config{Engine: c})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { n.Close() })
				ends = append(ends, n)
			}
			from, to := connected(ctx, t, ends[0], ends[1])
			stream(t, from, to, 8<<20)
			c.mu.Lock()
			defer c.mu.Unlock()
			if most := max(c.gso, cableMTU); c.most > most || (c.supers > 0) != (c.gso > 0) || c.most < most/2 {
				t.Errorf("%d super-packets, the longest packet is of %d bytes: want up to %d", c.supers, c.most, most)
			}
		})
	}
}

func TestPingGetsAnAnswerWithItsPayload(t *testing.T) {
	c := &cable{t: t}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	a, err := netstack.New(ctx, netstack.Config{Engine: c})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := netstack.New(ctx, netstack.Config{Engine: c})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	for _, size := range []int{0, 56, cableMTU - 28} {
		if rtt, err := a.Ping(ctx, b.Addr(), size); err != nil || rtt <= 0 {
			t.Errorf("%d bytes: %v, %v", size, rtt, err)
		}
	}
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if _, err := a.Ping(short, netip.MustParseAddr("10.0.0.99"), 56); err == nil {
		t.Error("an address that nobody has answered")
	}
}
