package pcapng

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"
)

// rawBlock makes a little-endian block around a body.
func rawBlock(kind uint32, body ...byte) []byte {
	b := le.AppendUint32(nil, kind)
	n := uint32(12 + len(body))
	b = le.AppendUint32(b, n)
	b = append(b, body...)
	return le.AppendUint32(b, n)
}

// words encodes 32-bit numbers, little endian.
func words(v ...uint32) (b []byte) {
	for _, x := range v {
		b = le.AppendUint32(b, x)
	}
	return b
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

var (
	rawSection   = rawBlock(blockSection, words(byteOrderMagic, 1, 0xffffffff, 0xffffffff)...)
	rawInterface = rawBlock(blockInterface, words(LinkIPv4, 0)...)
)

func TestBrokenFilesAreRefusedWithTheReason(t *testing.T) {
	packet := func(w ...uint32) []byte { return rawBlock(blockEnhanced, words(w...)...) }
	for want, file := range map[string][]byte{
		"shorter than a magic":             {},
		"not a capture file":               []byte("GIF89a and more"),
		"without the byte-order magic":     rawBlock(blockSection, words(1, 1, 0, 0)...),
		"version 2":                        rawBlock(blockSection, words(byteOrderMagic, 2, 0, 0)...),
		"section header of 24 bytes":       rawBlock(blockSection, words(byteOrderMagic, 1, 0)...),
		"section header of 4294967292":     words(blockSection, 0xfffffffc, byteOrderMagic, 1, 0, 0, 0),
		"interface 0; 0 have been":         join(rawSection, packet(0, 0, 0, 0, 0)),
		"interface 7; 1 have been":         join(rawSection, rawInterface, packet(7, 0, 0, 0, 0)),
		"packet block of 8 bytes":          join(rawSection, rawInterface, packet(0, 0)),
		"packet of 5 bytes in a block":     join(rawSection, rawInterface, packet(0, 0, 0, 5, 5, 0)),
		"packet of 4294967295 bytes in a":  join(rawSection, rawInterface, packet(0, 0, 0, 0xffffffff, 5, 0)),
		"a packet of 9 bytes in a block":   join(rawSection, rawInterface, rawBlock(blockSimple, words(9, 0, 0)...)),
		"statistics block of 4 bytes":      join(rawSection, rawInterface, rawBlock(blockStatistics, 0, 0, 0, 0)),
		"option 4 of statistics has 4":     join(rawSection, rawInterface, rawBlock(blockStatistics, words(0, 0, 0, 4|4<<16, 1)...)),
		"simple packet block of 0 bytes":   join(rawSection, rawInterface, rawBlock(blockSimple)),
		"interface block of 4 bytes":       join(rawSection, rawBlock(blockInterface, 0, 0, 0, 0)),
		"a block of 8 bytes":               join(rawSection, words(5, 8)),
		"a block of 13 bytes":              join(rawSection, words(5, 13, 0, 0)),
		"16 bytes at its start and 20":     join(rawSection, words(77, 16, 0, 20)),
		"20 bytes at its start and 24":     join(rawSection, words(blockInterface, 20, LinkIPv4, 0, 24)),
		"a block of 2147483648 bytes":      join(rawSection, words(blockEnhanced, 0x80000000, 0, 0)),
		"in the middle of a block":         join(rawSection, words(77, 0xfffffffc, 0, 0)),
		"option 2 of 99 bytes is longer":   join(rawSection, rawBlock(blockInterface, words(LinkIPv4, 0, 2|99<<16)...)),
		"option 5 of a packet has 4 bytes": join(rawSection, rawInterface, packet(0, 0, 0, 0, 0, 5|4<<16, 1)),
		"pcap version 7":                   words(magicMicros, 7, 0, 0, 0, 0),
		"in the middle of the file header": words(magicMicros, 2|4<<16, 0),
		"in the middle of a packet header": words(magicMicros, 2|4<<16, 0, 0, 0, 1, 1),
		"a packet of 1048577 bytes, more":  words(magicNanos, 2|4<<16, 0, 0, 0, 1, 0, 0, maxBlock+1, 0),
		"in the middle of a packet":        words(magicNanos, 2|4<<16, 0, 0, 0, 1, 0, 0, maxBlock, 0, 1, 2),
		"more than 4096 interfaces":        join(rawSection, bytes.Repeat(rawInterface, maxInterfaces+1)),
	} {
		err := drain(file)
		var format *FormatError
		if !errors.As(err, &format) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		} else if format.Offset < 0 || format.Offset > int64(len(file)) {
			t.Errorf("%v: points outside the file of %d bytes", err, len(file))
		}
	}
}

// drain reads a file to its end and returns the error there.
func drain(file []byte) error {
	r, err := NewReader(bytes.NewReader(file))
	var p Packet
	for err == nil {
		err = r.Next(&p)
	}
	return err
}

func TestReadErrorsArePassedOn(t *testing.T) {
	broken := errors.New("input/output error")
	file := write(t, sampleHeader())
	for _, n := range []int{0, 2, 100, len(file) / 2, len(file)} {
		r, err := NewReader(io.MultiReader(bytes.NewReader(file[:n]), &brokenReader{broken}))
		var p Packet
		for err == nil {
			err = r.Next(&p)
		}
		if !errors.Is(err, broken) {
			t.Errorf("after %d bytes: got %v, want %v", n, err, broken)
		}
	}
}

type brokenReader struct{ err error }

func (b *brokenReader) Read([]byte) (int, error) { return 0, b.err }

func TestUnknownBlocksAndSecondSectionsAreReadOver(t *testing.T) {
	big := make([]byte, 3<<20)
	file := join(
		rawSection, rawBlock(0x0bad, big...), rawInterface,
		rawBlock(blockEnhanced, join(words(0, 0, 1000, 3, 60), []byte{1, 2, 3, 0})...),
		rawBlock(blockStatistics, words(0, 0, 0)...), rawBlock(blockNames, words(0)...),
		rawSection, rawBlock(blockInterface, words(LinkEthernet, 2)...),
		rawBlock(blockSimple, join(words(60), []byte{4, 5, 0, 0})...),
		rawBlock(blockObsolete, join(words(0|9<<16, 0, 7, 1, 1), []byte{6, 0, 0, 0}, words(2|4<<16, 2))...),
		rawBlock(0x40000bad), // a local block, at the end
	)
	r := newReader(t, file)
	got := readAll(t, r)
	want := []Packet{
		{Time: 1_000_000, Data: []byte{1, 2, 3}, Length: 60},
		{Data: []byte{4, 5}, Length: 60},
		{Time: 7000, Data: []byte{6}, Length: 1, Has: HasDropCount, DropCount: 9, Flags: FlagOutbound},
	}
	if len(got) != len(want) {
		t.Fatalf("%d packets, want %d", len(got), len(want))
	}
	for i := range want {
		if !bytes.Equal(got[i].Data, want[i].Data) || got[i].Length != want[i].Length || got[i].Time != want[i].Time ||
			got[i].Has != want[i].Has || got[i].DropCount != want[i].DropCount || got[i].Flags != want[i].Flags {
			t.Errorf("packet %d: got %+v, want %+v", i, got[i], want[i])
		}
	}
	if i := r.Interfaces(); len(i) != 1 || i[0].Link != LinkEthernet {
		t.Errorf("interfaces of the second section: %+v", i)
	}
}

func TestCommentsOfAPacketAreJoined(t *testing.T) {
	options := join(words(1|1<<16), []byte{'a', 0, 0, 0}, words(1|2<<16), []byte{'b', 'c', 0, 0}, words(0))
	file := join(rawSection, rawInterface, rawBlock(blockEnhanced, join(words(0, 0, 0, 0, 0), options)...))
	if got := readAll(t, newReader(t, file)); len(got) != 1 || got[0].Comment != "a\nbc" {
		t.Errorf("got %+v", got)
	}
}

func TestReaderMemoryIsBounded(t *testing.T) {
	// Interfaces with the longest texts, then claims of huge blocks.
	text := join(words(2|0xffff<<16), make([]byte, 65536), words(3|0xffff<<16), make([]byte, 65536), words(0))
	files := map[string]io.Reader{
		"interfaces": io.MultiReader(bytes.NewReader(rawSection),
			&repeat{block: rawBlock(blockInterface, join(words(LinkIPv4, 0), text)...), n: maxInterfaces}),
		"sections": &repeat{block: join(rawSection, rawInterface), n: 100_000},
		"claims":   bytes.NewReader(join(rawSection, rawInterface, words(blockEnhanced, maxBlock+1000, 0))),
	}
	for name, file := range files {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		r, err := NewReader(file)
		var p Packet
		for err == nil {
			err = r.Next(&p)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 32<<20 {
			t.Errorf("%s: the heap grew by %d MiB", name, grown>>20)
		}
		runtime.KeepAlive(r)
	}
}

// repeat reads a block n times.
type repeat struct {
	block []byte
	n, at int
}

func (r *repeat) Read(b []byte) (int, error) {
	if r.n == 0 {
		return 0, io.EOF
	}
	n := copy(b, r.block[r.at:])
	if r.at += n; r.at == len(r.block) {
		r.at = 0
		r.n--
	}
	return n, nil
}

// FuzzReader checks that no input makes the reader panic, run on, or return a
// packet or an error that makes no sense.
func FuzzReader(f *testing.F) {
	file := write(f, sampleHeader())
	f.Add(file)
	f.Add(join(rawSection, rawInterface, rawBlock(blockSimple, words(4, 0)...), rawBlock(blockObsolete, words(0, 0, 0, 0, 0)...)))
	classic := words(magicNanos, 2|4<<16, 0, 0, 65535, LinkIPv4, 1, 2, 4, 4, 0)
	f.Add(classic)
	f.Add(swapClassic(classic))
	bigEndian := binary.BigEndian.AppendUint32(nil, blockSection)
	for _, w := range []uint32{28, byteOrderMagic, 1 << 16, 0, 0, 28, blockInterface, 20, LinkIPv4 << 16, 0, 20, blockEnhanced, 32, 0, 0, 0, 0, 0, 32} {
		bigEndian = binary.BigEndian.AppendUint32(bigEndian, w)
	}
	f.Add(bigEndian)
	f.Fuzz(func(t *testing.T, file []byte) {
		r, err := NewReader(bytes.NewReader(file))
		total := 0
		for err == nil {
			var p Packet
			if err = r.Next(&p); err != nil {
				break
			}
			if p.Interface < 0 || p.Interface >= len(r.Interfaces()) || p.Length < len(p.Data) {
				t.Fatalf("impossible packet %+v", p)
			}
			if total += len(p.Data); total > len(file) {
				t.Fatalf("%d bytes of packets from a file of %d", total, len(file))
			}
		}
		var format *FormatError
		if err != io.EOF && (!errors.As(err, &format) || format.Offset < 0 || format.Offset > int64(len(file))) {
			t.Fatalf("error %v", err)
		}
	})
}

// FuzzRoundTrip checks that whatever is written is read back.
func FuzzRoundTrip(f *testing.F) {
	f.Add([]byte{1, 2, 3}, "comment", int64(5), uint64(6), uint32(7), uint32(8), uint8(7), 9)
	f.Fuzz(func(t *testing.T, data []byte, comment string, time int64, id uint64, queue, flags uint32, has uint8, length int) {
		if len(data) > MaxSnapLen || len(comment) > maxOption || strings.HasSuffix(comment, "\x00") {
			return
		}
		want := Packet{Interface: 1, Time: max(time, 0), Data: data, Length: max(int(uint32(length)>>1), len(data)), Flags: Flags(flags),
			Has: Fields(has) & (HasID | HasQueue | HasDropCount), Comment: comment}
		if want.Has&HasID != 0 {
			want.ID = id
		}
		if want.Has&HasDropCount != 0 {
			want.DropCount = ^id
		}
		if want.Has&HasQueue != 0 {
			want.Queue = queue
		}
		file := AppendHeader(nil, &Header{Link: LinkIPv4, Comment: comment, Interfaces: []Interface{{Name: comment}, {}}})
		file = AppendPacket(file, &want)
		r := newReader(t, file)
		got := readAll(t, r)
		if len(got) != 1 || !bytes.Equal(got[0].Data, want.Data) {
			t.Fatalf("got %+v, want %+v", got, want)
		}
		got[0].Data, want.Data = nil, nil
		if got[0].Comment != want.Comment || got[0].Time != want.Time || got[0].ID != want.ID || got[0].Has != want.Has ||
			got[0].DropCount != want.DropCount || got[0].Queue != want.Queue || got[0].Flags != want.Flags || got[0].Length != want.Length {
			t.Fatalf("got %+v, want %+v", got[0], want)
		}
		if h := r.Header(); h.Comment != comment {
			t.Fatalf("comment of the file %q, want %q", h.Comment, comment)
		}
	})
}
