package tun

import (
	"bytes"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"tweed/tun/tuntest"
)

// recorder stands in for the kernel behind a queue: it keeps what is written,
// and answers what the script says.
type recorder struct {
	t interface {
		Helper()
		Errorf(format string, args ...any)
	}
	// answer decides the result of a write; nil accepts everything.
	answer func(raw []byte) syscall.Errno
	raw    [][]byte // accepted writes, virtio header first
	calls  int
}

func newRecorder(t testing.TB, rung Offload) (*recorder, *Queue) {
	r, q := &recorder{t: t}, newQueue(-1, rung)
	q.writev = r.writev
	return r, q
}

func (r *recorder) writev(fd int, iovs []unix.Iovec) syscall.Errno {
	r.calls++
	if len(iovs) > 1024 { // UIO_MAXIOV
		r.t.Errorf("a write of %d pieces", len(iovs))
		return unix.EINVAL
	}
	var raw []byte
	for _, v := range iovs {
		raw = append(raw, unsafe.Slice(v.Base, v.Len)...)
	}
	if r.answer != nil {
		if e := r.answer(raw); e != 0 {
			return e
		}
	}
	r.raw = append(r.raw, raw)
	return 0
}

// packets returns what the kernel makes of the accepted writes.
func (r *recorder) packets() [][]byte {
	r.t.Helper()
	var out [][]byte
	for _, raw := range r.raw {
		pkts, err := tuntest.Split(raw)
		if err != nil {
			r.t.Errorf("write of %d bytes: %v", len(raw), err)
		}
		out = append(out, pkts...)
	}
	return out
}

func isSuper(raw []byte) bool { return raw[1] != tuntest.GSONone }

// flushed adds the packets to a new coalescer and flushes it once.
func flushed(t testing.TB, rung Offload, pkts ...tuntest.Packet) *recorder {
	t.Helper()
	r, q := newRecorder(t, rung)
	c := NewCoalescer(1426)
	want := uint64(0)
	for i, p := range pkts {
		b := p.Bytes()
		want += uint64(len(b))
		c.Add(q, b, 0, uint64(i))
	}
	var res Written
	NewWriter().Flush(c, &res)
	if res.Packets != uint64(len(pkts)) || res.Bytes != want || res.Failed != 0 || res.Writes != uint64(r.calls) {
		t.Errorf("%+v after %d packets of %d bytes in %d writes", res, len(pkts), want, r.calls)
	}
	return r
}

// sameBytes reports packets that did not come out as they went in.
func sameBytes(t testing.TB, got [][]byte, want ...tuntest.Packet) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%d packets came out, want %d", len(got), len(want))
		return
	}
	for i, p := range want {
		if b := tuntest.Complete(p.Bytes()); !bytes.Equal(got[i], b) {
			t.Errorf("packet %d of %d and %d bytes:\n have % x\n want % x", i, len(got[i]), len(b), got[i][:min(60, len(got[i]))], b[:min(60, len(b))])
		}
	}
}
