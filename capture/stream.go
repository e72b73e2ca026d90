package capture

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"

	"tweed/engine"
	"tweed/engine/tap"
)

// A stream is a sequence of frames: a length, a kind and that many bytes of
// body, numbers in little-endian order. It is made for one machine and one
// version of tweed; the hello frame says which.
const (
	streamVersion = 1
	headLen       = 4 + 1
	packetLen     = 52
	maxFrame      = MaxSnap + 4096
)

const (
	kindHello  = 'H'
	kindPacket = 'P'
	kindStats  = 'S'
	kindEnd    = 'E'
)

// Hello says whose stream it is.
type Hello struct {
	Stream  int    `json:"stream"`
	ID      string `json:"id"` // of the session, to end it by
	Version string `json:"version"`
	Node    string `json:"node"`
	NodeID  string `json:"node_id"`
	// Address is the node's underlay address.
	Address string `json:"address,omitempty"`
	// Device is the TUN device; empty when only containers are attached.
	Device string `json:"device,omitempty"`
	// Framing, Subnet, MTU (bytes) and VNI are missing while the node waits for
	// them.
	Framing string `json:"framing,omitempty"`
	Subnet  string `json:"subnet,omitempty"`
	MTU     int    `json:"mtu,omitempty"`
	VNI     uint32 `json:"vni,omitempty"`
	// Ports are the framings by UDP port.
	Ports  map[uint16]string `json:"ports"`
	Points []string          `json:"points"`
	Snap   int               `json:"snap"`
	// SuperPackets says that super-packets are in one piece.
	SuperPackets bool   `json:"super_packets,omitempty"`
	Filter       string `json:"filter,omitempty"`
	// Peers are the names of underlay addresses.
	Peers map[string]string `json:"peers,omitempty"`
}

func frameLen(p *Packet) int { return headLen + packetLen + len(p.Data) }

func appendHead(b []byte, kind byte, n int) []byte {
	return append(binary.LittleEndian.AppendUint32(b, uint32(n)), kind)
}

const (
	bitReceive = 1 << iota
	bitOuter
	bitVXLAN
	bitUnfinished
)

func appendPacket(b []byte, p *Packet) []byte {
	var bits uint8
	for i, on := range [...]bool{p.Receive, p.Outer, p.VXLAN, p.Unfinished} {
		if on {
			bits |= 1 << i
		}
	}
	b = appendHead(b, kindPacket, packetLen+len(p.Data))
	var h [packetLen]byte
	binary.LittleEndian.PutUint64(h[0:], uint64(p.Time))
	binary.LittleEndian.PutUint64(h[8:], p.ID)
	binary.LittleEndian.PutUint64(h[16:], p.Lost)
	h[24], h[25], h[26], h[27] = uint8(p.Point), uint8(p.Reason), bits, p.Worker
	binary.LittleEndian.PutUint32(h[28:], uint32(p.Length))
	binary.LittleEndian.PutUint32(h[32:], uint32(p.Segments))
	binary.LittleEndian.PutUint32(h[36:], uint32(p.SegmentPayload))
	putAddr(h[40:], p.Peer)
	putAddr(h[46:], p.Local)
	b = append(b, h[:]...)
	return append(b, p.Data...)
}

// AppendHello appends the frame a stream starts with.
func AppendHello(b []byte, h Hello) ([]byte, error) {
	h.Stream = streamVersion
	return appendJSON(b, kindHello, h)
}

// AppendStats appends statistics, which say how far a stream has come. The
// final ones are the last frame of a stream that is complete.
func AppendStats(b []byte, s Stats, final bool) ([]byte, error) {
	kind := byte(kindStats)
	if final {
		kind = kindEnd
	}
	return appendJSON(b, kind, s)
}

func appendJSON(b []byte, kind byte, v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	return append(appendHead(b, kind, len(body)), body...), nil
}

// Reader decodes a stream. It belongs to one goroutine.
type Reader struct {
	r    *bufio.Reader
	body []byte // in the buffer of r
	held int    // bytes of it to discard
	// Stats are the last statistics that came.
	Stats Stats
	// Complete says that they were the final ones.
	Complete bool
}

// NewReader reads the hello frame of a stream.
func NewReader(r io.Reader) (*Reader, Hello, error) {
	d := &Reader{r: bufio.NewReaderSize(r, 1<<20)}
	var h Hello
	kind, err := d.frame()
	if err != nil {
		return nil, h, err
	}
	if kind != kindHello || json.Unmarshal(d.body, &h) != nil {
		return nil, h, fmt.Errorf("capture: the stream does not start with a greeting")
	}
	if h.Stream != streamVersion {
		return nil, h, fmt.Errorf("capture: the engine is version %s and speaks stream %d, this command stream %d: use the same version", h.Version, h.Stream, streamVersion)
	}
	return d, h, nil
}

// frame makes d.body the body of the next frame, in the buffer of d.r.
func (d *Reader) frame() (byte, error) {
	if _, err := d.r.Discard(d.held); err != nil {
		return 0, err
	}
	d.held = 0
	head, err := d.r.Peek(headLen)
	if err != nil {
		return 0, cutShort(err, len(head))
	}
	n, kind := binary.LittleEndian.Uint32(head), head[4]
	if n > maxFrame {
		return 0, fmt.Errorf("capture: a frame of %d bytes in the stream", n)
	}
	whole, err := d.r.Peek(headLen + int(n))
	if err != nil {
		return 0, cutShort(err, len(whole))
	}
	d.held, d.body = len(whole), whole[headLen:]
	return kind, nil
}

// cutShort tells the end of a stream between frames from one inside a frame.
func cutShort(err error, have int) error {
	if err == io.EOF && have > 0 {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Next decodes the next packet into p, whose Data is borrowed until the next
// call. It returns io.EOF at the end of the stream.
func (d *Reader) Next(p *Packet) error {
	for {
		kind, err := d.frame()
		if err != nil {
			return err
		}
		switch kind {
		case kindPacket:
			return decodePacket(d.body, p)
		case kindStats, kindEnd:
			if err := json.Unmarshal(d.body, &d.Stats); err != nil {
				return fmt.Errorf("capture: statistics in the stream: %w", err)
			}
			d.Complete = kind == kindEnd
		}
	}
}

// decodePacket is the inverse of appendPacket, for the body of a frame.
func decodePacket(b []byte, p *Packet) error {
	if len(b) < packetLen {
		return fmt.Errorf("capture: a packet frame of %d bytes in the stream", len(b))
	}
	bits := b[26]
	*p = Packet{
		Time: int64(binary.LittleEndian.Uint64(b)), ID: binary.LittleEndian.Uint64(b[8:]), Lost: binary.LittleEndian.Uint64(b[16:]),
		Point: tap.Point(b[24]), Reason: engine.Reason(b[25]), Worker: b[27],
		Receive: bits&bitReceive != 0, Outer: bits&bitOuter != 0, VXLAN: bits&bitVXLAN != 0, Unfinished: bits&bitUnfinished != 0,
		Length: int(binary.LittleEndian.Uint32(b[28:])), Segments: int(binary.LittleEndian.Uint32(b[32:])),
		SegmentPayload: int(binary.LittleEndian.Uint32(b[36:])),
		Peer:           readAddr(b[40:]), Local: readAddr(b[46:]),
		Data: b[packetLen:],
	}
	return nil
}

func putAddr(b []byte, a netip.AddrPort) {
	if a.IsValid() {
		ip := a.Addr().As4()
		copy(b, ip[:])
		binary.LittleEndian.PutUint16(b[4:], a.Port())
	}
}

func readAddr(b []byte) netip.AddrPort {
	ip := [4]byte(b[:4])
	if ip == [4]byte{} {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(netip.AddrFrom4(ip), binary.LittleEndian.Uint16(b[4:]))
}
