package tun

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"

	"tweed/netns"
	"tweed/tun/tuntest"
)

// TestMain makes the tests of real devices possible without root: in a user
// namespace of their own.
func TestMain(m *testing.M) {
	if done, status, err := netns.Elevate(); done && err == nil {
		os.Exit(status)
	}
	os.Exit(m.Run())
}

// impossible reports why a test cannot run here. With CI=true that is a failure.
func impossible(t testing.TB, why error) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// host is a network namespace with a device in it.
type host struct {
	*netns.Namespace
	dev *Device
}

func namespace(t testing.TB) *netns.Namespace {
	t.Helper()
	if err := netns.CheckPrivileges(); err != nil {
		impossible(t, err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

func openIn(t testing.TB, ns *netns.Namespace, cfg Config) (*Device, error) {
	t.Helper()
	var d *Device
	err := ns.Do(func() (err error) {
		d, err = Open(cfg)
		return err
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) {
		impossible(t, err)
	}
	if err == nil {
		t.Cleanup(func() { d.Close() })
	}
	return d, err
}

// newHost makes a namespace with a device that is up and has the address.
func newHost(t testing.TB, addr string, offload Offload) *host {
	t.Helper()
	h := &host{Namespace: namespace(t)}
	var err error
	if h.dev, err = openIn(t, h.Namespace, Config{Name: "tweed%d", MTU: 1426, Queues: 1, Offload: offload}); err != nil {
		t.Fatal(err)
	}
	err = h.Do(func() error {
		// No IPv6: its router solicitations would be read here.
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+h.dev.Name()+"/disable_ipv6", []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		link, err := netlink.LinkByName(h.dev.Name())
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(addr)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(link, a); err != nil {
			return err
		}
		return netlink.LinkSetUp(link)
	})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *host) udp(t testing.TB, addr string) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	if err := h.Do(func() (err error) {
		c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetReadBuffer(1 << 20)
	_ = c.SetReadDeadline(time.Now().Add(time.Minute))
	return c
}

func waitReadable(t testing.TB, fd int) {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 60_000)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n != 1 || err != nil {
			t.Fatalf("nothing to read after a minute: %d, %v", n, err)
		}
		return
	}
}

func TestOpenMakesADeviceAndCloseRemovesIt(t *testing.T) {
	ns := namespace(t)
	for _, queues := range []int{1, 2} {
		d, err := openIn(t, ns, Config{Name: "tweed%d", MTU: 1400 + queues, Queues: queues, Offload: OffloadAuto})
		if err != nil {
			t.Fatal(err)
		}
		if d.Name() != "tweed0" || len(d.Queues()) != queues || d.Offload() < OffloadTSO || d.OffloadReason() == "" {
			t.Errorf("%s with %d queues, offload %v (%s)", d.Name(), len(d.Queues()), d.Offload(), d.OffloadReason())
		}
		for _, q := range d.Queues() {
			if q.Offload() != d.Offload() {
				t.Errorf("a queue at %v of a device at %v", q.Offload(), d.Offload())
			}
			if flags, err := unix.FcntlInt(uintptr(q.FD()), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
				t.Error("reading the queue would block")
			}
		}
		err = ns.Do(func() error {
			link, err := netlink.LinkByName("tweed0")
			if err == nil && (link.Attrs().MTU != 1400+queues || link.Attrs().Flags&net.FlagUp != 0) {
				t.Errorf("MTU %d, flags %v", link.Attrs().MTU, link.Attrs().Flags)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if err := d.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
		for range d.Events() { // ends because Close closes it
		}
		if err := ns.Do(func() error { _, err := netlink.LinkByName("tweed0"); return err }); err == nil {
			t.Error("the device is still there")
		}
	}
}

func TestForcedRungs(t *testing.T) {
	ns := namespace(t)
	for _, o := range []Offload{OffloadNone, OffloadTSO, OffloadFull} {
		d, err := openIn(t, ns, Config{Name: "tweed%d", MTU: 1426, Queues: 1, Offload: o})
		if err != nil {
			t.Fatal(err)
		}
		if d.Offload() > o || o == OffloadNone && d.Offload() != OffloadNone || d.Queues()[0].Offload() != d.Offload() {
			t.Errorf("asked for %v, got %v, the queue %v", o, d.Offload(), d.Queues()[0].Offload())
		}
		if d.Offload() == o && !strings.Contains(d.OffloadReason(), o.String()) {
			t.Errorf("%v because %q", o, d.OffloadReason())
		}
		d.Close()
	}
}

func TestOpenErrorsSayWhatToDo(t *testing.T) {
	ns := namespace(t)
	for _, queues := range []int{1, 2} {
		d, err := openIn(t, ns, Config{Name: "taken", MTU: 1426, Queues: queues, Offload: OffloadAuto})
		if err != nil {
			t.Fatal(err)
		}
		for _, second := range []int{1, 2} {
			again, err := openIn(t, ns, Config{Name: "taken", MTU: 1426, Queues: second, Offload: OffloadAuto})
			if err == nil {
				t.Errorf("two engines on one device of %d queues", queues)
				again.Close()
			} else if !strings.Contains(err.Error(), "taken") || !strings.Contains(err.Error(), "--tun-name") {
				t.Errorf("%d queues, then %d: %v", queues, second, err)
			}
		}
		d.Close()
	}
	for name, want := range map[string]string{
		"lo":                "--tun-name",
		"name-of-16-bytes":  "15 bytes",
		"slash/in/the/name": "15 bytes",
		"a/b":               "--tun-name",
	} {
		if d, err := openIn(t, ns, Config{Name: name, MTU: 1426, Queues: 1}); err == nil {
			t.Errorf("%q: opened as %s", name, d.Name())
		} else if !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %q does not say %q", name, err, want)
		}
	}
	if d, err := openIn(t, ns, Config{Name: "tweed%d", MTU: 70000, Queues: 1}); err == nil {
		t.Errorf("an MTU of 70000 on %s", d.Name())
	} else if !strings.Contains(err.Error(), "70000") {
		t.Errorf("error %q does not name the MTU", err)
	}
	if err := ns.Do(func() error { _, err := netlink.LinkByName("tweed0"); return err }); err == nil {
		t.Error("a failed Open leaves its device behind")
	}
}

func TestEventsFollowTheDevice(t *testing.T) {
	h := newHost(t, "10.9.0.1/24", OffloadAuto)
	limit := time.After(time.Minute)
	for up := false; !up; {
		select {
		case ev := <-h.dev.Events():
			up = ev&wgtun.EventUp != 0
		case <-limit:
			t.Fatal("nobody says that the device is up")
		}
	}
}

func TestDeletedDeviceIsNoticed(t *testing.T) {
	h := newHost(t, "10.9.0.1/24", OffloadAuto)
	q := h.dev.Queues()[0]
	if err := h.Do(func() error {
		link, err := netlink.LinkByName(h.dev.Name())
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	}); err != nil {
		t.Fatal(err)
	}
	waitReadable(t, q.FD())
	b := readBatch(t)
	for range maxRead { // what the kernel sent before may come first
		if err := q.TryRead(b); err != nil {
			if !errors.Is(err, ErrGone) {
				t.Error(err)
			}
			return
		}
	}
	t.Error("reading goes on without the device")
}

// The kernel takes what the coalescer makes: merged datagrams arrive one by
// one, in order, and those with a wrong checksum do not.
func TestKernelTakesMergedDatagrams(t *testing.T) {
	for _, offload := range []Offload{OffloadAuto, OffloadTSO, OffloadNone} {
		h := newHost(t, "10.9.0.1/24", offload)
		conn := h.udp(t, "10.9.0.1:53")
		q := h.dev.Queues()[0]
		c, w := NewCoalescer(1426), NewWriter()
		var want []string
		for i := range 150 {
			p := udpDatagram(i, 700)
			p.Src, p.Dst = mustAddr("10.9.0.2"), mustAddr("10.9.0.1")
			switch {
			case i%50 == 20:
				p.Sum = tuntest.Bad
			case i%3 == 1:
				p.Sum = tuntest.Partial
			case i%50 == 21:
				p.Sum = tuntest.Zero
			}
			if p.Sum != tuntest.Bad {
				want = append(want, string(p.Payload))
			}
			c.Add(q, p.Bytes(), 0, 0)
		}
		// And one that a kernel vxlan peer left un-segmented.
		big := whole(udpDatagram(200, 0), 12345, tuntest.Partial)
		big.Src, big.Dst = mustAddr("10.9.0.2"), mustAddr("10.9.0.1")
		for chunk := range slices.Chunk(big.Payload, 1234) {
			want = append(want, string(chunk))
		}
		if h.dev.Offload() == OffloadFull {
			c.Add(q, big.Bytes(), 1234, 0)
		} else {
			want = want[:len(want)-11]
		}
		var res Written
		w.Flush(c, &res)
		if res.Failed != 0 || q.noGSO.Load() {
			t.Errorf("%v: %+v, super-packets off: %v", offload, res, q.noGSO.Load())
		}
		if h.dev.Offload() == OffloadFull && res.Writes > 30 {
			t.Errorf("%d writes: hardly anything was merged", res.Writes)
		}
		buf := make([]byte, 2000)
		for i, w := range want {
			n, _, err := conn.ReadFromUDPAddrPort(buf)
			if err != nil || string(buf[:n]) != w {
				t.Fatalf("%v: datagram %d of %d: %d bytes, error %v", offload, i, len(want), n, err)
			}
		}
	}
}

// A merged TCP super-packet reaches the stack as one: it answers with one RST.
func TestKernelTakesMergedTCP(t *testing.T) {
	h := newHost(t, "10.9.0.1/24", OffloadAuto)
	q := h.dev.Queues()[0]
	c := NewCoalescer(1426)
	for i := range 40 {
		p := tcpSegment(i, 1000)
		p.Src, p.Dst = mustAddr("10.9.0.2"), mustAddr("10.9.0.1")
		c.Add(q, p.Bytes(), 0, 0)
	}
	big := whole(tcpSegment(0, 0), 40000, tuntest.Partial)
	big.Src, big.Dst, big.SrcPort = mustAddr("10.9.0.2"), mustAddr("10.9.0.1"), 6000
	c.Add(q, big.Bytes(), 0, 0)
	var res Written
	if NewWriter().Flush(c, &res); res.Writes != 2 || res.Failed != 0 || res.Packets != 41 {
		t.Fatalf("%+v", res)
	}
	waitReadable(t, q.FD())
	b := readBatch(t)
	if err := q.TryRead(b); err != nil || len(b.Packets()) != 2 {
		t.Fatalf("%d packets, error %v", len(b.Packets()), err)
	}
	for i := range b.Packets() {
		p := &b.Packets()[i]
		pkt := b.Bytes(p, 0)
		if p.Partial() {
			p.Complete(pkt)
		}
		if err := tuntest.Check(pkt); err != nil || pkt[33]&tuntest.RST == 0 {
			t.Errorf("answer %d: % x, %v", i, pkt, err)
		}
	}
}

// What the kernel hands over in one piece comes apart into the datagrams the
// program sent.
func TestKernelSuperPacketIsSplit(t *testing.T) {
	h := newHost(t, "10.9.0.1/24", OffloadAuto)
	if h.dev.Offload() != OffloadFull {
		t.Logf("no UDP segmentation here: %s", h.dev.OffloadReason())
	}
	conn := h.udp(t, "10.9.0.1:9000")
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1000) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	payload := make([]byte, 10300)
	for i := range payload {
		payload[i] = byte(i * 3 >> 4)
	}
	if _, err := conn.WriteToUDPAddrPort(payload, netip.MustParseAddrPort("10.9.0.2:9001")); err != nil {
		t.Fatal(err)
	}
	q, b := h.dev.Queues()[0], readBatch(t)
	var got []string
	for len(strings.Join(got, "")) < len(payload) {
		waitReadable(t, q.FD())
		if err := q.TryRead(b); err != nil {
			t.Fatal(err)
		}
		for i := range b.Packets() {
			p := &b.Packets()[i]
			pkt := b.Bytes(p, 0)
			if p.Super() != (h.dev.Offload() == OffloadFull) {
				t.Errorf("super-packet: %v", p.Super())
			}
			pkts := [][]byte{pkt}
			if p.Super() {
				pkts = segments(t, tuntest.Virtio{Flags: 1, GSOType: tuntest.GSOUDP, GSOSize: uint16(p.SegmentPayload())}.Prepend(pkt), false)
			} else if p.Partial() {
				p.Complete(pkt)
			}
			for _, s := range pkts {
				if err := tuntest.CheckDecoded(s); err != nil {
					t.Error(err)
				}
				got = append(got, string(s[28:]))
			}
		}
	}
	var want []string
	for chunk := range slices.Chunk(payload, 1000) {
		want = append(want, string(chunk))
	}
	if !slices.Equal(got, want) {
		t.Errorf("%d datagrams, want %d: %s", len(got), len(want), fmt.Sprint(len(strings.Join(got, ""))))
	}
}
