package accel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"testing"

	"github.com/cilium/ebpf"
	"pgregory.net/rapid"

	"tweed/encap"
	"tweed/engine"
	"tweed/engine/table"
	"tweed/tun/tuntest"
)

var (
	ourAddr   = netip.MustParseAddr("192.0.2.1")
	ourSubnet = netip.MustParsePrefix("10.1.1.0/24")
	ourMAC    = table.MAC{2, 0, 0, 0, 1, 1}
	local     = table.Local{Subnet: ourSubnet, Addr: ourSubnet.Addr(), MAC: ourMAC, VNI: 7}
)

const (
	underlayIndex = 3
	tunIndex      = 4
)

// testPeers are a tweed node in each framing, a kernel vxlan device, flannel's
// proxy, and a node behind another interface.
var testPeers = []table.Peer{
	{Subnet: netip.MustParsePrefix("10.1.2.0/24"), Endpoint: netip.MustParseAddrPort("192.0.2.2:8472"), Framing: encap.FramingVXLAN, VNI: 7, MAC: table.MAC{2, 0, 0, 0, 2, 2}, PartialChecksums: true},
	{Subnet: netip.MustParsePrefix("10.1.3.0/24"), Endpoint: netip.MustParseAddrPort("192.0.2.3:8472"), Framing: encap.FramingVXLAN, VNI: 7, MAC: table.MAC{2, 0, 0, 0, 2, 3}},
	{Subnet: netip.MustParsePrefix("10.1.4.0/24"), Endpoint: netip.MustParseAddrPort("192.0.2.4:8285"), Framing: encap.FramingUDP, PartialChecksums: true},
	{Subnet: netip.MustParsePrefix("10.1.5.0/24"), Endpoint: netip.MustParseAddrPort("192.0.2.5:8285"), Framing: encap.FramingUDP},
	{Subnet: netip.MustParsePrefix("10.1.6.0/24"), Endpoint: netip.MustParseAddrPort("198.51.100.6:8472"), Framing: encap.FramingVXLAN, VNI: 7, MAC: table.MAC{2, 0, 0, 0, 2, 6}, PartialChecksums: true},
}

func testConfig() Config {
	return Config{
		TUN: tunIndex, Underlay: underlayIndex, Local: ourAddr, VXLANPort: 8472, UDPPort: 8285, MTU: 1450,
		Sources: engine.SourcePorts{UDP: 8285, VXLAN: [4]uint16{40001, 40002, 40003, 40004}},
		Way: func(a netip.Addr) (int, netip.Addr) {
			if a == netip.MustParseAddr("198.51.100.6") {
				return underlayIndex + 100, netip.Addr{}
			}
			return underlayIndex, netip.Addr{}
		},
	}
}

// loaded is an Accelerator whose programs are attached to nothing.
func loaded(t testing.TB) *Accelerator {
	t.Helper()
	a := &Accelerator{cfg: testConfig(), settle: settle}
	if err := loadAccelObjects(&a.objs, nil); err != nil {
		var verifier *ebpf.VerifierError
		switch {
		case errors.As(err, &verifier):
			t.Fatalf("%+v", verifier)
		case os.Getenv("CI") == "true":
			t.Fatal(err)
		}
		t.Skip(explain("load BPF programs", err))
	}
	t.Cleanup(func() { a.Close() })
	a.mirror = newMirror(a.objs.Peers)
	a.SetDuty(engine.Duty{Send: true, Receive: true})
	a.Follow(local, testPeers)
	if on, why := a.State(); !on {
		t.Fatal(why)
	}
	return a
}

// frame is an Ethernet frame from the underlay, valid but for what a test changes.
type frame struct {
	from     netip.Addr
	to       netip.Addr
	tos      uint8
	frag     uint16
	protocol uint8
	port     uint16
	sum      uint16 // outer UDP checksum
	payload  []byte // of the datagram
	pad      int    // bytes behind the datagram
	station  byte   // last of the destination MAC; 0 is ours, the test run's device has no address
}

func (f frame) bytes() []byte {
	udp := tuntest.Packet{
		Src: f.from, Dst: f.to, Proto: tuntest.UDP, TOS: f.tos, Frag: f.frag, SrcPort: 40000, DstPort: f.port,
		Payload: f.payload, Sum: tuntest.Zero,
	}.Bytes()
	binary.BigEndian.PutUint16(udp[26:], f.sum)
	udp[9] = f.protocol
	tuntest.SetIPChecksum(udp)
	b := append([]byte{0, 0, 0, 0, 0, f.station, 2, 0, 0, 0, 9, 2, 8, 0}, udp...)
	return append(b, make([]byte, f.pad)...)
}

// vxlanFrame is a datagram of peer p that carries the packet.
func vxlanFrame(p table.Peer, packet []byte) frame {
	payload := make([]byte, encap.MaxPrefixLen, encap.MaxPrefixLen+len(packet))
	encap.PutVXLANPrefix(payload, local.VNI, ourMAC, p.MAC)
	return frame{from: p.Endpoint.Addr(), to: ourAddr, protocol: tuntest.UDP, port: 8472, payload: append(payload, packet...)}
}

func udpFrame(p table.Peer, packet []byte) frame {
	return frame{from: p.Endpoint.Addr(), to: ourAddr, protocol: tuntest.UDP, port: 8285, payload: packet}
}

func from(p table.Peer) tuntest.Packet {
	return tuntest.Packet{
		Src: p.Subnet.Addr().Next(), Dst: ourSubnet.Addr().Next(), Proto: tuntest.UDP, SrcPort: 1, DstPort: 2, Payload: make([]byte, 32),
	}
}

const redirect = 7 // TC_ACT_REDIRECT

// receive runs the program on a frame and returns what it makes of it. hit says
// that the packet in it goes to the TUN.
func receive(t interface{ Fatalf(string, ...any) }, a *Accelerator, data []byte) (out []byte, hit bool) {
	verdict, out, err := a.objs.Receive.Test(data)
	switch {
	case err != nil:
		t.Fatalf("run: %v", err)
	case verdict == redirect:
		return out, true
	case int32(verdict) != -1:
		t.Fatalf("verdict %d, want %d or -1", int32(verdict), redirect)
	case !bytes.Equal(out, data):
		t.Fatalf("a frame that was passed on is changed:\n%x\n%x", data, out)
	}
	return out, false
}

// TestReceivesThePlainCase: a datagram without checksum from a leaseholder is
// taken apart and its packet unchanged.
func TestReceivesThePlainCase(t *testing.T) {
	a := loaded(t)
	packets, size := uint64(0), uint64(0)
	for _, f := range []struct {
		name  string
		frame func(table.Peer, []byte) frame
		peer  int
	}{{"vxlan", vxlanFrame, 0}, {"kernel vxlan", vxlanFrame, 1}, {"udp", udpFrame, 2}} {
		for _, ecn := range []uint8{0, 1, 2, 3} {
			p := from(testPeers[f.peer])
			p.TOS = 0x28 | ecn
			packet := p.Bytes()
			fr := f.frame(testPeers[f.peer], packet)
			fr.tos = ecn
			out, hit := receive(t, a, fr.bytes())
			if !hit {
				t.Errorf("%s: left to the workers", f.name)
				continue
			}
			if !bytes.Equal(out[14:], packet) {
				t.Errorf("%s: got\n%x, want\n%x", f.name, out[14:], packet)
			}
			packets, size = packets+1, size+uint64(len(packet))
		}
	}
	if _, rx := a.Traffic(); rx.Packets != packets || rx.Delivered != packets || rx.Bytes != size {
		t.Errorf("counted %+v, want %d packets of %d bytes", rx, packets, size)
	}
}

// TestReceivedPacketHasNoMark: rules that route by marks judge the packet inside
// as if a worker had written it, not by what was put on the datagram.
func TestReceivedPacketHasNoMark(t *testing.T) {
	a := loaded(t)
	const mark = 8 // offset in struct __sk_buff
	data := vxlanFrame(testPeers[0], from(testPeers[0]).Bytes()).bytes()
	run := ebpf.RunOptions{Data: data, DataOut: make([]byte, len(data)), Context: make([]byte, 192), ContextOut: make([]byte, 192)}
	run.Context.([]byte)[mark] = 7
	verdict, err := a.objs.Receive.Run(&run)
	if err != nil || verdict != redirect {
		t.Fatalf("verdict %d, %v", verdict, err)
	}
	if out := binary.NativeEndian.Uint32(run.ContextOut.([]byte)[mark:]); out != 0 {
		t.Errorf("the packet has the mark %d of the datagram", out)
	}
}

// TestLeavesTheRestToTheWorkers: each of these frames has something a worker
// has to judge; none is touched.
func TestLeavesTheRestToTheWorkers(t *testing.T) {
	a := loaded(t)
	p := testPeers[0]
	packet := from(p).Bytes()
	with := func(change func(f *frame)) frame {
		f := vxlanFrame(p, packet)
		change(&f)
		return f
	}
	inner := func(change func(*tuntest.Packet)) frame {
		in := from(p)
		change(&in)
		return vxlanFrame(p, in.Bytes())
	}
	byteAt := func(i int, v byte) frame { return with(func(f *frame) { f.payload[i] = v }) }
	raw := func(i int, v byte) frame { return byteAt(encap.MaxPrefixLen+i, v) }
	for name, f := range map[string]frame{
		"a checksum: the workers sent it":  with(func(f *frame) { f.sum = 0x1234 }),
		"another port":                     with(func(f *frame) { f.port = 8473 }),
		"port 0":                           with(func(f *frame) { f.port = 0 }),
		"another protocol":                 with(func(f *frame) { f.protocol = tuntest.TCP }),
		"another host":                     with(func(f *frame) { f.to = netip.MustParseAddr("192.0.2.9") }),
		"another station":                  with(func(f *frame) { f.station = 9 }),
		"a stranger":                       with(func(f *frame) { f.from = netip.MustParseAddr("192.0.2.99") }),
		"another peer's address":           with(func(f *frame) { f.from = testPeers[1].Endpoint.Addr() }),
		"a first fragment":                 with(func(f *frame) { f.frag = tuntest.MoreFragments }),
		"a later fragment":                 with(func(f *frame) { f.frag = 7 }),
		"bytes behind the datagram":        with(func(f *frame) { f.pad = 4 }),
		"congestion on a packet without":   with(func(f *frame) { f.tos = 3 }),
		"the I flag is missing":            byteAt(0, 0),
		"a reserved flag":                  byteAt(0, 0x88),
		"a reserved byte":                  byteAt(2, 1),
		"another VNI":                      byteAt(6, 8),
		"the last reserved byte":           byteAt(7, 1),
		"another destination MAC":          byteAt(13, 9),
		"a group source MAC":               byteAt(14, 3),
		"another ethertype":                byteAt(20, 0x86),
		"IP version 6":                     raw(0, 0x65),
		"IP options":                       inner(func(p *tuntest.Packet) { p.IPOptions = []byte{1, 1, 1, 0} }),
		"a header length below 20":         raw(0, 0x44),
		"a total length beyond":            raw(3, 255),
		"a total length below":             raw(3, 30),
		"TTL 0":                            raw(8, 0),
		"a source of another peer":         inner(func(in *tuntest.Packet) { in.Src = testPeers[1].Subnet.Addr().Next() }),
		"a source nobody leases":           inner(func(in *tuntest.Packet) { in.Src = netip.MustParseAddr("10.1.200.1") }),
		"our own source":                   inner(func(in *tuntest.Packet) { in.Src = ourSubnet.Addr() }),
		"a loopback source":                inner(func(in *tuntest.Packet) { in.Src = netip.MustParseAddr("127.0.0.1") }),
		"a destination elsewhere":          inner(func(in *tuntest.Packet) { in.Dst = testPeers[1].Subnet.Addr() }),
		"nothing inside":                   with(func(f *frame) { f.payload = nil }),
		"half a VXLAN header":              with(func(f *frame) { f.payload = f.payload[:5] }),
		"no room for an IP header":         with(func(f *frame) { f.payload = f.payload[:encap.MaxPrefixLen+19] }),
		"vxlan on the udp port":            with(func(f *frame) { f.port = 8285 }),
		"udp on the vxlan port":            {from: testPeers[2].Endpoint.Addr(), to: ourAddr, protocol: tuntest.UDP, port: 8472, payload: from(testPeers[2]).Bytes()},
		"a peer that must not be served":   udpFrame(testPeers[3], from(testPeers[3]).Bytes()),
		"a peer behind another interface":  vxlanFrame(testPeers[4], from(testPeers[4]).Bytes()),
		"our own MAC as source":            with(func(f *frame) { copy(f.payload[14:], ourMAC[:]) }),
		"no source MAC":                    with(func(f *frame) { copy(f.payload[14:], make([]byte, 6)) }),
		"a later flow label in the header": byteAt(4, 1),
	} {
		if out, hit := receive(t, a, f.bytes()); hit {
			t.Errorf("%s: received inside the kernel as %x", name, out)
		}
	}
	if _, rx := a.Traffic(); rx.Packets != 0 {
		t.Errorf("counted %+v, want nothing", rx)
	}
}

// TestNoByteMakesABadDatagramGood: whatever single bytes of a good frame are
// changed, what is received then passes every rule of the workers.
func TestNoByteMakesABadDatagramGood(t *testing.T) {
	a := loaded(t)
	tab, err := table.Build(local, testPeers, nil)
	if err != nil {
		t.Fatal(err)
	}
	hits := 0
	rapid.Check(t, func(t *rapid.T) {
		i := rapid.IntRange(0, 2).Draw(t, "peer")
		p := testPeers[i]
		in := from(p)
		in.Payload = in.Payload[:rapid.IntRange(0, 32).Draw(t, "payload")]
		f := vxlanFrame(p, in.Bytes())
		if p.Framing == encap.FramingUDP {
			f = udpFrame(p, in.Bytes())
		}
		data := f.bytes()
		for range rapid.IntRange(0, 2).Draw(t, "changes") {
			data[rapid.IntRange(12, min(len(data), 110)-1).Draw(t, "at")] = rapid.Byte().Draw(t, "value")
		}
		out, hit := receive(t, a, data)
		if !hit {
			return
		}
		hits++
		judge(t, tab, data, out)
	})
	if hits == 0 {
		t.Error("no frame was received inside the kernel")
	}
}

// judge applies the rules of engine/rx.go to a frame that was received.
func judge(t *rapid.T, tab *table.Table, data, out []byte) {
	ip := data[14:]
	must := func(what string, ok bool) {
		if !ok {
			t.Fatalf("received against the rule: %s\n%x", what, data)
		}
	}
	must("outer IPv4 without options", ip[0] == 0x45 && data[12] == 8 && data[13] == 0)
	must("UDP for us", ip[9] == tuntest.UDP && bytes.Equal(ip[16:20], ourAddr.AsSlice()))
	must("no fragment", binary.BigEndian.Uint16(ip[6:])&0x3fff == 0)
	must("outer lengths", int(binary.BigEndian.Uint16(ip[2:])) == len(ip) && int(binary.BigEndian.Uint16(ip[24:])) == len(ip)-20)
	must("no checksum", ip[26] == 0 && ip[27] == 0)
	datagram := ip[28:]
	switch binary.BigEndian.Uint16(ip[22:]) {
	case 8472:
		r := encap.NewVXLANReceiver(local.VNI, ourMAC)
		must("vxlan prefix", r.Check(datagram) == encap.OK)
		datagram = datagram[encap.MaxPrefixLen:]
	case 8285:
	default:
		must("port", false)
	}
	must("inner header", datagram[0] == 0x45 && int(binary.BigEndian.Uint16(datagram[2:])) == len(datagram) && datagram[8] > 0)
	src, dst := netip.AddrFrom4([4]byte(datagram[12:16])), netip.AddrFrom4([4]byte(datagram[16:20]))
	e := tab.Lookup(binary.BigEndian.Uint32(datagram[12:]))
	must("source leased to the sender", e != nil && e.Endpoint.Addr() == netip.AddrFrom4([4]byte(ip[12:16])))
	must("source is not ours", !ourSubnet.Contains(src))
	must("for us", ourSubnet.Contains(dst))
	must("ECN", ip[1]&3 == 0 || ip[1]&3 == datagram[1]&3)
	must("unchanged", bytes.Equal(out[14:], datagram))
}

// TestOffDutyTouchesNothing: with a capture, with ports, with a hold, after
// Retract of all.
func TestOffDutyTouchesNothing(t *testing.T) {
	a := loaded(t)
	good := vxlanFrame(testPeers[0], from(testPeers[0]).Bytes()).bytes()
	expect := func(when string, want bool) {
		t.Helper()
		if _, hit := receive(t, a, good); hit != want {
			t.Errorf("%s: received inside the kernel %t, want %t", when, hit, want)
		}
	}
	expect("on duty", true)
	a.SetDuty(engine.Duty{Why: "capture"})
	expect("off duty", false)
	if on, why := a.State(); on || why != "capture" {
		t.Errorf("state %t %q", on, why)
	}
	a.SetDuty(engine.Duty{Send: true, Receive: true})
	expect("on duty again", true)
	a.Hold([]string{"promiscuous"})
	expect("on hold", false)
	a.Hold(nil)
	expect("released", true)
	a.Retract(local, testPeers[1:])
	expect("retracted", false)
	a.Follow(local, testPeers)
	expect("followed", true)
	other := local
	other.MAC[5]++
	a.Retract(other, testPeers)
	expect("another own MAC announced", false)
	a.Follow(other, testPeers)
	expect("another own MAC", false)
}
