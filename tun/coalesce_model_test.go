package tun

import (
	"bytes"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"tweed/tun/tuntest"
)

// flow makes packets of one flow that now and then break the rules of merging.
type flow struct {
	p    tuntest.Packet // the next regular packet, without payload
	size int
}

func drawFlow(t *rapid.T, i int) *flow {
	f := &flow{size: rapid.IntRange(2, 60).Draw(t, "size")}
	f.p = tuntest.Packet{
		Proto: rapid.SampledFrom([]uint8{tuntest.TCP, tuntest.TCP, tuntest.UDP}).Draw(t, "proto"),
		// Few ports and addresses: flows differ in one thing only.
		SrcPort: uint16(1 + i%2), DstPort: uint16(80 + i/2%2), Src: mustAddr(fmt.Sprintf("10.1.1.%d", 1+i/4%2)),
		TTL: 60, ID: rapid.SampledFrom([]uint16{0, 5, 0xfffd}).Draw(t, "id"),
		Frag: rapid.SampledFrom([]uint16{0, tuntest.DontFragment}).Draw(t, "df"),
		Sum:  rapid.SampledFrom([]tuntest.Checksum{tuntest.Good, tuntest.Partial}).Draw(t, "sum"),
	}
	if f.p.Proto == tuntest.TCP {
		f.p.Flags, f.p.Window, f.p.Ack = tuntest.ACK, 500, 1
		f.p.Seq = rapid.SampledFrom([]uint32{0, 0xffffffe0}).Draw(t, "seq")
		f.p.TCPOptions = rapid.SampledFrom([][]byte{nil, {1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}}).Draw(t, "options")
	}
	return f
}

// irregular are the ways a packet differs from the one its flow expects. Each
// applies to one packet; what changes f.p lasts.
var irregular = map[string]func(f *flow, p *tuntest.Packet){
	"push":            func(f *flow, p *tuntest.Packet) { p.Flags |= tuntest.PSH },
	"short":           func(f *flow, p *tuntest.Packet) { p.Payload = p.Payload[:1] },
	"long":            func(f *flow, p *tuntest.Packet) { p.Payload = append(p.Payload, 0xee) },
	"ack only":        func(f *flow, p *tuntest.Packet) { p.Payload = nil },
	"gap":             func(f *flow, p *tuntest.Packet) { p.Seq += 1000 },
	"again":           func(f *flow, p *tuntest.Packet) { p.Seq -= uint32(f.size) },
	"syn":             func(f *flow, p *tuntest.Packet) { p.Flags = tuntest.SYN },
	"fin":             func(f *flow, p *tuntest.Packet) { p.Flags |= tuntest.FIN },
	"rst":             func(f *flow, p *tuntest.Packet) { p.Flags |= tuntest.RST },
	"urg":             func(f *flow, p *tuntest.Packet) { p.Flags |= tuntest.URG },
	"cwr":             func(f *flow, p *tuntest.Packet) { p.Flags |= tuntest.CWR },
	"ece":             func(f *flow, p *tuntest.Packet) { f.p.Flags ^= tuntest.ECE; p.Flags = f.p.Flags },
	"ae":              func(f *flow, p *tuntest.Packet) { f.p.Low4 ^= 1; p.Low4 = f.p.Low4 },
	"ack moves":       func(f *flow, p *tuntest.Packet) { f.p.Ack++; p.Ack = f.p.Ack },
	"window":          func(f *flow, p *tuntest.Packet) { f.p.Window++; p.Window = f.p.Window },
	"tos":             func(f *flow, p *tuntest.Packet) { f.p.TOS ^= 3; p.TOS = f.p.TOS },
	"ttl":             func(f *flow, p *tuntest.Packet) { f.p.TTL--; p.TTL = f.p.TTL },
	"df":              func(f *flow, p *tuntest.Packet) { f.p.Frag ^= tuntest.DontFragment; p.Frag = f.p.Frag },
	"reserved":        func(f *flow, p *tuntest.Packet) { p.Frag |= tuntest.Reserved },
	"id":              func(f *flow, p *tuntest.Packet) { f.p.ID += 7; p.ID = f.p.ID },
	"first fragment":  func(f *flow, p *tuntest.Packet) { p.Frag = tuntest.MoreFragments },
	"later fragment":  func(f *flow, p *tuntest.Packet) { p.Frag = 3 },
	"IPv4 options":    func(f *flow, p *tuntest.Packet) { p.IPOptions = []byte{148, 4, 0, 0} },
	"bad checksum":    func(f *flow, p *tuntest.Packet) { p.Sum = tuntest.Bad },
	"zero checksum":   func(f *flow, p *tuntest.Packet) { p.Sum = tuntest.Zero },
	"partial":         func(f *flow, p *tuntest.Packet) { p.Sum = tuntest.Partial },
	"bad IPv4 sum":    func(f *flow, p *tuntest.Packet) { p.BadIPSum = true },
	"other protocol":  func(f *flow, p *tuntest.Packet) { p.Proto = 132 },
	"partial from on": func(f *flow, p *tuntest.Packet) { f.p.Sum = tuntest.Partial; p.Sum = f.p.Sum },
}

var irregularNames = func() (names []string) {
	for n := range irregular {
		names = append(names, n)
	}
	return names
}()

// next returns the flow's next packet and advances the flow.
func (f *flow) next(kind string, serial int) tuntest.Packet {
	p := f.p
	p.Payload = bytes.Repeat([]byte{byte(serial), byte(serial >> 8)}, f.size)[:f.size]
	if change := irregular[kind]; change != nil {
		change(f, &p)
	}
	f.p.ID++
	if p.Proto == tuntest.TCP {
		f.p.Seq = p.Seq + uint32(len(p.Payload))
	}
	return p
}

// sent is a packet that went into the coalescer.
type sent struct {
	tuntest.Packet
	want string // as it must come out
}

// key tells the order a packet must keep: flows keep theirs, fragments without
// ports and packets the kernel will drop have none to keep.
func (s *sent) key() string {
	if s.BadIPSum || s.Frag&0x1fff != 0 {
		return ""
	}
	return fmt.Sprint(s.Proto, s.Src, s.Dst, s.SrcPort, s.DstPort)
}

func (s *sent) pureACK() bool {
	return s.Proto == tuntest.TCP && s.Flags == tuntest.ACK && len(s.Payload) == 0 && s.Frag&0x3fff == 0
}

// comparable returns the bytes of a packet that must survive: all, but for the
// ID where DF makes it meaningless.
func comparable(b []byte) string {
	b = bytes.Clone(b)
	if be16(b[6:])&dontFrag != 0 && tuntest.Sum(b[:headerLen(b)]) == 0xffff {
		put16(b[4:], 0)
		tuntest.SetIPChecksum(b)
	}
	return string(b)
}

func checkCoalesce(t *rapid.T) {
	rung := rapid.SampledFrom([]Offload{OffloadFull, OffloadFull, OffloadFull, OffloadTSO, OffloadNone}).Draw(t, "rung")
	r := &recorder{t: t}
	q := newQueue(-1, rung)
	q.writev = r.writev
	c, w := NewCoalescer(1426), NewWriter()
	var flows []*flow
	for i := range rapid.IntRange(1, 6).Draw(t, "flows") {
		flows = append(flows, drawFlow(t, i))
	}
	for range rapid.IntRange(1, 3).Draw(t, "batches") {
		var in []sent
		r.raw = nil
		n := rapid.IntRange(1, 60).Draw(t, "packets")
		odd := rapid.IntRange(0, 4).Draw(t, "irregular of 10")
		for range n {
			f := rapid.SampledFrom(flows).Draw(t, "flow")
			kind := ""
			if rapid.IntRange(0, 9).Draw(t, "dice") < odd {
				kind = rapid.SampledFrom(irregularNames).Draw(t, "kind")
			}
			p := f.next(kind, len(in))
			raw := p.Bytes()
			s := sent{Packet: p, want: comparable(raw)}
			if !p.BadIPSum && p.Frag&0x3fff == 0 {
				s.want = comparable(tuntest.Complete(raw))
			}
			if !rapid.Bool().Draw(t, "train") || !c.Continue(raw, 0) {
				c.Add(q, raw, 0, 0)
			}
			in = append(in, s)
		}
		var res Written
		w.Flush(c, &res)
		if res.Packets != uint64(n) || res.Failed != 0 {
			t.Fatalf("%+v of %d packets", res, n)
		}
		for _, raw := range r.raw {
			checkItem(t, rung, raw)
		}
		compare(t, in, r)
	}
}

// checkItem holds a written super-packet to the rules that splitting it again
// cannot show.
func checkItem(t *rapid.T, rung Offload, raw []byte) {
	v, pkt, _ := tuntest.Read(raw)
	if v.GSOType == tuntest.GSONone {
		return
	}
	if rung == OffloadNone || rung == OffloadTSO && v.GSOType == tuntest.GSOUDP {
		t.Fatalf("%v: super-packet of type %d", rung, v.GSOType)
	}
	if pkt[0] != 0x45 || be16(pkt[6:])&fragMask != 0 {
		t.Fatalf("merged packets with options or fragments: % x", pkt[:20])
	}
	if pkt[9] == tuntest.TCP && pkt[33]&^(tuntest.PSH|tuntest.ECE) != tuntest.ACK {
		t.Fatalf("merged TCP flags %#x", pkt[33])
	}
}

// compare checks that what came out of a flush is what went in, each once,
// unchanged and in the order of its flow.
func compare(t *rapid.T, in []sent, r *recorder) {
	out := r.packets()
	if len(out) != len(in) {
		t.Fatalf("%d packets came out, %d went in", len(out), len(in))
	}
	used := make([]bool, len(in))
	for at, b := range out {
		got := comparable(b)
		i := 0
		for ; i < len(in) && (used[i] || in[i].want != got); i++ {
		}
		if i == len(in) {
			t.Fatalf("packet %d was never added: % x", at, b[:min(len(b), 60)])
		}
		used[i] = true
		k := in[i].key()
		if k == "" {
			continue
		}
		// Everything of the flow before i must be out, but for pure ACKs if i
		// carries data.
		for j := range i {
			if !used[j] && in[j].key() == k && (in[i].pureACK() || !in[j].pureACK()) {
				t.Fatalf("packet %d of its flow came out before packet %d:\n%+v\n%+v", i, j, in[i].Packet, in[j].Packet)
			}
		}
	}
}

// What the kernel makes of the writes is exactly what was added.
func TestCoalescingChangesNothing(t *testing.T) { rapid.Check(t, checkCoalesce) }

func FuzzCoalesce(f *testing.F) { f.Fuzz(rapid.MakeFuzz(checkCoalesce)) }

// Packets straight from the wire, checked only as the engine checks them.
func FuzzCoalesceRaw(f *testing.F) {
	f.Add(tcpSegment(0, 8).Bytes(), tcpSegment(1, 8).Bytes(), uint16(0))
	f.Add(udpDatagram(0, 8).Bytes(), udpDatagram(1, 8).Bytes(), uint16(3))
	f.Add(whole(tcpSegment(0, 0), 2000, tuntest.Partial).Bytes(), tuntest.Packet{Proto: tuntest.UDP, Frag: 9}.Bytes(), uint16(100))
	f.Fuzz(func(t *testing.T, a, b []byte, gso uint16) {
		r, q := newRecorder(t, OffloadFull)
		c := NewCoalescer(576)
		n := 0
		for _, p := range [][]byte{a, b, bytes.Clone(a)} {
			if len(p) < 20 || len(p) > maxPacket {
				continue
			}
			p = bytes.Clone(p)
			p[0] = 4<<4 | p[0]&0xf
			if headerLen(p) < 20 || headerLen(p) > len(p) {
				continue
			}
			put16(p[2:], uint16(len(p)))
			if gso&1 == 0 {
				tuntest.SetIPChecksum(p)
			}
			c.Add(q, p, int(gso), 0)
			n++
		}
		var res Written
		NewWriter().Flush(c, &res)
		if res.Packets != uint64(n) {
			t.Fatalf("%+v of %d", res, n)
		}
		for _, raw := range r.raw {
			if v, _, _ := tuntest.Read(raw); v.GSOType == tuntest.GSOUDP && gso < 20 {
				continue // more segments than the reference takes
			}
			if _, err := tuntest.Split(raw); err != nil {
				t.Fatal(err)
			}
		}
	})
}
