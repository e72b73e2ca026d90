package engine

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"tweed/encap"
	"tweed/engine/table"
	"tweed/netns"
	"tweed/tun"
	"tweed/tun/tuntest"
)

// TestMain gives the tests a network namespace of their own kind where it can,
// and sees that no goroutine stays behind.
func TestMain(m *testing.M) {
	if done, status, err := netns.Elevate(); done && err == nil {
		os.Exit(status)
	}
	goleak.VerifyTestMain(m)
}

const testMTU = 1426

var (
	ourAddr   = netip.MustParseAddr("127.0.0.1")
	ourSubnet = netip.MustParsePrefix("10.1.1.0/24")
	ourMAC    = table.MAC{2, 0, 0, 0, 1, 1}
)

// The peers live on other loopback addresses. Their names say what they are.
const (
	udpPeer    = iota // udp framing
	vxlanPeer         // vxlan framing
	udpTweed          // udp framing, completes inner checksums itself
	vxlanTweed        // vxlan framing, completes inner checksums itself
	narrowPeer        // udp framing, a way of 1000 bytes
	numPeers
	stranger // holds no lease
)

func peerAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, byte(10 + i)}) }

// inside returns address n of peer i's subnet, or of ours for i == -1.
func inside(i, n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 1, byte(2 + i), byte(n)}) }

func peerMAC(i int) table.MAC { return table.MAC{2, 0, 0, 0, 2, byte(i)} }

// harness is an engine whose threads do not run: the test moves every packet.
// The host and the peers are socket pairs and loopback sockets.
type harness struct {
	t    testing.TB
	e    *Engine
	tx   *txWorker
	host int // the host's end of the TUN
	// shared gives ports shared memory.
	shared bool
	queue  *tun.Queue
	peers  [stranger + 1]*encap.Socket
	ns     *netns.Namespace
	read   *encap.RecvBatch
	snap   Snapshot
	seen   Stats
}

func newHarness(t testing.TB) *harness { return newHarnessAt(t, tun.OffloadFull) }

func newHarnessAt(t testing.TB, rung tun.Offload) *harness {
	t.Helper()
	h := &harness{t: t}
	// An own namespace has no routes: what leads out of it is unreachable.
	err := h.inNamespace(func() (err error) {
		h.e, err = New(Config{Offload: rung, MTU: testMTU, Source: ourAddr, Listen: []Listen{
			{encap.FramingUDP, netip.AddrPortFrom(ourAddr, 0)}, {encap.FramingVXLAN, netip.AddrPortFrom(ourAddr, 0)},
		}})
		if err != nil {
			return err
		}
		for i := range h.peers {
			cfg := encap.SocketConfig{Addr: netip.AddrPortFrom(peerAddr(i), 0)}
			if h.peers[i], err = encap.Listen(cfg); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	h.queue, h.host = pairQueue(t, rung)
	h.tx = h.e.tx[0]
	h.tx.source = deviceSource{h.queue}
	for _, w := range h.e.rx {
		w.queue = h.queue
	}
	if h.read, err = encap.NewRecvBatch(); err != nil {
		t.Fatal(err)
	}
	h.snap = Snapshot{Revision: 1, Local: table.Local{Subnet: ourSubnet, Addr: inside(-1, 0), MAC: ourMAC, VNI: 7}}
	for i := range numPeers {
		h.snap.Peers = append(h.snap.Peers, h.peer(i))
	}
	h.apply()
	t.Cleanup(h.close)
	return h
}

func (h *harness) inNamespace(f func() error) error {
	if netns.CheckPrivileges() != nil {
		return f()
	}
	if h.ns == nil {
		ns, err := netns.New()
		if err != nil {
			return err
		}
		h.t.Cleanup(func() { ns.Close() })
		h.ns = ns
	}
	return h.ns.Do(f)
}

// segmenting returns a socket of peer i that sends equal datagrams as one message.
func (h *harness) segmenting(i int) *encap.Socket {
	h.t.Helper()
	var s *encap.Socket
	if err := h.inNamespace(func() (err error) {
		s, err = encap.Listen(encap.SocketConfig{Addr: netip.AddrPortFrom(peerAddr(i), 0), Offload: true})
		return err
	}); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { s.Close() })
	return s
}

func (h *harness) peer(i int) table.Peer {
	at, err := h.peers[i].LocalAddr()
	if err != nil {
		h.t.Fatal(err)
	}
	p := table.Peer{Subnet: netip.PrefixFrom(inside(i, 0), 24), Endpoint: at, VNI: 7, MAC: peerMAC(i), NodeID: fmt.Sprint(i)}
	switch i {
	case vxlanPeer:
		p.Framing = encap.FramingVXLAN
	case vxlanTweed:
		p.Framing, p.PartialChecksums = encap.FramingVXLAN, true
	case udpTweed:
		p.PartialChecksums = true
	case narrowPeer:
		p.MTU = 1000
	}
	return p
}

func (h *harness) apply() {
	h.t.Helper()
	if err := h.e.Apply(h.snap); err != nil {
		h.t.Fatal(err)
	}
}

func (h *harness) close() {
	h.ledger()
	if err := h.e.Close(); err != nil {
		h.t.Error(err)
	}
	for _, s := range h.peers {
		s.Close()
	}
	h.read.Free()
	h.queue.Close()
}

// pairQueue returns a queue, which the caller or an engine closes, and the
// descriptor of its other end.
func pairQueue(t testing.TB, rung tun.Offload) (*tun.Queue, int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 8<<20) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 8<<20)
		}
	}
	q, err := tun.QueueFromFD(fds[0], tun.FDConfig{Offload: rung})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[1]) })
	return q, fds[1]
}

// ledger checks the equation in both directions, worker by worker.
func (h *harness) ledger() {
	h.t.Helper()
	check := func(name string, d Direction) {
		if d.Packets != d.Delivered+d.Dropped() {
			h.t.Errorf("%s ledger: %d packets, %d delivered + %d dropped: %v", name, d.Packets, d.Delivered, d.Dropped(), d.Drops)
		}
	}
	for _, w := range h.e.tx {
		check("transmit", w.ledger.read())
	}
	for _, w := range h.e.rx {
		check("receive "+w.framing.String(), w.ledger.read())
	}
}

// change returns what the counters grew by since the last call.
func (h *harness) change() Stats {
	h.t.Helper()
	h.ledger()
	now, old := h.e.Stats(), h.seen
	h.seen = now
	sub := func(d *Direction, x *Direction) {
		d.Packets -= x.Packets
		d.Bytes -= x.Bytes
		d.Delivered -= x.Delivered
		d.DeliveredBytes -= x.DeliveredBytes
		for r := range d.Drops {
			d.Drops[r] -= x.Drops[r]
		}
	}
	sub(&now.Tx, &old.Tx)
	sub(&now.Rx, &old.Rx)
	now.RxBatches -= old.RxBatches
	now.ICMPSent -= old.ICMPSent
	now.ICMPLimited -= old.ICMPLimited
	return now
}

// drops is what Drops looks like after n packets were dropped for one reason.
func drops(r Reason, n uint64) (d [NumReasons]uint64) {
	d[r] = n
	return d
}

// plain is a packet as the host hands it over, complete.
func plain(p tuntest.Packet) []byte { return tuntest.Virtio{}.Prepend(p.Bytes()) }

// send puts what the host writes into the TUN and lets the engine send it.
func (h *harness) send(raw ...[]byte) {
	h.t.Helper()
	for _, r := range raw {
		if _, err := unix.Write(h.host, r); err != nil {
			h.t.Fatal(err)
		}
	}
	h.serve()
}

func (h *harness) serve() {
	h.t.Helper()
	for {
		n, err := h.tx.serve()
		if err != nil {
			h.t.Fatal(err)
		}
		if n == 0 {
			return
		}
	}
}

// arrival is a datagram at a peer.
type arrival struct {
	data string
	tos  uint8
	port uint16 // of the sender
}

// arrived returns what has come to a peer.
func (h *harness) arrived(i int) (out []arrival) {
	h.t.Helper()
	for {
		n, err := h.peers[i].TryRecv(h.read)
		if err != nil {
			h.t.Fatal(err)
		}
		if n == 0 {
			return out
		}
		for k := range n {
			m := h.read.Message(k)
			out = append(out, arrival{string(m.Data), m.TOS, m.SourcePort})
		}
	}
}

// inner takes the prefix off what has come to a peer.
func (h *harness) inner(i int) (out [][]byte) {
	h.t.Helper()
	for _, a := range h.arrived(i) {
		b := []byte(a.data)
		if h.snap.Peers[i].Framing == encap.FramingVXLAN {
			r := encap.NewVXLANReceiver(7, peerMAC(i))
			if v := r.Check(b); v != encap.OK || table.MAC(b[14:20]) != ourMAC {
				h.t.Fatalf("prefix of a datagram to peer %d: verdict %d, source %x", i, v, b[14:20])
			}
			b = b[encap.MaxPrefixLen:]
		}
		out = append(out, b)
	}
	return out
}

// written returns what the host has read from the TUN, virtio header first.
func (h *harness) written() (out [][]byte) { return readAll(h.t, h.host) }

func readAll(t testing.TB, fd int) (out [][]byte) {
	t.Helper()
	buf := make([]byte, 70000)
	for {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EAGAIN) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, slices.Clone(buf[:n]))
	}
}

// delivered returns the packets the host's kernel makes of what was written.
func (h *harness) delivered() (out [][]byte) {
	h.t.Helper()
	for _, raw := range h.written() {
		pkts, err := tuntest.Split(raw)
		if err != nil {
			h.t.Error(err)
		}
		out = append(out, pkts...)
	}
	return out
}

// quiet checks that nothing reached the TUN and no peer.
func (h *harness) quiet() {
	h.t.Helper()
	if w := h.written(); len(w) > 0 {
		h.t.Errorf("%d packets reached the TUN, the first: % x", len(w), w[0][:min(len(w[0]), 60)])
	}
	for i := range h.peers {
		if a := h.arrived(i); len(a) > 0 {
			h.t.Errorf("%d datagrams reached peer %d", len(a), i)
		}
	}
}

func (h *harness) worker(f encap.Framing) *rxWorker {
	for _, w := range h.e.rx {
		if w.framing == f {
			return w
		}
	}
	return nil
}

// transmit sends datagrams from a peer to our socket of a framing, each with
// the type of service, and lets the engine receive them. On a segmenting socket
// equal datagrams become one message.
func (h *harness) transmit(from *encap.Socket, f encap.Framing, tos uint8, datagrams ...[]byte) {
	h.t.Helper()
	w := h.worker(f)
	at, err := w.sock.LocalAddr()
	if err != nil {
		h.t.Fatal(err)
	}
	b, dst := encap.NewSendBatch(), encap.NewDest(at)
	b.Reset(from)
	var res encap.SendResult
	for _, d := range datagrams {
		if !b.Add(dst, tos, 0, d, nil) {
			from.Send(b, &res)
			b.Add(dst, tos, 0, d, nil)
		}
	}
	if from.Send(b, &res); res.Sent.Segments != uint64(len(datagrams)) {
		h.t.Fatalf("%d of %d datagrams sent: %+v", res.Sent.Segments, len(datagrams), res)
	}
	h.receive(w)
}

func (h *harness) receive(w *rxWorker) {
	h.t.Helper()
	for {
		n, err := w.sock.TryRecv(w.batch)
		if err != nil {
			h.t.Fatal(err)
		}
		if n == 0 {
			return
		}
		w.round(n)
	}
}

// framed puts the prefix a peer uses before a packet to us.
func framed(f encap.Framing, peer int, pkt []byte) []byte {
	if f == encap.FramingUDP {
		return pkt
	}
	b := make([]byte, encap.MaxPrefixLen, encap.MaxPrefixLen+len(pkt))
	encap.PutVXLANPrefix(b, 7, ourMAC, peerMAC(peer))
	return append(b, pkt...)
}

// from is a packet from a container of peer i to one of ours.
func from(i int, p tuntest.Packet) tuntest.Packet {
	if !p.Src.IsValid() {
		p.Src = inside(i, 5)
	}
	if !p.Dst.IsValid() {
		p.Dst = inside(-1, 9)
	}
	return p
}

// to is a packet from a container of ours to one of peer i.
func to(i int, p tuntest.Packet) tuntest.Packet {
	if !p.Src.IsValid() {
		p.Src = inside(-1, 9)
	}
	if !p.Dst.IsValid() {
		p.Dst = inside(i, 5)
	}
	return p
}

type tablePeer = table.Peer
