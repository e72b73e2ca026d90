package netstack_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// hostPair are the two ends of a stream of the host.
func hostPair(t *testing.T, network string) (a, b net.Conn) {
	t.Helper()
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(t.TempDir(), "s")
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial(network, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{a, b} {
		t.Cleanup(func() { c.Close() })
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
	}
	return a, b
}

// plain hides what a connection can beside reading and writing.
type plain struct{ io.ReadWriter }

// A stream goes from a socket of the host over the overlay to another, in writes
// of all sizes, to a reader that stops now and then so that everything fills up.
func TestStreamsOfTheHostAreCarriedWhole(t *testing.T) {
	for _, network := range []string{"tcp", "unix", "plain"} {
		t.Run(network, func(t *testing.T) {
			ctx, n := engine(t)
			from, to := connected(ctx, t, n.Net, attach(ctx, t, n, "second"))
			kind := network
			if network == "plain" {
				kind = "tcp"
			}
			in, inFar := hostPair(t, kind)
			out, outFar := hostPair(t, kind)
			var src io.Reader = inFar
			var dst io.Writer = out
			if network == "plain" {
				src, dst = plain{inFar}, plain{out}
			}

			const size = 24 << 20
			sent := sha256.New()
			go func() {
				r := rand.New(rand.NewPCG(1, 2))
				data := make([]byte, 300<<10)
				for left := size; left > 0; {
					p := data[:min(left, 1+r.IntN(1<<(1+r.IntN(18))))]
					for i := range p {
						p[i] = byte(r.Uint32())
					}
					sent.Write(p)
					if _, err := in.Write(p); err != nil {
						t.Error(err)
						break
					}
					left -= len(p)
				}
				in.Close()
			}()
			carried := make(chan error, 2)
			go func() {
				got, err := from.(io.ReaderFrom).ReadFrom(src)
				if err == nil && got != size {
					err = errors.New("ReadFrom counts wrong")
				}
				from.(interface{ CloseWrite() error }).CloseWrite()
				carried <- err
			}()
			go func() {
				got, err := to.(io.WriterTo).WriteTo(dst)
				if err == nil && got != size {
					err = errors.New("WriteTo counts wrong")
				}
				out.Close()
				carried <- err
			}()
			received := sha256.New()
			for i := 0; ; i++ {
				if i%16 == 0 {
					time.Sleep(time.Millisecond)
				}
				if _, err := io.CopyN(received, outFar, 100<<10); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.Fatal(err)
				}
			}
			for range 2 {
				if err := <-carried; err != nil {
					t.Error(err)
				}
			}
			if !bytes.Equal(sent.Sum(nil), received.Sum(nil)) {
				t.Error("what arrived is not what was sent")
			}
		})
	}
}

func TestCarryingEndsWithEitherSide(t *testing.T) {
	ctx, n := engine(t)
	second := attach(ctx, t, n, "second")
	t.Run("the socket is closed", func(t *testing.T) {
		from, to := connected(ctx, t, n.Net, second)
		out, far := hostPair(t, "tcp")
		far.Close()
		go func() {
			for {
				if _, err := from.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		}()
		if _, err := to.(io.WriterTo).WriteTo(out); err == nil {
			t.Error("no error")
		}
	})
	t.Run("the connection is closed", func(t *testing.T) {
		from, _ := connected(ctx, t, n.Net, second)
		in, far := hostPair(t, "tcp")
		go func() {
			for {
				if _, err := in.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		}()
		time.AfterFunc(50*time.Millisecond, func() { from.Close() })
		if _, err := from.(io.ReaderFrom).ReadFrom(far); err == nil {
			t.Error("no error")
		}
	})
	t.Run("the deadline passes", func(t *testing.T) {
		_, to := connected(ctx, t, n.Net, second)
		out, _ := hostPair(t, "tcp")
		if err := to.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		var timeout net.Error
		if _, err := to.(io.WriterTo).WriteTo(out); !errors.As(err, &timeout) || !timeout.Timeout() || errors.Is(err, os.ErrClosed) {
			t.Errorf("error %v, expected a timeout", err)
		}
	})
}
