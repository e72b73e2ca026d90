package encap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"tweed/tun/tuntest"
)

// loopback is any of the host's 2^24 loopback addresses: several hosts in one.
func loopback(last byte, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, last}), port)
}

func listen(t testing.TB, cfg SocketConfig) *Socket {
	t.Helper()
	if !cfg.Addr.IsValid() {
		cfg.Addr = loopback(1, 0)
	}
	s, err := Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func recvBatch(t testing.TB) *RecvBatch {
	t.Helper()
	b, err := NewRecvBatch()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Free(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func destOf(t testing.TB, s *Socket) *Dest {
	t.Helper()
	a, err := s.LocalAddr()
	if err != nil {
		t.Fatal(err)
	}
	return NewDest(a)
}

// arrival is a Message whose data is the test's own.
type arrival struct {
	Message
	data string
}

// receive reads until n bytes of payload are there.
func receive(t testing.TB, s *Socket, n int) []arrival {
	t.Helper()
	b := recvBatch(t)
	var out []arrival
	for n > 0 {
		got, err := s.Recv(b)
		if err != nil {
			t.Fatal(err)
		}
		for i := range got {
			m := b.Message(i)
			out = append(out, arrival{m, string(m.Data)})
			n -= len(m.Data)
		}
	}
	return out
}

// cut returns the datagrams of a message.
func (m *arrival) cut() []string {
	if m.SegmentLen == 0 {
		return []string{m.data}
	}
	var out []string
	for c := range slices.Chunk([]byte(m.data), m.SegmentLen) {
		out = append(out, string(c))
	}
	return out
}

// A run leaves as one message and, to a socket that asked for it, arrives as one.
func TestSegmentationReallyEngages(t *testing.T) {
	from, to := listen(t, SocketConfig{Offload: true, Addr: loopback(2, 0)}), listen(t, SocketConfig{Offload: true})
	if gso, gro := from.Offloads(); !gso || !gro {
		t.Fatalf("segmentation %v, merging %v: every kernel since 5.0 has both", gso, gro)
	}
	b, dst := NewSendBatch(), destOf(t, to)
	b.Reset(from)
	var want []string
	data := 0
	for i := range 11 {
		p := bytes.Repeat([]byte{byte(i)}, 1000)
		if i == 10 {
			p = p[:300]
		}
		if !b.Add(dst, 2, 0, p[:22], p[22:]) {
			t.Fatal("full")
		}
		want, data = append(want, string(p)), data+len(p)
	}
	var res SendResult
	from.Send(b, &res)
	if res.Sent != (Count{11, uint64(data)}) || total(&res) != res.Sent {
		t.Fatalf("%+v", res)
	}
	msgs := receive(t, to, data)
	if len(msgs) != 1 {
		t.Fatalf("%d messages arrived, want one", len(msgs))
	}
	m := msgs[0]
	self, _ := from.LocalAddr()
	if m.SegmentLen != 1000 || m.TOS != 2 || m.Source != 0x7f000002 || m.SourcePort != self.Port() || !slices.Equal(m.cut(), want) {
		t.Errorf("segments of %d, TOS %d, from %#x port %d", m.SegmentLen, m.TOS, m.Source, m.SourcePort)
	}
	if gso, _ := from.Offloads(); !gso {
		t.Error("segmentation was given up")
	}
}

func TestRunsOfEveryLengthArriveWhole(t *testing.T) {
	for _, offload := range []bool{true, false} {
		from, to := listen(t, SocketConfig{Offload: offload}), listen(t, SocketConfig{Offload: true})
		b, dst := NewSendBatch(), destOf(t, to)
		for n := 1; n <= 64; n++ {
			b.Reset(from)
			var want []string
			bytesOut := 0
			for i := range n {
				p := bytes.Repeat([]byte{byte(i), byte(n)}, 50)
				if i == n-1 {
					p = p[:1+n]
				}
				b.Add(dst, 0, 0, p[:2], p[2:])
				want, bytesOut = append(want, string(p)), bytesOut+len(p)
			}
			var res SendResult
			if from.Send(b, &res); res.Sent.Segments != uint64(n) {
				t.Fatalf("offload %v, %d segments: %+v", offload, n, res)
			}
			var got []string
			for _, m := range receive(t, to, bytesOut) {
				got = append(got, m.cut()...)
			}
			if !slices.Equal(got, want) {
				t.Fatalf("offload %v, %d segments: %d datagrams differ", offload, n, len(got))
			}
		}
	}
}

func TestTypeOfServiceArrives(t *testing.T) {
	from, to := listen(t, SocketConfig{Offload: true}), listen(t, SocketConfig{Offload: true})
	b, dst := NewSendBatch(), destOf(t, to)
	b.Reset(from)
	var want []uint8
	for _, tos := range []uint8{0, 1, 2, 3, 0, 3} { // a run each of two
		for range 2 {
			b.Add(dst, tos, 0, []byte("0123456789"), nil)
		}
		want = append(want, tos)
	}
	from.Send(b, new(SendResult))
	var got []uint8
	for _, m := range receive(t, to, 120) {
		got = append(got, m.TOS)
		if m.SegmentLen != 10 {
			t.Errorf("segments of %d bytes", m.SegmentLen)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("types of service %v, want %v", got, want)
	}
}

// Slots are used again: nothing of an earlier message may shine through.
func TestSlotsStartAfresh(t *testing.T) {
	from, to := listen(t, SocketConfig{Offload: true}), listen(t, SocketConfig{Offload: true})
	b, rb, dst := NewSendBatch(), recvBatch(t), destOf(t, to)
	for round := range 3 {
		b.Reset(from)
		for range 3 {
			b.Add(dst, 3, 0, []byte("merged"), nil)
		}
		from.Send(b, new(SendResult))
		if n, err := to.Recv(rb); n != 1 || err != nil {
			t.Fatal(n, err)
		} else if m := rb.Message(0); m.SegmentLen != 6 || m.TOS != 3 || len(m.Data) != 18 {
			t.Fatalf("round %d: %d bytes in segments of %d, TOS %d", round, len(m.Data), m.SegmentLen, m.TOS)
		}
		b.Add(dst, 0, 0, []byte("single datagram"), nil)
		from.Send(b, new(SendResult))
		if n, err := to.Recv(rb); n != 1 || err != nil {
			t.Fatal(n, err)
		} else if m := rb.Message(0); m.SegmentLen != 0 || m.TOS != 0 || string(m.Data) != "single datagram" {
			t.Fatalf("round %d: %q in segments of %d, TOS %d", round, m.Data, m.SegmentLen, m.TOS)
		}
	}
}

func TestEmptyAndLargestDatagramsArrive(t *testing.T) {
	from, to := listen(t, SocketConfig{}), listen(t, SocketConfig{Offload: true})
	a, _ := to.LocalAddr()
	sa := &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	rb := recvBatch(t)
	for _, n := range []int{0, 1, 65507} {
		if err := unix.Sendto(from.fd, make([]byte, n), 0, sa); err != nil {
			t.Fatal(err)
		}
		got, err := to.Recv(rb)
		if err != nil || got != 1 || len(rb.Message(0).Data) != n || rb.Message(0).SegmentLen != 0 {
			t.Errorf("%d bytes: %d messages of %d, error %v", n, got, len(rb.Message(0).Data), err)
		}
	}
}

func TestReceiveDrainsInBatches(t *testing.T) {
	from, to := listen(t, SocketConfig{}), listen(t, SocketConfig{})
	rb, b, dst := recvBatch(t), NewSendBatch(), destOf(t, to)
	if n, err := to.TryRecv(rb); n != 0 || err != nil || rb.Full() {
		t.Fatalf("nothing sent: %d messages, error %v, full %v", n, err, rb.Full())
	}
	b.Reset(from)
	for i := range recvSlots + 3 {
		b.Add(dst, 0, 0, []byte{byte(i)}, nil)
	}
	from.Send(b, new(SendResult))
	at := 0
	for _, want := range []int{recvSlots, 3, 0} {
		n, err := to.TryRecv(rb)
		if n != want || err != nil || rb.Full() != (want == recvSlots) {
			t.Fatalf("%d messages, error %v, full %v, want %d", n, err, rb.Full(), want)
		}
		for i := range n {
			if d := rb.Message(i).Data; len(d) != 1 || int(d[0]) != at {
				t.Errorf("message %d: %v", at, d)
			}
			at++
		}
	}
}

func TestShutdownEndsReceiving(t *testing.T) {
	s := listen(t, SocketConfig{Offload: true})
	rb := recvBatch(t)
	done := make(chan error)
	go func() {
		_, err := s.Recv(rb)
		done <- err
	}()
	s.Shutdown() // before or while the reader waits: both must end it
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Errorf("blocked Recv: %v", err)
	}
	if _, err := s.Recv(rb); !errors.Is(err, ErrClosed) {
		t.Errorf("later Recv: %v", err)
	}
	if _, err := s.TryRecv(rb); !errors.Is(err, ErrClosed) {
		t.Errorf("later TryRecv: %v", err)
	}
	// Sending still works.
	to := listen(t, SocketConfig{})
	b := NewSendBatch()
	b.Reset(s)
	b.Add(destOf(t, to), 0, 0, []byte("last words"), nil)
	var res SendResult
	if s.Send(b, &res); res.Sent.Segments != 1 {
		t.Errorf("%+v", res)
	}
}

func TestListenErrorsNameTheAddress(t *testing.T) {
	taken := listen(t, SocketConfig{})
	addr, _ := taken.LocalAddr()
	for name, cfg := range map[string]SocketConfig{
		"in use":              {Addr: addr},
		"in use by a loner":   {Addr: addr, Shared: true},
		"no address of ours":  {Addr: netip.MustParseAddrPort("192.0.2.77:4789")},
		"IPv6":                {Addr: netip.MustParseAddrPort("[::1]:4789")},
		"no address at all":   {},
		"IPv4 in IPv6's form": {Addr: netip.MustParseAddrPort("[::ffff:192.0.2.77]:4789")},
	} {
		s, err := Listen(cfg)
		if err == nil {
			s.Close()
			t.Errorf("%s: no error", name)
		} else if !strings.Contains(err.Error(), cfg.Addr.String()) {
			t.Errorf("%s: %q does not name %v", name, err, cfg.Addr)
		}
	}
}

func TestSharedSocketsDivideOnePort(t *testing.T) {
	a := listen(t, SocketConfig{Shared: true})
	addr, _ := a.LocalAddr()
	b := listen(t, SocketConfig{Shared: true, Addr: addr})
	if again, _ := b.LocalAddr(); again != addr {
		t.Errorf("%v and %v", addr, again)
	}
}

// What arrives at a socket nobody reads must not stay in its buffer.
func TestSendOnlySocketTakesNothingIn(t *testing.T) {
	deaf, open := listen(t, SocketConfig{SendOnly: true, Offload: true}), listen(t, SocketConfig{})
	from := listen(t, SocketConfig{})
	b, rb := NewSendBatch(), recvBatch(t)
	b.Reset(from)
	b.Add(destOf(t, deaf), 0, 0, []byte("flood"), nil)
	b.Add(destOf(t, open), 0, 0, []byte("after"), nil)
	from.Send(b, new(SendResult))
	if n, err := open.Recv(rb); n != 1 || err != nil { // then the first has been dealt with too
		t.Fatal(n, err)
	}
	if n, err := deaf.TryRecv(rb); n != 0 || err != nil {
		t.Errorf("%d messages in a send-only socket, error %v", n, err)
	}
	b.Add(destOf(t, open), 0, 0, []byte("reply"), nil)
	var res SendResult
	if deaf.Send(b, &res); res.Sent.Segments != 1 {
		t.Errorf("%+v", res)
	}
}

func TestSocketOptions(t *testing.T) {
	s := listen(t, SocketConfig{Offload: true})
	for name, o := range map[string][3]int{
		"path MTU discovery omitted": {unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, 5},
		"UDP checksum on":            {unix.SOL_SOCKET, unix.SO_NO_CHECK, 0},
		"type of service reported":   {unix.IPPROTO_IP, unix.IP_RECVTOS, 1},
		"not shared":                 {unix.SOL_SOCKET, unix.SO_REUSEPORT, 0},
	} {
		if got, err := unix.GetsockoptInt(s.fd, o[0], o[1]); err != nil || got != o[2] {
			t.Errorf("%s: %d, error %v", name, got, err)
		}
	}
	if flags, err := unix.FcntlInt(uintptr(s.fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Error("children inherit the socket")
	}
	if plain := listen(t, SocketConfig{}); true {
		if gso, gro := plain.Offloads(); gso || gro {
			t.Error("offloads on without being asked for")
		}
	}
}

func TestOverflowIsCounted(t *testing.T) {
	from, to := listen(t, SocketConfig{}), listen(t, SocketConfig{})
	if n := to.Dropped(); n != 0 {
		t.Errorf("%d dropped at the start", n)
	}
	if err := unix.SetsockoptInt(to.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4096); err != nil {
		t.Fatal(err)
	}
	b, dst := NewSendBatch(), destOf(t, to)
	b.Reset(from)
	for range 100 {
		b.Add(dst, 0, 0, make([]byte, 1000), nil)
	}
	from.Send(b, new(SendResult))
	rb, got := recvBatch(t), 0
	for n := -1; n != 0; got += n {
		var err error
		if n, err = to.TryRecv(rb); err != nil {
			t.Fatal(err)
		}
	}
	if n := to.Dropped(); n == 0 || got+int(n) != 100 {
		t.Errorf("%d received, %d dropped, want 100 in all", got, n)
	}
}

func TestReceiveAllocatesNothing(t *testing.T) {
	from, to := listen(t, SocketConfig{Offload: true}), listen(t, SocketConfig{Offload: true})
	b, rb, dst := NewSendBatch(), recvBatch(t), destOf(t, to)
	b.Reset(from)
	data, sum := make([]byte, 1000), 0
	var res SendResult
	if n := testing.AllocsPerRun(50, func() {
		for range 20 {
			b.Add(dst, 1, 0, data[:22], data[22:])
		}
		from.Send(b, &res)
		n, err := to.Recv(rb)
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			m := rb.Message(i)
			sum += m.SegmentLen
		}
	}); n != 0 {
		t.Errorf("%v allocations a round", n)
	}
}

// controlled is what Message makes of a message of 100 bytes with the control data.
func controlled(b *RecvBatch, ctrl []byte, claimed int) Message {
	clear(b.ctrl[0][:])
	copy(b.ctrl[0][:], ctrl)
	b.hdrs[0].hdr.SetControllen(claimed)
	b.hdrs[0].len = 100
	return b.Message(0)
}

func cmsg(level, kind int32, size int, data ...byte) []byte {
	c := make([]byte, unix.CmsgSpace(len(data)))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&c[0]))
	h.Level, h.Type = level, kind
	h.SetLen(size)
	copy(c[unix.SizeofCmsghdr:], data)
	return c
}

func TestSegmentSizeIsBelievedWithinReason(t *testing.T) {
	b := recvBatch(t)
	for size, want := range map[int32]int{0: 0, -1: 0, 1: 1, 99: 99, 100: 0, 101: 0, 1 << 30: 0, -1 << 31: 0} {
		c := cmsg(unix.IPPROTO_UDP, unix.UDP_GRO, unix.CmsgLen(4), binary.NativeEndian.AppendUint32(nil, uint32(size))...)
		c = append(c, cmsg(unix.IPPROTO_IP, unix.IP_TOS, unix.CmsgLen(1), 3)...)
		if m := controlled(b, c, len(c)); m.SegmentLen != want || m.TOS != 3 {
			t.Errorf("size %d of 100 bytes: segments of %d, TOS %d", size, m.SegmentLen, m.TOS)
		}
	}
	for name, c := range map[string][]byte{
		"longer than there is":   cmsg(unix.IPPROTO_IP, unix.IP_TOS, 200, 3),
		"longer than the buffer": cmsg(unix.IPPROTO_IP, unix.IP_TOS, 1<<40, 3),
		"shorter than itself":    cmsg(unix.IPPROTO_IP, unix.IP_TOS, 3, 3),
		"no data":                cmsg(unix.IPPROTO_IP, unix.IP_TOS, unix.SizeofCmsghdr, 3),
		"half a size":            cmsg(unix.IPPROTO_UDP, unix.UDP_GRO, unix.CmsgLen(2), 9, 9),
		"somebody else's":        cmsg(unix.SOL_SOCKET, unix.IP_TOS, unix.CmsgLen(1), 3),
	} {
		if m := controlled(b, c, len(c)); m.SegmentLen != 0 || m.TOS != 0 {
			t.Errorf("%s: segments of %d, TOS %d", name, m.SegmentLen, m.TOS)
		}
	}
}

// Control data comes from the kernel, but a length in it must never lead
// outside the buffer.
func FuzzControlData(f *testing.F) {
	good := unix.UnixRights(1)
	f.Add(good, uint8(len(good)), uint16(1000))
	f.Add(bytes.Repeat([]byte{0xff}, recvCtrl), uint8(64), uint16(0))
	f.Add(make([]byte, recvCtrl), uint8(255), uint16(1))
	var b *RecvBatch
	f.Fuzz(func(t *testing.T, ctrl []byte, claimed uint8, length uint16) {
		if b == nil {
			b, _ = NewRecvBatch()
		}
		copy(b.ctrl[0][:], ctrl)
		b.hdrs[0].hdr.SetControllen(int(claimed))
		b.hdrs[0].len = uint32(length)
		m := b.Message(0)
		if len(m.Data) != int(length) || m.SegmentLen < 0 || m.SegmentLen > 0 && m.SegmentLen >= len(m.Data) {
			t.Fatalf("%d bytes, segments of %d", len(m.Data), m.SegmentLen)
		}
	})
}

// While nothing comes, a receiver gives back what a burst has filled, and then it
// waits without a limit again; what comes later arrives whole.
func TestWaitingReceiverGivesMemoryBack(t *testing.T) {
	from, to := listen(t, SocketConfig{Offload: true}), listen(t, SocketConfig{Offload: true})
	to.restAfter = time.Millisecond
	in := recvBatch(t)
	slab := in.slab
	out, dst := NewSendBatch(), destOf(t, to)
	send := func(size int) (want []byte) {
		t.Helper()
		want = bytes.Repeat([]byte{byte(size)}, size)
		out.Reset(from)
		var res SendResult
		if !out.Add(dst, 0, 0, want, nil) {
			t.Fatal("full")
		}
		if from.Send(out, &res); res.Sent.Segments != 1 {
			t.Fatalf("%+v", res)
		}
		return want
	}
	for range 2 {
		want := send(60000)
		if n, err := to.Recv(in); n != 1 || err != nil || !bytes.Equal(in.Message(0).Data, want) || !in.Grown() {
			t.Fatalf("a large datagram: %d messages, %v, grown %v", n, err, in.Grown())
		}
		if n, err := tuntest.ResidentPages(slab); n < 60000/os.Getpagesize() || err != nil {
			t.Fatalf("%d pages hold a large datagram, %v", n, err)
		}
		got := make(chan string)
		go func() {
			n, err := to.Recv(in)
			if n != 1 || err != nil {
				got <- fmt.Sprintf("%d messages, %v", n, err)
				return
			}
			got <- string(in.Message(0).Data)
		}()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			n, err := tuntest.ResidentPages(slab)
			if err != nil {
				t.Fatal(err)
			}
			limit, err := unix.GetsockoptTimeval(to.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO)
			if err != nil {
				t.Fatal(err)
			}
			if n == 0 && limit.Nano() == 0 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d pages are held on to, a call waits for %d ns", n, limit.Nano())
			}
		}
		small := send(100)
		if d := <-got; d != string(small) {
			t.Errorf("afterwards: %.40q", d)
		}
		if in.Grown() {
			t.Error("a small datagram counts as large")
		}
	}
}
