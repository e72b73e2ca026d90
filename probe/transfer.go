package probe

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

// Transferred is the result of a [Transfer].
type Transferred struct {
	// Bytes carried, and the time from the first write to the last read.
	Bytes   int
	Elapsed time.Duration
	// SHA256 is the hash of both what was sent and what arrived.
	SHA256 [sha256.Size]byte
}

// BitsPerSecond is the rate of the payload.
func (t Transferred) BitsPerSecond() float64 {
	return float64(t.Bytes) * 8 / t.Elapsed.Seconds()
}

// Transfer sends n pseudo-random bytes over one TCP connection from src to a
// listener on dst and compares the SHA-256 of both ends; a difference is an
// error. Sender and receiver hold all the bytes, so that neither producing nor
// hashing them is in the measured time: it takes 2n bytes of memory.
func Transfer(ctx context.Context, from, to Place, src, dst netip.Addr, n int) (Transferred, error) {
	fail := func(err error) (Transferred, error) {
		return Transferred{}, fmt.Errorf("probe: transfer %s to %s: %w", src, dst, err)
	}
	sent := pattern(uint64(n), n)
	got := make([]byte, n)

	listener, err := listenTCP(to, dst)
	if err != nil {
		return fail(err)
	}
	defer listener.Close()
	type end struct {
		at  time.Time
		err error
	}
	received := make(chan end, 1)
	go func() {
		err := receive(ctx, listener, got)
		received <- end{time.Now(), err}
	}()

	var conn net.Conn
	err = from.Do(func() (err error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: src.AsSlice()}}
		conn, err = d.DialContext(ctx, "tcp4", listener.Addr().String())
		return err
	})
	if err != nil {
		listener.Close()
		<-received
		return fail(err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	start := time.Now()
	written, werr := conn.Write(sent)
	if werr == nil {
		werr = conn.(*net.TCPConn).CloseWrite()
	}
	if werr != nil {
		conn.Close()
	}
	last := <-received
	if err := errors.Join(werr, last.err); err != nil {
		return fail(fmt.Errorf("%w (%d of %d bytes written)", err, written, n))
	}
	t := Transferred{Bytes: n, Elapsed: last.at.Sub(start), SHA256: sha256.Sum256(got)}
	if want := sha256.Sum256(sent); t.SHA256 != want {
		return fail(fmt.Errorf("sha256 %x arrived, %x was sent", t.SHA256, want))
	}
	return t, nil
}

func listenTCP(at Place, addr netip.Addr) (net.Listener, error) {
	var l net.Listener
	err := at.Do(func() (err error) {
		l, err = net.Listen("tcp4", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	return l, err
}

// receive accepts one connection and fills got, after which the stream must end.
func receive(ctx context.Context, l net.Listener, got []byte) error {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	conn, err := l.Accept()
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if n, err := io.ReadFull(conn, got); err != nil {
		return fmt.Errorf("%w after %d bytes", err, n)
	}
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		return fmt.Errorf("more than was sent arrived (%d bytes, %v)", n, err)
	}
	return nil
}
