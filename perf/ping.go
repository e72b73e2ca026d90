package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// pingInterval is the time from one echo request to the next, as ping -i 0.002.
	pingInterval = 2 * time.Millisecond
	// pingTimeout is how long a reply is waited for.
	pingTimeout = 200 * time.Millisecond
	// pingPayload is ping's default, in bytes.
	pingPayload = 56
	// pingLossLimit is the share of lost replies that makes a run worthless.
	pingLossLimit = 0.01
)

// pinger sends ICMP echo requests (RFC 792) and measures as ping does: from the
// clock just before the send to the kernel's time stamp on the reply, which
// leaves out how fast the harness itself wakes up.
type pinger struct {
	fd     int
	id     uint16
	seq    uint16
	packet [8 + pingPayload]byte
}

// newPinger opens a raw socket in the calling thread's namespace.
func newPinger(to netip.Addr) (*pinger, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err != nil {
		return nil, fmt.Errorf("ping: socket: %w", err)
	}
	p := &pinger{fd: fd, id: uint16(os.Getpid())}
	timeout := unix.NsecToTimeval(pingTimeout.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
		unix.Connect(fd, &unix.SockaddrInet4{Addr: to.As4()}),
	)
	if err != nil {
		p.close()
		return nil, fmt.Errorf("ping %s: %w", to, err)
	}
	return p, nil
}

func (p *pinger) close() { unix.Close(p.fd) }

// errNoReply is returned for a request without a reply within pingTimeout.
var errNoReply = errors.New("no reply")

// once sends one request and waits for its reply.
func (p *pinger) once() (time.Duration, error) {
	p.seq++
	echo := p.packet[:]
	echo[0], echo[1] = 8, 0 // echo request
	binary.BigEndian.PutUint16(echo[2:], 0)
	binary.BigEndian.PutUint16(echo[4:], p.id)
	binary.BigEndian.PutUint16(echo[6:], p.seq)
	binary.BigEndian.PutUint16(echo[2:], internetChecksum(echo))
	var sent unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME, &sent); err != nil {
		return 0, err
	}
	if _, err := unix.Write(p.fd, echo); err != nil {
		return 0, err
	}
	deadline := time.Now().Add(pingTimeout)
	var buf [256]byte
	var oob [64]byte
	for {
		n, oobn, _, _, err := unix.Recvmsg(p.fd, buf[:], oob[:], 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return 0, errNoReply
		case err != nil:
			return 0, err
		}
		if isReply(buf[:n], p.id, p.seq) {
			at, err := receiveTime(oob[:oobn])
			return time.Duration(at.Nano() - sent.Nano()), err
		}
		if time.Now().After(deadline) {
			return 0, errNoReply
		}
	}
}

// isReply tells the echo reply to one request in an IPv4 packet.
func isReply(packet []byte, id, seq uint16) bool {
	if len(packet) < 20 {
		return false
	}
	head := int(packet[0]&0x0f) * 4
	if head < 20 || len(packet) < head+8 {
		return false
	}
	icmp := packet[head:]
	return icmp[0] == 0 && icmp[1] == 0 &&
		binary.BigEndian.Uint16(icmp[4:]) == id && binary.BigEndian.Uint16(icmp[6:]) == seq
}

// receiveTime is the kernel's time stamp (SCM_TIMESTAMPNS).
func receiveTime(oob []byte) (unix.Timespec, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return unix.Timespec{}, err
	}
	for _, m := range messages {
		if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SO_TIMESTAMPNS &&
			len(m.Data) >= int(unsafe.Sizeof(unix.Timespec{})) {
			return *(*unix.Timespec)(unsafe.Pointer(&m.Data[0])), nil
		}
	}
	return unix.Timespec{}, errors.New("ping: the kernel gave no time stamp")
}

// internetChecksum is that of RFC 1071 over an even number of bytes.
func internetChecksum(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// pingResult summarises round trips.
func pingResult(trips []time.Duration, sent int) (map[string]float64, error) {
	if lost := sent - len(trips); len(trips) == 0 || float64(lost) > pingLossLimit*float64(sent) {
		return nil, fmt.Errorf("ping: %d of %d replies lost", lost, sent)
	}
	us := make([]float64, len(trips))
	for i, t := range trips {
		us[i] = float64(t) / float64(time.Microsecond)
	}
	return map[string]float64{
		metricPingAvg:  mean(us),
		metricPingP99:  quantile(us, 0.99),
		metricPingLost: float64(sent - len(trips)),
	}, nil
}

// runPing pings side 1 from side 0.
func (b *bench) runPing(ctx context.Context, o *overlay) (map[string]float64, error) {
	var trips []time.Duration
	sent := 0
	err := o.pair.ns[0].Do(func() error {
		p, err := newPinger(o.addr[1])
		if err != nil {
			return err
		}
		defer p.close()
		for sent < b.opt.pings {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			began := time.Now()
			trip, err := p.once()
			if err != nil && !errors.Is(err, errNoReply) {
				return fmt.Errorf("ping: %w", err)
			}
			sent++
			if err == nil {
				trips = append(trips, trip)
			} else if lost := sent - len(trips); lost > 10 && float64(lost) > pingLossLimit*float64(b.opt.pings) {
				break // enough to be worthless; each more costs pingTimeout
			}
			pause(pingInterval - time.Since(began))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return pingResult(trips, sent)
}

// pause blocks the calling thread. time.Sleep would let another thread, often
// on the other core, wake this one, and so warm up what is being measured.
func pause(d time.Duration) {
	if d > 0 {
		ts := unix.NsecToTimespec(d.Nanoseconds())
		unix.Nanosleep(&ts, nil) // an early return does no harm
	}
}

// reachable returns nil once side 1 answers a ping from side 0.
func reachable(ctx context.Context, o *overlay, limit time.Duration) error {
	return o.pair.ns[0].Do(func() error {
		return waitFor(ctx, limit, func() error {
			if err := o.running(); err != nil {
				return &giveUp{err}
			}
			p, err := newPinger(o.addr[1]) // fails while there is no route
			if err != nil {
				return err
			}
			defer p.close()
			if _, err := p.once(); err != nil {
				return fmt.Errorf("ping %s: %w", o.addr[1], err)
			}
			return nil
		})
	})
}
