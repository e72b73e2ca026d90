package accel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"tweed/encap"
	"tweed/engine"
	"tweed/engine/table"
	"tweed/netns"
	"tweed/tun"
	"tweed/tun/tuntest"
)

const patience = 20 * time.Second

// bench is a node with a TUN device whose queue nobody serves but the test, and
// the far end of its underlay.
type bench struct {
	t          *testing.T
	a          *Accelerator
	queue      *tun.Queue
	batch      *tun.ReadBatch
	host       int // packet socket: what it sends leaves through the TUN device
	wire       int // packet socket: IPv4 frames that arrive at the peers
	tun        int // interface index
	dev        *tun.Device
	home, away *netns.Namespace // the node's and the far end's
	peers      []table.Peer
	node       netip.Addr
	nl         *netlink.Handle             // of the node's namespace
	hop        func(netip.Addr) netip.Addr // what the routing table says
	frame      [14]byte                    // header of the last frame that arrived
}

// newBench builds one. The peers all live at the far end.
func newBench(t *testing.T, whole bool) *bench {
	t.Helper()
	if err := netns.CheckPrivileges(); err != nil {
		impossible(t, err)
	}
	lan, err := netns.NewLAN(netns.LANConfig{Nodes: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lan.Close(); err != nil {
			t.Error(err)
		}
	})
	b := &bench{
		t: t, host: -1, wire: -1, node: lan.Addr(0), home: lan.Nodes[0], away: lan.Nodes[1],
		hop: func(a netip.Addr) netip.Addr { return a },
	}
	t.Cleanup(func() { unix.Close(b.host); unix.Close(b.wire) })
	if b.batch, err = tun.NewReadBatch(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.batch.Free() })
	far := lan.Addr(1)
	b.peers = []table.Peer{
		{Subnet: netip.MustParsePrefix("10.1.2.0/24"), Endpoint: netip.AddrPortFrom(far, 8472), Framing: encap.FramingVXLAN, VNI: 7, MAC: table.MAC{2, 0, 0, 0, 2, 2}, PartialChecksums: true},
		{Subnet: netip.MustParsePrefix("10.1.3.0/24"), Endpoint: netip.AddrPortFrom(far, 8285), Framing: encap.FramingUDP, PartialChecksums: true},
		{Subnet: netip.MustParsePrefix("10.1.4.0/24"), Endpoint: netip.AddrPortFrom(far, 9285), Framing: encap.FramingUDP},
		{Subnet: netip.MustParsePrefix("10.1.5.0/24"), Endpoint: netip.AddrPortFrom(far, 8473), Framing: encap.FramingVXLAN, VNI: 9, MAC: table.MAC{2, 0, 0, 0, 2, 5}, MTU: 1000},
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(lan.Nodes[1].Do(func() (err error) {
		b.wire, err = packetSocket(unix.SOCK_RAW, netns.LANInterface, unix.ETH_P_IP)
		return err
	}))
	check(lan.Nodes[0].Do(func() error { return b.open(whole) }))
	t.Cleanup(func() { b.a.Close() })
	return b
}

// open makes the node's side, in its namespace.
func (b *bench) open(whole bool) error {
	dev, err := tun.Open(tun.Config{Name: "tweed0", MTU: 1450, Queues: 1, Offload: tun.OffloadFull})
	if err != nil {
		return err
	}
	b.t.Cleanup(func() { dev.Close() })
	b.dev, b.queue = dev, dev.Queues()[0]
	l, err := netlink.LinkByName("tweed0")
	if err != nil {
		return err
	}
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/tweed0/disable_ipv6", []byte("1"), 0); err != nil {
		return err
	}
	under, err := netlink.LinkByName(netns.LANInterface)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return err
	}
	b.tun = l.Attrs().Index
	if b.host, err = packetSocket(unix.SOCK_RAW, "", 0); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(b.host, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return err
	}
	cfg := testConfig()
	cfg.TUN, cfg.Underlay, cfg.Local, cfg.Whole = b.tun, under.Attrs().Index, b.node, whole
	cfg.Refused = dev.Refused
	copy(cfg.Source[:], under.Attrs().HardwareAddr)
	cfg.Way = func(a netip.Addr) (int, netip.Addr) { return cfg.Underlay, b.hop(a) }
	if b.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return err
	}
	b.t.Cleanup(b.nl.Close)
	if b.a, err = New(cfg); err != nil {
		if errors.Is(err, unix.EPERM) || errors.Is(err, ErrUnsupported) {
			impossible(b.t, err)
		}
		return err
	}
	b.a.SetDuty(engine.Duty{Send: true, Receive: true})
	b.a.Follow(local, b.peers)
	return nil
}

func packetSocket(kind int, iface string, protocol uint16) (int, error) {
	p := protocol<<8 | protocol>>8
	fd, err := unix.Socket(unix.AF_PACKET, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(p))
	if err != nil || iface == "" {
		return fd, err
	}
	l, err := netlink.LinkByName(iface)
	if err != nil {
		return fd, err
	}
	return fd, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: p, Ifindex: l.Attrs().Index})
}

// impossible reports why a test cannot run here. With CI=true that is a failure.
func impossible(t testing.TB, why error) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

// send lets the host send a packet into the overlay and returns where it went:
// the datagram that arrived at the far end, or the packet the workers were given.
func (b *bench) send(t fataler, packet []byte, gso int) (wire, worker []byte) {
	t.Helper()
	vnet := make([]byte, 10)
	if gso > 0 {
		vnet[0], vnet[1] = 1, 1 // needs checksum, TCPv4
		headers, sum := uint16(40), uint16(16)
		if packet[9] == tuntest.UDP {
			vnet[1], headers, sum = 5, 28, 6 // UDP_L4
		}
		binary.NativeEndian.PutUint16(vnet[2:], headers)
		binary.NativeEndian.PutUint16(vnet[4:], uint16(gso))
		binary.NativeEndian.PutUint16(vnet[6:], 20)
		binary.NativeEndian.PutUint16(vnet[8:], sum)
	}
	to := &unix.SockaddrLinklayer{Protocol: 0x0008, Ifindex: b.tun}
	if err := unix.Sendto(b.host, append(vnet, packet...), 0, to); err != nil {
		t.Fatalf("send: %v", err)
	}
	buf := make([]byte, 1<<17)
	for deadline := time.Now().Add(patience); ; {
		n, err := unix.Read(b.wire, buf)
		if err == nil {
			// Behind the Ethernet header. The kernel sends IGMP of its own.
			if f := buf[14:n]; f[9] == tuntest.UDP && netip.AddrFrom4([4]byte(f[16:20])) == b.peers[0].Endpoint.Addr() {
				if wire != nil {
					t.Fatalf("two datagrams for one packet")
				}
				wire, b.frame = bytes.Clone(f), [14]byte(buf)
			}
		} else if err != unix.EAGAIN {
			t.Fatalf("wire: %v", err)
		}
		if err := b.queue.TryRead(b.batch); err != nil {
			t.Fatalf("queue: %v", err)
		}
		for _, p := range b.batch.Packets() {
			if ip := b.batch.Bytes(&p, 0); ip[16] != 10 {
				continue
			}
			if worker != nil {
				t.Fatalf("two packets for one")
			}
			worker = bytes.Clone(b.batch.Bytes(&p, 0))
		}
		switch {
		case wire != nil && worker != nil:
			t.Fatalf("a packet went both ways")
		case wire != nil || worker != nil:
			return wire, worker
		case time.Now().After(deadline):
			t.Fatalf("the packet is lost: %x", packet)
		}
		time.Sleep(50 * time.Microsecond)
	}
}

func to(p table.Peer) tuntest.Packet {
	return tuntest.Packet{Src: ourSubnet.Addr().Next(), Dst: p.Subnet.Addr().Next(), Proto: tuntest.UDP, SrcPort: 5, DstPort: 6, Payload: make([]byte, 40)}
}

// assertDatagram compares what arrived with what a worker would have sent.
func (b *bench) assertDatagram(t fataler, wire, packet []byte, p table.Peer) {
	t.Helper()
	size := 28 + p.Framing.PrefixLen()
	if len(wire) != size+len(packet) {
		t.Fatalf("%d bytes on the wire, want %d", len(wire), size+len(packet))
	}
	if tuntest.Sum(wire[:20]) != 0xffff {
		t.Fatalf("outer header checksum: %x", wire[:20])
	}
	sport := binary.BigEndian.Uint16(wire[20:])
	want := tuntest.Packet{
		Src: b.node, Dst: p.Endpoint.Addr(), Proto: tuntest.UDP, TOS: packet[1] & 3, ID: binary.BigEndian.Uint16(wire[4:]),
		SrcPort: sport, DstPort: p.Endpoint.Port(), Payload: wire[28:], Sum: tuntest.Zero,
	}.Bytes()
	if !bytes.Equal(wire[:28], want[:28]) {
		t.Fatalf("outer headers\n%x, want\n%x", wire[:28], want[:28])
	}
	inner := bytes.Clone(packet)
	if p.Framing == encap.FramingVXLAN {
		var prefix [encap.MaxPrefixLen]byte
		encap.PutVXLANPrefix(prefix[:], p.VNI, p.MAC, ourMAC)
		if !bytes.Equal(wire[28:size], prefix[:]) {
			t.Fatalf("prefix\n%x, want\n%x", wire[28:size], prefix)
		}
		if sport < 40001 || sport > 40004 {
			t.Fatalf("source port %d", sport)
		}
	} else {
		tun.DecrementTTL(inner)
		if sport != 8285 {
			t.Fatalf("source port %d", sport)
		}
	}
	if !bytes.Equal(wire[size:], inner) {
		t.Fatalf("inner packet\n%x, want\n%x", wire[size:], inner)
	}
}

// TestSendsAsAWorkerWould: every packet either leaves framed as a worker frames
// it, or is handed to the workers unchanged; nothing is lost or seen twice.
func TestSendsAsAWorkerWould(t *testing.T) {
	b := newBench(t, true)
	hits := map[int]int{}
	packets, size := uint64(0), uint64(0)
	rapid.Check(t, func(t *rapid.T) {
		i := rapid.IntRange(0, len(b.peers)-1).Draw(t, "peer")
		p := to(b.peers[i])
		p.Proto = rapid.SampledFrom([]uint8{tuntest.UDP, tuntest.TCP, tuntest.ICMP, 99}).Draw(t, "protocol")
		p.SrcPort, p.DstPort = rapid.Uint16().Draw(t, "source"), rapid.Uint16().Draw(t, "destination")
		p.TOS, p.TTL = rapid.Byte().Draw(t, "tos"), rapid.SampledFrom([]uint8{1, 2, 64, 255}).Draw(t, "ttl")
		p.Frag = rapid.SampledFrom([]uint16{0, 0, tuntest.DontFragment, tuntest.MoreFragments, 5}).Draw(t, "fragment")
		p.ID = rapid.Uint16().Draw(t, "id")
		if rapid.IntRange(0, 9).Draw(t, "options") == 0 {
			p.IPOptions = []byte{1, 1, 1, 0}
		}
		p.Payload = make([]byte, rapid.SampledFrom([]int{0, 1, 40, 900, 1000, 1400}).Draw(t, "payload"))
		packet := p.Bytes()
		wire, worker := b.send(t, packet, 0)
		mtu := 1450
		if i == 3 {
			mtu = 1000
		}
		plain := i != 2 && p.IPOptions == nil && len(packet) <= mtu && (p.TTL > 1 || b.peers[i].Framing == encap.FramingVXLAN)
		if (wire != nil) != plain {
			t.Fatalf("on the wire %t, want %t: %x", wire != nil, plain, packet)
		}
		if wire == nil {
			if !bytes.Equal(worker, packet) {
				t.Fatalf("handed to the workers\n%x, want\n%x", worker, packet)
			}
			return
		}
		hits[i]++
		packets, size = packets+1, size+uint64(len(packet))
		b.assertDatagram(t, wire, packet, b.peers[i])
	})
	if hits[0] == 0 || hits[1] == 0 || hits[3] == 0 {
		t.Errorf("hits by peer: %v", hits)
	}
	if tx, _ := b.a.Traffic(); tx.Packets != packets || tx.Delivered != packets || tx.Bytes != size {
		t.Errorf("counted %+v, want %d packets of %d bytes", tx, packets, size)
	}
}

// TestOneFlowKeepsItsSourcePort, and flows spread over several.
func TestOneFlowKeepsItsSourcePort(t *testing.T) {
	b := newBench(t, true)
	ports := map[uint16]bool{}
	for flow := range 32 {
		var of uint16
		for i := range 3 {
			p := to(b.peers[0])
			p.SrcPort, p.Payload = uint16(1000+flow), make([]byte, i)
			wire, _ := b.send(t, p.Bytes(), 0)
			if wire == nil {
				t.Fatal("left to the workers")
			}
			port := binary.BigEndian.Uint16(wire[20:])
			if i > 0 && port != of {
				t.Errorf("flow %d changed from source port %d to %d", flow, of, port)
			}
			of = port
		}
		ports[of] = true
	}
	if len(ports) < 2 {
		t.Errorf("32 flows left from one source port")
	}
}

// super is a TCP super-packet of five segments with a partial checksum.
func super(p table.Peer) (packet []byte, gso int) {
	const segment = 800
	in := to(p)
	in.Proto, in.Flags, in.Sum = tuntest.TCP, tuntest.ACK, tuntest.Partial
	in.Payload = make([]byte, 4*segment+100)
	return in.Bytes(), segment
}

// TestSuperPacketsCrossAWholeLink as one, and count as their segments.
func TestSuperPacketsCrossAWholeLink(t *testing.T) {
	b := newBench(t, true)
	for _, p := range b.peers[:2] {
		packet, gso := super(p)
		before, _ := b.a.Traffic()
		wire, _ := b.send(t, packet, gso)
		if wire == nil {
			t.Errorf("%v: left to the workers", p.Framing)
			continue
		}
		b.assertDatagram(t, wire, packet, p)
		after, _ := b.a.Traffic()
		if n, size := after.Packets-before.Packets, after.Bytes-before.Bytes; n != 5 || size != uint64(len(packet))+4*40 {
			t.Errorf("%v: counted %d packets of %d bytes, want 5 of %d", p.Framing, n, size, len(packet)+4*40)
		}
	}
}

// TestSuperPacketsAreLeftToTheWorkersElsewhere: they are cut there into
// datagrams that the receiver can merge. Single packets follow them, so that
// none overtakes: the entry remembers the moment. Other peers are not affected,
// and a foreign kernel, which merges by itself, is served.
func TestSuperPacketsAreLeftToTheWorkersElsewhere(t *testing.T) {
	b := newBench(t, false)
	packet, gso := super(b.peers[0])
	if wire, worker := b.send(t, packet, gso); wire != nil || !bytes.Equal(worker, packet) {
		t.Error("the super-packet was not left to the workers as it was")
	}
	var e accelPeer
	if err := b.a.objs.Peers.Lookup(keyOf(b.peers[0].Subnet), &e); err != nil || e.Bulk[0] == 0 {
		t.Errorf("the entry does not remember the super-packet: %+v, %v", e, err)
	}
	e.Bulk[0] = 1 // long ago
	if err := b.a.objs.Peers.Put(keyOf(b.peers[0].Subnet), e); err != nil {
		t.Fatal(err)
	}
	if wire, _ := b.send(t, to(b.peers[0]).Bytes(), 0); wire == nil {
		t.Error("long after a super-packet, a packet was left to the workers")
	}
	if wire, _ := b.send(t, to(b.peers[1]).Bytes(), 0); wire == nil {
		t.Error("a packet to another peer was left to the workers")
	}
	foreign := b.peers[0]
	foreign.PartialChecksums = false
	b.a.Retract(local, []table.Peer{foreign})
	b.a.Follow(local, []table.Peer{foreign})
	if wire, _ := b.send(t, packet, gso); wire == nil {
		t.Error("a super-packet to a kernel's vxlan device was left to the workers")
	}
}

// TestSuperPacketsOfOneProtocolDoNotHoldTheOther: datagrams of QUIC go to the
// workers all the time, and TCP beside them does not change its way.
func TestSuperPacketsOfOneProtocolDoNotHoldTheOther(t *testing.T) {
	b := newBench(t, true)
	in := to(b.peers[0])
	in.Sum, in.Payload = tuntest.Partial, make([]byte, 3000)
	if wire, _ := b.send(t, in.Bytes(), 1000); wire != nil {
		t.Fatal("a UDP super-packet was sent inside the kernel")
	}
	var e accelPeer
	if err := b.a.objs.Peers.Lookup(keyOf(b.peers[0].Subnet), &e); err != nil || e.Bulk[0] != 0 || e.Bulk[1] == 0 {
		t.Errorf("the entry remembers the wrong protocol: %v, %v", e.Bulk, err)
	}
	in = to(b.peers[0])
	in.Proto = tuntest.TCP
	if wire, _ := b.send(t, in.Bytes(), 0); wire == nil {
		t.Error("a packet of TCP followed a super-packet of UDP to the workers")
	}
}

// TestSuperPacketFollowsOneThatWentToTheWorkers, as a single packet does: a flow
// whose super-packets are of several sizes is not reordered.
func TestSuperPacketFollowsOneThatWentToTheWorkers(t *testing.T) {
	b := newBench(t, true)
	p := b.peers[3] // takes 1000 bytes
	good, gso := super(p)
	large := to(p)
	large.Proto, large.Flags, large.Sum, large.Payload = tuntest.TCP, tuntest.ACK, tuntest.Partial, make([]byte, 3000)
	for range 100 {
		start := time.Now()
		if wire, _ := b.send(t, large.Bytes(), 1200); wire != nil {
			t.Fatal("segments beyond the MTU were sent inside the kernel")
		}
		wire, _ := b.send(t, good, gso)
		if wire == nil {
			return
		}
		if time.Since(start) < 5*time.Millisecond { // of 20, by a coarse clock
			t.Fatal("a super-packet overtook the one before it")
		}
	}
	t.Fatal("the machine was too slow each time")
}

// TestRetractedPeerIsLeftToTheWorkers, also when a shorter prefix covers it.
func TestRetractedPeerIsLeftToTheWorkers(t *testing.T) {
	b := newBench(t, true)
	wide := b.peers[1]
	wide.Subnet = netip.MustParsePrefix("10.1.0.0/16")
	b.a.Retract(local, append(b.peers[:3:3], wide))
	b.a.Follow(local, append(b.peers[:3:3], wide))
	if wire, _ := b.send(t, to(b.peers[0]).Bytes(), 0); wire == nil || binary.BigEndian.Uint16(wire[22:]) != 8472 {
		t.Error("the longer prefix did not win")
	}
	if wire, _ := b.send(t, to(b.peers[2]).Bytes(), 0); wire != nil {
		t.Error("a peer that is not served was answered by the prefix around it")
	}
	if wire, _ := b.send(t, to(b.peers[3]).Bytes(), 0); wire == nil || binary.BigEndian.Uint16(wire[22:]) != 8285 {
		t.Error("what only the shorter prefix covers was not sent there")
	}
	b.a.Hold([]string{"test"})
	if wire, _ := b.send(t, to(b.peers[0]).Bytes(), 0); wire != nil {
		t.Error("sent inside the kernel while on hold")
	}
}
