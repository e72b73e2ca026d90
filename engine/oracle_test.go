package engine

import (
	"bytes"
	"fmt"
	"net"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tweed/encap"
	"tweed/netns"
	"tweed/tun/tuntest"
)

// oracle is Linux's own vxlan device, in a network namespace of its own, with
// our MAC address and VNI, and a peer that sends to it.
type oracle struct {
	t    *testing.T
	peer int // UDP socket
	tap  int // packet socket: what the device hands to IPv4
	next uint32
}

func newOracle(t *testing.T) *oracle {
	t.Helper()
	if err := netns.CheckPrivileges(); err != nil {
		impossible(t, err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	o := &oracle{t: t, peer: -1, tap: -1}
	t.Cleanup(func() { unix.Close(o.peer); unix.Close(o.tap) })
	err = ns.Do(func() error {
		vx := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "vx0", HardwareAddr: net.HardwareAddr(ourMAC[:])},
			VxlanId: 7, SrcAddr: ourAddr.AsSlice(), Port: encap.DefaultVXLANPort}
		if err := netlink.LinkAdd(vx); err != nil {
			return fmt.Errorf("vxlan device: %w", err)
		}
		if err := netlink.LinkSetUp(vx); err != nil {
			return err
		}
		if o.tap, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0x0008); err != nil { // ETH_P_IP, network order
			return err
		}
		if err := unix.Bind(o.tap, &unix.SockaddrLinklayer{Protocol: 0x0008, Ifindex: vx.Index}); err != nil {
			return err
		}
		if err := unix.SetsockoptTimeval(o.tap, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
			return err
		}
		if o.peer, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Bind(o.peer, &unix.SockaddrInet4{Addr: peerAddr(vxlanPeer).As4()})
	})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func (o *oracle) send(data []byte, tos uint8) {
	o.t.Helper()
	if err := unix.SetsockoptInt(o.peer, unix.IPPROTO_IP, unix.IP_TOS, int(tos)); err != nil {
		o.t.Fatal(err)
	}
	if err := unix.Sendto(o.peer, data, 0, &unix.SockaddrInet4{Addr: ourAddr.As4(), Port: encap.DefaultVXLANPort}); err != nil {
		o.t.Fatal(err)
	}
}

// ask returns the packet the kernel hands to its IPv4 for the datagram, nil if
// it drops it. A good datagram behind it tells when the kernel has decided.
func (o *oracle) ask(data []byte, tos uint8) (got []byte) {
	o.t.Helper()
	o.next++
	mark := from(vxlanPeer, tuntest.Packet{Proto: 99, ID: uint16(o.next), Payload: fmt.Appendf(nil, "mark %d", o.next)}).Bytes()
	o.send(data, tos)
	o.send(framed(encap.FramingVXLAN, vxlanPeer, mark), 0)
	buf := make([]byte, 2000)
	for {
		n, from, err := unix.Recvfrom(o.tap, buf, 0)
		if err != nil {
			o.t.Fatal(err)
		}
		if bytes.Equal(buf[:n], mark) {
			return got
		}
		if from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_HOST {
			got = slices.Clone(buf[:n])
		}
	}
}

// us returns what our receive worker writes to the TUN for the datagram.
func us(h *harness, data []byte, tos uint8) []byte {
	h.transmit(h.peers[vxlanPeer], encap.FramingVXLAN, tos, slices.Clone(data))
	got := h.delivered()
	if len(got) == 0 {
		return nil
	}
	return got[0]
}

// For each bit of the VXLAN header and of the destination address, and all ECN
// combinations, we hand over the same bytes as Linux or drop what it drops.
func TestLinuxVXLANDecidesAsWeDo(t *testing.T) {
	o, h := newOracle(t), newHarness(t)
	good := framed(encap.FramingVXLAN, vxlanPeer, from(vxlanPeer, tuntest.Packet{Proto: 99, Payload: []byte("test")}).Bytes())
	if k := o.ask(good, 0); k == nil || !bytes.Equal(k, us(h, good, 0)) {
		t.Fatalf("a good datagram: kernel % x", k)
	}
	for bit := range 14 * 8 {
		b := slices.Clone(good)
		b[bit/8] ^= 0x80 >> (bit % 8)
		if k, w := o.ask(b, 0), us(h, b, 0); !bytes.Equal(k, w) {
			t.Errorf("byte %d, bit %d flipped: kernel delivers %v, we %v", bit/8, bit%8, k != nil, w != nil)
		}
	}
	own := slices.Clone(good)
	copy(own[14:], ourMAC[:])
	if k, w := o.ask(own, 0), us(h, own, 0); k != nil || w != nil {
		t.Errorf("a frame from our own address: kernel delivers %v, we %v", k != nil, w != nil)
	}
	for n := range encap.MaxPrefixLen { // shorter than the prefix
		if k, w := o.ask(good[:n], 0), us(h, good[:n], 0); k != nil || w != nil {
			t.Errorf("%d bytes: kernel delivers %v, we %v", n, k != nil, w != nil)
		}
	}
	for inner := range uint8(4) {
		for outer := range uint8(4) {
			b := framed(encap.FramingVXLAN, vxlanPeer, from(vxlanPeer, tuntest.Packet{Proto: 99, TOS: 0x48 | inner, Payload: []byte("ecn")}).Bytes())
			if k, w := o.ask(b, outer), us(h, b, outer); !bytes.Equal(k, w) {
				t.Errorf("outer ECN %d, inner %d: kernel % .12x, we % .12x", outer, inner, k, w)
			}
		}
	}
}

// What we send, Linux understands: the device hands over the packets.
func TestLinuxVXLANTakesWhatWeSend(t *testing.T) {
	o, h := newOracle(t), newHarness(t)
	// The device plays the peer: its MAC address is the one all tests call ours.
	h.snap.Peers[vxlanPeer].MAC, h.snap.Local.MAC = ourMAC, peerMAC(vxlanPeer)
	h.apply()
	p := to(vxlanPeer, tcp(3500))
	want, err := tuntest.Split(p.Super(1000))
	if err != nil {
		t.Fatal(err)
	}
	h.send(p.Super(1000), plain(to(vxlanPeer, udp(60))))
	want = append(want, to(vxlanPeer, udp(60)).Bytes())
	var got [][]byte
	for _, a := range h.arrived(vxlanPeer) {
		got = append(got, o.ask([]byte(a.data), a.tos))
	}
	slices.SortFunc(got, bytes.Compare) // the two flows leave from different ports
	slices.SortFunc(want, bytes.Compare)
	if !equalPackets(got, want) {
		t.Errorf("%d of %d packets came through", len(got), len(want))
	}
}
