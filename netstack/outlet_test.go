package netstack

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
)

// A socket that takes a part of what is pending, or of the piece after it, gets the
// rest later and nothing twice.
func TestShortWritesLoseAndRepeatNothing(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	if err := unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_SNDBUF, 1); err != nil { // the least there is
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(5, 6))
	var sent, got []byte
	drain := func(most int) {
		b := make([]byte, most)
		n, err := unix.Read(fds[1], b)
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			t.Fatal(err)
		}
		got = append(got, b[:max(n, 0)]...)
	}
	o := outlet{fd: fds[0], pending: make([]byte, 0, gatherSize)}
	short := 0
	for range 3000 {
		o.moved = 0
		p := make([]byte, 1+r.IntN(1<<(1+r.IntN(16))))
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		n, err := o.Write(p)
		if n < 0 || n > len(p) || (n == len(p)) != (err == nil) {
			t.Fatalf("%d of %d bytes, error %v", n, len(p), err)
		}
		sent = append(sent, p[:n]...)
		if n > 0 && n < len(p) {
			short++
		}
		if o.full {
			drain(1 + r.IntN(4000))
			o.full = false
			before := len(o.pending)
			o.send(nil)
			if len(o.pending) > 0 && len(o.pending) < before {
				short++
			}
		}
		if o.err != nil {
			t.Fatal(o.err)
		}
		o.full = false
	}
	for len(o.pending) > 0 {
		drain(4000)
		o.send(nil)
	}
	for len(got) < len(sent) {
		before := len(got)
		if drain(1 << 16); len(got) == before {
			break
		}
	}
	if !bytes.Equal(got, sent) {
		t.Errorf("%d bytes arrived of %d, or others", len(got), len(sent))
	}
	if short < 100 {
		t.Errorf("only %d short writes: the test tests too little", short)
	}
}
