package pcapng

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
)

// start is the time of the first packet of the sample file.
const start = int64(1_790_000_000_123_456_789)

// samplePacket returns an IPv4 UDP datagram with n bytes of payload and valid
// checksums, from 10.77.1.5:41000 to 10.77.2.9:7777.
func samplePacket(n int) []byte {
	p := make([]byte, 28+n)
	p[0], p[8], p[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	copy(p[12:], []byte{10, 77, 1, 5, 10, 77, 2, 9})
	binary.BigEndian.PutUint16(p[10:], ^checksum(p[:20], 0))
	binary.BigEndian.PutUint16(p[20:], 41000)
	binary.BigEndian.PutUint16(p[22:], 7777)
	binary.BigEndian.PutUint16(p[24:], uint16(8+n))
	for i := range n {
		p[28+i] = byte(i)
	}
	binary.BigEndian.PutUint16(p[26:], ^checksum(p[12:], 17+uint32(8+n)))
	return p
}

func checksum(b []byte, sum uint32) uint16 {
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 != 0 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

func sampleHeader() *Header {
	return &Header{
		Hardware: "x86_64, 2 CPUs", OS: "Linux 6.1", Application: "tweed 1.0",
		Comment: "node n1, framing vxlan, VNI 1, lease 10.77.1.0/24",
		Link:    LinkIPv4, SnapLen: 128,
		Interfaces: []Interface{
			{Name: "tun-in", Description: "read from the TUN device", Filter: "udp port 7777"},
			{Name: "wire-out", Description: "sent on the underlay; outer headers are made up"},
			{Name: "drop", Description: "discarded, with the reason"},
		},
	}
}

// samplePackets are packets with everything a packet can have.
func samplePackets() []Packet {
	return []Packet{
		{Interface: 0, Time: start, Data: samplePacket(10), Flags: FlagOutbound | FlagChecksumValid, Has: HasID | HasQueue, ID: 42, Queue: 1},
		{Interface: 1, Time: start + 1, Data: samplePacket(60), Flags: FlagOutbound, Has: HasID | HasQueue | HasDropCount, ID: 42, Queue: 1, DropCount: 7},
		{Interface: 2, Time: start + 1000, Data: samplePacket(11), Flags: FlagInbound, Has: HasID, ID: math.MaxUint64, Comment: "drop:no-route (no lease covers 10.77.9.9)"},
		{Interface: 0, Time: start + 2_000_000_001, Data: samplePacket(1400), Flags: FlagInbound | FlagChecksumNotReady | FlagSuperPacket, Has: HasDropCount},
		{Interface: 2, Time: start + 3_000_000_000, Data: samplePacket(0), Length: 9000, Comment: "ümläut"},
	}
}

// sampleStatistics are the counters of interface i in the sample file.
func sampleStatistics(i int) *Statistics {
	n := uint64(i)
	return &Statistics{Interface: i, Time: start + 4e9, Start: start, End: start + 4e9,
		Received: 100 + n, Dropped: 10 + n, Accepted: 90 + n, OSDropped: n, Delivered: 80 + n}
}

// write returns the file w writes: the sample packets and statistics.
func write(t testing.TB, h *Header) []byte {
	t.Helper()
	var file bytes.Buffer
	w, err := NewWriter(&file, h)
	if err != nil {
		t.Fatal(err)
	}
	err = w.WriteNames([]Name{
		{netip.MustParseAddr("10.77.1.5"), "n1"}, {netip.MustParseAddr("2001:db8::1"), "n6"},
		{netip.Addr{}, "nobody"}, {netip.MustParseAddr("10.0.0.1"), ""},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range samplePackets() {
		if err := w.WritePacket(&p); err != nil {
			t.Fatal(err)
		}
	}
	for i := range h.Interfaces {
		if err := w.WriteStatistics(sampleStatistics(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	if w.Size() != int64(file.Len()) {
		t.Errorf("Size says %d bytes, the file has %d", w.Size(), file.Len())
	}
	return file.Bytes()
}

// readAll returns copies of all packets of a file.
func readAll(t testing.TB, r *Reader) []Packet {
	t.Helper()
	var all []Packet
	for {
		var p Packet
		switch err := r.Next(&p); {
		case err == io.EOF:
			return all
		case err != nil:
			t.Fatal(err)
		}
		p.Data = bytes.Clone(p.Data)
		all = append(all, p)
	}
}

func newReader(t testing.TB, file []byte) *Reader {
	t.Helper()
	r, err := NewReader(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// asRead is what a packet becomes in a file with a snap length.
func asRead(p Packet, snapLen int) Packet {
	p.Length = p.length()
	p.Data = p.Data[:min(len(p.Data), snapLen)]
	return p
}

func TestReaderReturnsWhatWasWritten(t *testing.T) {
	h := sampleHeader()
	r := newReader(t, write(t, h))
	got := readAll(t, r)
	want := samplePackets()
	for i := range want {
		want[i] = asRead(want[i], 128)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
	head := r.Header()
	for n, i := range r.Interfaces() {
		if want := sampleStatistics(n); !reflect.DeepEqual(i.Statistics, want) {
			t.Errorf("interface %q: statistics %+v, want %+v", i.Name, i.Statistics, want)
		}
		if i.Link != LinkIPv4 || i.SnapLen != 128 {
			t.Errorf("interface %q: link type %d, snap length %d", i.Name, i.Link, i.SnapLen)
		}
		head.Interfaces = append(head.Interfaces, i.Interface)
	}
	if !reflect.DeepEqual(&head, h) {
		t.Errorf("header: got %+v, want %+v", head, *h)
	}
}

func TestReaderDoesNotDependOnHowBytesArrive(t *testing.T) {
	file := write(t, sampleHeader())
	r, err := NewReader(iotest.OneByteReader(bytes.NewReader(file)))
	if err != nil {
		t.Fatal(err)
	}
	if n := len(readAll(t, r)); n != len(samplePackets()) {
		t.Errorf("%d packets, want %d", n, len(samplePackets()))
	}
}

func TestClassicFilesRoundTripInEveryForm(t *testing.T) {
	for _, nanos := range []bool{false, true} {
		var file bytes.Buffer
		w, err := NewPcapWriter(&file, LinkIPv4, 100, nanos)
		if err != nil {
			t.Fatal(err)
		}
		var want []Packet
		for _, p := range samplePackets() {
			if err := w.WritePacket(&p); err != nil {
				t.Fatal(err)
			}
			q := Packet{Time: p.Time, Data: p.Data, Length: p.Length}
			if !nanos {
				q.Time -= q.Time % 1000
			}
			want = append(want, asRead(q, 100))
		}
		if err := w.Flush(); err != nil || w.Size() != int64(file.Len()) {
			t.Fatalf("Flush: %v; Size %d of %d", err, w.Size(), file.Len())
		}
		for name, f := range map[string][]byte{"little endian": file.Bytes(), "big endian": swapClassic(file.Bytes())} {
			r := newReader(t, f)
			if got := readAll(t, r); !reflect.DeepEqual(got, want) {
				t.Errorf("nanoseconds %v, %s: got\n%+v\nwant\n%+v", nanos, name, got, want)
			}
			if i := r.Interfaces()[0]; i.Link != LinkIPv4 || i.SnapLen != 100 {
				t.Errorf("nanoseconds %v, %s: interface %+v", nanos, name, i)
			}
		}
	}
}

// swapClassic turns a little-endian classic file into a big-endian one.
func swapClassic(file []byte) []byte {
	out := bytes.Clone(file)
	swap := func(at, size int) {
		for i := range size / 2 {
			out[at+i], out[at+size-1-i] = out[at+size-1-i], out[at+i]
		}
	}
	swap(0, 4)
	swap(4, 2)
	swap(6, 2)
	for at := 8; at < 24; at += 4 {
		swap(at, 4)
	}
	for at := 24; at < len(out); {
		n := int(le.Uint32(out[at+8:]))
		for i := range 4 {
			swap(at+4*i, 4)
		}
		at += 16 + n
	}
	return out
}

func TestTimesOfAnyUnitAreConverted(t *testing.T) {
	for _, c := range []struct {
		clock clock
		t     uint64
		want  int64
	}{
		{clock{decimals: 6}, 1_500_000, 1_500_000_000},
		{clock{decimals: 9}, 1_500_000, 1_500_000},
		{clock{decimals: 0}, 3, 3_000_000_000},
		{clock{decimals: 12}, 1_999, 1},
		{clock{decimals: 28}, math.MaxUint64, 1},
		{clock{decimals: 127}, math.MaxUint64, 0},
		{clock{decimals: 10, binary: true}, 1536, 1_500_000_000},
		{clock{decimals: 0, binary: true}, 2, 2_000_000_000},
		{clock{decimals: 127, binary: true}, math.MaxUint64, 0},
		{clock{decimals: 32, binary: true}, 5<<32 | 1<<31, 5_500_000_000},
		{clock{decimals: 6, offset: 10}, 1, 10_000_001_000},
		{clock{decimals: 6, offset: -1}, 1_000_000, 0},
		{clock{decimals: 0}, math.MaxUint64, math.MaxInt64},
		{clock{decimals: 9, offset: math.MaxInt64}, math.MaxInt64, math.MaxInt64},
		{clock{decimals: 9, offset: math.MinInt64}, 0, -9_223_372_036_000_000_000},
	} {
		if got := c.clock.nanoseconds(c.t); got != c.want {
			t.Errorf("%+v, %d: got %d, want %d", c.clock, c.t, got, c.want)
		}
	}
}

func TestWritersDoNotAllocatePerPacket(t *testing.T) {
	w, err := NewWriter(io.Discard, sampleHeader())
	if err != nil {
		t.Fatal(err)
	}
	pw, err := NewPcapWriter(io.Discard, LinkIPv4, 0, true)
	if err != nil {
		t.Fatal(err)
	}
	packets := samplePackets()
	stats := &Statistics{Received: 5}
	n := testing.AllocsPerRun(2000, func() {
		for i := range packets {
			if w.WritePacket(&packets[i]) != nil || pw.WritePacket(&packets[i]) != nil {
				t.Fatal("a write failed")
			}
		}
		if w.WriteStatistics(stats) != nil {
			t.Fatal("a write failed")
		}
	})
	if n != 0 {
		t.Errorf("%v allocations for %d packets, want 0", n, len(packets))
	}
}

func TestReaderDoesNotAllocatePerPacket(t *testing.T) {
	h := sampleHeader()
	h.SnapLen = 0
	var file bytes.Buffer
	w, err := NewWriter(&file, h)
	if err != nil {
		t.Fatal(err)
	}
	p := samplePackets()[1]
	for range 2000 {
		if err := w.WritePacket(&p); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	r := newReader(t, file.Bytes())
	var got Packet
	if n := testing.AllocsPerRun(1000, func() {
		if err := r.Next(&got); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations per packet, want 0", n)
	}
}

func TestWriterRefusesWhatToolsWouldNotRead(t *testing.T) {
	two := []Interface{{Name: "a"}, {Name: "b"}}
	for want, h := range map[string]*Header{
		"at least one interface": {Link: LinkIPv4},
		"use 228":                {Link: LinkRaw, Interfaces: two},
		"snap length":            {Link: LinkIPv4, SnapLen: MaxSnapLen + 1, Interfaces: two},
	} {
		if _, err := NewWriter(io.Discard, h); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	if _, err := NewPcapWriter(io.Discard, LinkIPv4, MaxSnapLen+1, true); err == nil {
		t.Error("classic: no error for a snap length beyond the limit")
	}
	w, err := NewWriter(io.Discard, &Header{Link: LinkIPv4, Interfaces: two})
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{-1, 2} {
		if err := w.WritePacket(&Packet{Interface: i}); err == nil {
			t.Errorf("no error for a packet of interface %d", i)
		}
		if err := w.WriteStatistics(&Statistics{Interface: i}); err == nil {
			t.Errorf("no error for statistics of interface %d", i)
		}
	}
}

// failingWriter takes a number of bytes and then fails.
type failingWriter struct{ room int }

var errFull = errors.New("no space left on device")

func (w *failingWriter) Write(b []byte) (int, error) {
	if w.room -= len(b); w.room < 0 {
		return 0, errFull
	}
	return len(b), nil
}

func TestWriterStaysFailedAfterAFailedWrite(t *testing.T) {
	w, err := NewWriter(&failingWriter{room: bufferSize * 2}, sampleHeader())
	if err != nil {
		t.Fatal(err)
	}
	p := samplePackets()[0]
	for range 10_000 {
		if err = w.WritePacket(&p); err != nil {
			break
		}
	}
	if !errors.Is(err, errFull) {
		t.Fatalf("got %v, want %v", err, errFull)
	}
	for name, again := range map[string]error{"WritePacket": w.WritePacket(&p), "WriteStatistics": w.WriteStatistics(&Statistics{}),
		"WriteNames": w.WriteNames(nil), "Flush": w.Flush()} {
		if !errors.Is(again, errFull) {
			t.Errorf("%s afterwards: got %v, want %v", name, again, errFull)
		}
	}
}

// TestStatisticsBlockIsAsSpecified compares with bytes put together by hand after
// draft-ietf-opsawg-pcapng-03 section 4.6, since no tool shows all the counters.
func TestStatisticsBlockIsAsSpecified(t *testing.T) {
	got := AppendStatistics(nil, &Statistics{Interface: 2, Time: 0x0102030405060708, Start: 0x1112131415161718, End: 0x2122232425262728,
		Received: 0x31, Dropped: 0x32, Accepted: 0x33, OSDropped: 0x34, Delivered: 0x35})
	want := "\x05\x00\x00\x00" + "\x70\x00\x00\x00" + "\x02\x00\x00\x00" +
		"\x04\x03\x02\x01" + "\x08\x07\x06\x05" + // time, upper half first
		"\x02\x00\x08\x00" + "\x14\x13\x12\x11" + "\x18\x17\x16\x15" + // isb_starttime
		"\x03\x00\x08\x00" + "\x24\x23\x22\x21" + "\x28\x27\x26\x25" + // isb_endtime
		"\x04\x00\x08\x00" + "\x31\x00\x00\x00\x00\x00\x00\x00" + // isb_ifrecv
		"\x05\x00\x08\x00" + "\x32\x00\x00\x00\x00\x00\x00\x00" + // isb_ifdrop
		"\x06\x00\x08\x00" + "\x33\x00\x00\x00\x00\x00\x00\x00" + // isb_filteraccept
		"\x07\x00\x08\x00" + "\x34\x00\x00\x00\x00\x00\x00\x00" + // isb_osdrop
		"\x08\x00\x08\x00" + "\x35\x00\x00\x00\x00\x00\x00\x00" + // isb_usrdeliv
		"\x00\x00\x00\x00" + "\x70\x00\x00\x00"
	if string(got) != want {
		t.Errorf("got  %x\nwant %x", got, want)
	}
}

func TestLongTextsAreCutToWhatAnOptionHolds(t *testing.T) {
	h := sampleHeader()
	h.Comment = strings.Repeat("ä", 40_000)
	h.Interfaces[0].Filter = strings.Repeat("f", 70_000)
	r := newReader(t, write(t, h))
	got := r.Header().Comment
	if len(got) > maxOption || len(got) < maxOption-1 || strings.Trim(got, "ä") != "" {
		t.Errorf("a comment of %d bytes came back as %d, %q at its end", len(h.Comment), len(got), got[max(len(got)-4, 0):])
	}
	if n := len(readAll(t, r)); n != len(samplePackets()) {
		t.Errorf("%d packets, want %d", n, len(samplePackets()))
	}
}

func TestTruncatedFilesYieldWhatIsComplete(t *testing.T) {
	var pcap bytes.Buffer
	w, err := NewPcapWriter(&pcap, LinkIPv4, 0, true)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range samplePackets() {
		if err := w.WritePacket(&p); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	for name, file := range map[string][]byte{"pcapng": write(t, sampleHeader()), "pcap": pcap.Bytes()} {
		before := 0
		for n := range file {
			r, err := NewReader(bytes.NewReader(file[:n]))
			packets := 0
			for err == nil {
				var p Packet
				if err = r.Next(&p); err == nil {
					packets++
				}
			}
			var format *FormatError
			if err != io.EOF && !(errors.As(err, &format) && errors.Is(err, io.ErrUnexpectedEOF)) {
				t.Fatalf("%s cut to %d of %d bytes: %v", name, n, len(file), err)
			}
			if packets < before {
				t.Fatalf("%s cut to %d bytes: %d packets, %d with less", name, n, packets, before)
			}
			before = packets
		}
	}
}
