package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"golang.org/x/sys/unix"

	"tweed/capture"
	"tweed/engine/tap"
	"tweed/node"
)

// packetPrinter writes one line a packet.
type packetPrinter struct {
	w        *bufio.Writer
	hello    *capture.Hello
	colour   bool
	json     bool
	peers    int // width of the column
	loc      *time.Location
	printed  uint64 // lines, segments the packets they stand for
	segments uint64
	out      io.Writer
}

func newPacketPrinter(w io.Writer, h *capture.Hello, asJSON, colour bool) *packetPrinter {
	p := &packetPrinter{out: w, w: bufio.NewWriterSize(w, 64<<10), hello: h, colour: colour, json: asJSON, peers: 1, loc: time.Local}
	for _, name := range h.Peers {
		p.peers = max(p.peers, len(name))
	}
	return p
}

// wantsColour is true for a terminal whose user did not say no
// (no-color.org).
func wantsColour(w io.Writer) bool {
	return os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && isTerminal(w)
}

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// Escape sequences of a terminal.
const (
	escRed, escGreen, escCyan = "\x1b[31m", "\x1b[32m", "\x1b[36m"
	escDim, escOff            = "\x1b[2m", "\x1b[0m"
)

// printedPacket is a packet in JSON. A field is added without changing schema.
type printedPacket struct {
	Schema    int    `json:"schema"`
	Time      string `json:"time"`
	ID        uint64 `json:"id"`
	Point     string `json:"point"`
	Direction string `json:"direction"`
	Peer      string `json:"peer,omitempty"`
	PeerAddr  string `json:"peer_address,omitempty"`
	Verdict   string `json:"verdict"`
	Reason    string `json:"reason,omitempty"`
	Explain   string `json:"explain,omitempty"`
	Length    int    `json:"length"`
	Packet    string `json:"packet"`
	Segments  int    `json:"segments,omitempty"`
	Lost      uint64 `json:"lost_before,omitempty"`
}

func (p *packetPrinter) packet(c *capture.Packet, _ *capture.Stats) error {
	p.printed++
	p.segments += uint64(max(c.Segments, 1))
	peer := p.peerName(c)
	text := decodeLine(c)
	when := time.Unix(0, c.Time).In(p.loc)
	if p.json {
		return p.printJSON(c, peer, text, when)
	}
	paint := func(esc, s string) string {
		if !p.colour {
			return s
		}
		return esc + s + escOff
	}
	if c.Segments > 1 {
		text += "  [" + capture.SuperComment(c) + "]"
	}
	arrow, esc := ">", escCyan
	if c.Receive {
		arrow, esc = "<", escGreen
	}
	if c.Point == tap.Drop {
		esc = escRed
		text += "  " + paint(escRed, "DROP "+c.Reason.String()+" ("+c.Reason.Doc()+")")
	}
	if peer == "" {
		peer = "-"
	}
	_, err := fmt.Fprintf(p.w, "%s %s %s %-*s  %s\n", paint(escDim, when.Format("15:04:05.000000000")), paint(esc, fmt.Sprintf("%-8s", c.Point)), paint(esc, arrow), p.peers, peer, text)
	return p.explain(err)
}

func (p *packetPrinter) printJSON(c *capture.Packet, peer, text string, when time.Time) error {
	o := printedPacket{
		Schema: node.Schema, Time: when.Format(time.RFC3339Nano), ID: c.ID, Point: c.Point.String(), Direction: "out",
		Peer: peer, Verdict: "pass", Length: c.Length, Packet: text, Lost: c.Lost,
	}
	if c.Receive {
		o.Direction = "in"
	}
	if c.Segments > 1 {
		o.Segments = c.Segments
	}
	if c.Peer.IsValid() {
		o.PeerAddr = c.Peer.String()
	}
	if c.Point == tap.Drop {
		o.Verdict, o.Reason, o.Explain = "drop", c.Reason.String(), c.Reason.Doc()
	}
	enc := json.NewEncoder(p.w)
	enc.SetEscapeHTML(false)
	return p.explain(enc.Encode(o))
}

// peerName is the name of the node at the other end, its address without one,
// and nothing when there is no other end.
func (p *packetPrinter) peerName(c *capture.Packet) string {
	if !c.Peer.IsValid() {
		return ""
	}
	addr := c.Peer.Addr().String()
	if name := p.hello.Peers[addr]; name != "" {
		return name
	}
	return addr
}

func (p *packetPrinter) flush() error                        { return p.explain(p.w.Flush()) }
func (p *packetPrinter) turn() error                         { return nil }
func (p *packetPrinter) captured() (packets, records uint64) { return p.segments, p.printed }
func (p *packetPrinter) size() int64                         { return 0 }
func (p *packetPrinter) finish(*capture.Stats) error         { return p.flush() }

func (p *packetPrinter) tick(time.Time) error {
	if pipeClosed(p.out) {
		return errClosedPipe
	}
	return nil
}

func (p *packetPrinter) explain(err error) error {
	f := captureFiles{plan: filePlan{path: "standard output"}}
	return f.explain(err)
}

// decodeLine describes a packet in tcpdump's manner.
func decodeLine(c *capture.Packet) string {
	if !c.Outer {
		return describeIP(c.Data)
	}
	var ip layers.IPv4
	var udp layers.UDP
	if ip.DecodeFromBytes(c.Data, gopacket.NilDecodeFeedback) != nil || udp.DecodeFromBytes(ip.Payload, gopacket.NilDecodeFeedback) != nil {
		return "[cut short]"
	}
	outer := fmt.Sprintf("IP %s.%d > %s.%d: ", ip.SrcIP, uint16(udp.SrcPort), ip.DstIP, uint16(udp.DstPort))
	payload := udp.Payload
	if !c.VXLAN {
		return outer + describeIP(payload)
	}
	var v layers.VXLAN
	var eth layers.Ethernet
	if v.DecodeFromBytes(payload, gopacket.NilDecodeFeedback) != nil || eth.DecodeFromBytes(v.Payload, gopacket.NilDecodeFeedback) != nil {
		return outer + "VXLAN [cut short]"
	}
	return fmt.Sprintf("%sVXLAN vni %d: %s", outer, v.VNI, describeIP(eth.Payload))
}

// describeIP describes a packet inside the tunnel.
func describeIP(b []byte) string {
	if len(b) > 0 && b[0]>>4 == 6 {
		return describeIP6(b)
	}
	var ip layers.IPv4
	if err := ip.DecodeFromBytes(b, gopacket.NilDecodeFeedback); err != nil {
		return fmt.Sprintf("[no IPv4 packet, %d bytes: % x]", len(b), b[:min(len(b), 16)])
	}
	length := max(int(ip.Length)-int(ip.IHL)*4, 0)
	if ip.FragOffset > 0 {
		return fmt.Sprintf("IP %s > %s: %s fragment at %d, length %d", ip.SrcIP, ip.DstIP, ip.Protocol, int(ip.FragOffset)*8, length)
	}
	switch ip.Protocol {
	case layers.IPProtocolTCP:
		var t layers.TCP
		if t.DecodeFromBytes(ip.Payload, gopacket.NilDecodeFeedback) == nil {
			return fmt.Sprintf("IP %s.%d > %s.%d: %s", ip.SrcIP, uint16(t.SrcPort), ip.DstIP, uint16(t.DstPort), describeTCP(&t, length))
		}
	case layers.IPProtocolUDP:
		var u layers.UDP
		if u.DecodeFromBytes(ip.Payload, gopacket.NilDecodeFeedback) == nil {
			return fmt.Sprintf("IP %s.%d > %s.%d: UDP, length %d", ip.SrcIP, uint16(u.SrcPort), ip.DstIP, uint16(u.DstPort), max(int(u.Length)-8, 0))
		}
	case layers.IPProtocolICMPv4:
		var i layers.ICMPv4
		if i.DecodeFromBytes(ip.Payload, gopacket.NilDecodeFeedback) == nil {
			return fmt.Sprintf("IP %s > %s: %s, length %d", ip.SrcIP, ip.DstIP, describeICMP(&i), length)
		}
	}
	return fmt.Sprintf("IP %s > %s: %s, length %d", ip.SrcIP, ip.DstIP, ip.Protocol, length)
}

func describeIP6(b []byte) string {
	var ip layers.IPv6
	if err := ip.DecodeFromBytes(b, gopacket.NilDecodeFeedback); err != nil {
		return fmt.Sprintf("IP6 [cut short, %d bytes]", len(b))
	}
	return fmt.Sprintf("IP6 %s > %s: %s, length %d", ip.SrcIP, ip.DstIP, ip.NextHeader, ip.Length)
}

func describeTCP(t *layers.TCP, length int) string {
	var flags strings.Builder
	for _, f := range []struct {
		on   bool
		name byte
	}{{t.SYN, 'S'}, {t.FIN, 'F'}, {t.RST, 'R'}, {t.PSH, 'P'}, {t.URG, 'U'}, {t.ECE, 'E'}, {t.CWR, 'W'}, {t.ACK, '.'}} {
		if f.on {
			flags.WriteByte(f.name)
		}
	}
	if flags.Len() == 0 {
		flags.WriteString("none")
	}
	length = max(length-int(t.DataOffset)*4, 0)
	seq := fmt.Sprint("seq ", t.Seq)
	if length > 0 {
		seq += fmt.Sprint(":", t.Seq+uint32(length))
	}
	if t.ACK {
		seq += fmt.Sprint(", ack ", t.Ack)
	}
	return fmt.Sprintf("Flags [%s], %s, win %d, length %d", flags.String(), seq, t.Window, length)
}

func describeICMP(i *layers.ICMPv4) string {
	switch i.TypeCode.Type() {
	case layers.ICMPv4TypeEchoRequest:
		return fmt.Sprintf("ICMP echo request, id %d, seq %d", i.Id, i.Seq)
	case layers.ICMPv4TypeEchoReply:
		return fmt.Sprintf("ICMP echo reply, id %d, seq %d", i.Id, i.Seq)
	}
	return "ICMP " + i.TypeCode.String()
}
