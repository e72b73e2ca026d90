package accel

import (
	"errors"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tweed/engine"
	"tweed/engine/table"
	"tweed/netns"
	"tweed/tun/tuntest"
)

// TestMarkOfThePacketDoesNotRouteTheDatagram: marks inside are set for other
// purposes, by a service mesh say, and a worker's datagrams have none.
func TestMarkOfThePacketDoesNotRouteTheDatagram(t *testing.T) {
	b := newBench(t, true)
	const mark, elsewhere = 7, 99
	rule := netlink.NewRule()
	rule.Mark, rule.Table, rule.Priority = mark, elsewhere, 1
	err := b.home.Do(func() error {
		under, err := netlink.LinkByName(netns.LANInterface)
		if err != nil {
			return err
		}
		nobody := b.node.As4()
		nobody[3] = 99
		everything := &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: under.Attrs().Index, Dst: everything, Gw: nobody[:], Table: elsewhere}); err != nil {
			return err
		}
		return netlink.RuleAdd(rule)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptInt(b.host, unix.SOL_SOCKET, unix.SO_MARK, mark); err != nil {
		t.Fatal(err)
	}
	for _, p := range b.peers[:2] {
		packet := to(p).Bytes()
		wire, _ := b.send(t, packet, 0)
		if wire == nil {
			t.Fatalf("%v: left to the workers", p.Framing)
		}
		b.assertDatagram(t, wire, packet, p)
	}
}

// TestSuperPacketTooLongForADatagramIsRemembered: with the outer headers it does
// not fit into 64 KB, so the workers cut it, and what follows must not overtake it.
func TestSuperPacketTooLongForADatagramIsRemembered(t *testing.T) {
	b := newBench(t, true)
	for i, p := range b.peers[:2] {
		in := to(p)
		in.Proto, in.Flags, in.Sum = tuntest.TCP, tuntest.ACK, tuntest.Partial
		in.Payload = make([]byte, 0xffff-40-10)
		if wire, worker := b.send(t, in.Bytes(), 1300); wire != nil || len(worker) != 0xffff-10 {
			t.Fatalf("%v: %d bytes on the wire, %d to the workers", p.Framing, len(wire), len(worker))
		}
		var e accelPeer
		if err := b.a.objs.Peers.Lookup(keyOf(p.Subnet), &e); err != nil || e.Bulk[0] == 0 || e.Bulk[1] != 0 {
			t.Errorf("peer %d: the entry does not remember the super-packet: %v, %v", i, e.Bulk, err)
		}
	}
}

// TestRetractWaitsForTheProgramsThatRun: one that has read an entry may still send
// by it, so the new table comes into force a grace period after the entry is gone.
func TestRetractWaitsForTheProgramsThatRun(t *testing.T) {
	a := loaded(t)
	var waits []accelPeer // what the entry said at each
	a.settle = func() {
		var e accelPeer
		if err := a.objs.Peers.Lookup(keyOf(testPeers[0].Subnet), &e); err != nil {
			t.Error(err)
		}
		waits = append(waits, e)
		settle()
	}
	a.Retract(local, testPeers)
	if len(waits) != 0 {
		t.Error("waited although nothing was taken away")
	}
	moved := append([]table.Peer{}, testPeers...)
	moved[0].Endpoint = netip.MustParseAddrPort("192.0.2.77:8472")
	a.Retract(local, moved)
	if len(waits) != 1 || waits[0] != closed {
		t.Fatalf("the entry at each wait: %+v, want one, of a closed entry", waits)
	}
	a.Follow(local, moved)
	a.Retract(table.Local{Subnet: netip.MustParsePrefix("10.1.9.0/24"), Addr: netip.MustParseAddr("10.1.9.0"), MAC: ourMAC, VNI: 7}, moved)
	if len(waits) != 2 {
		t.Errorf("waited %d times, want once more for another subnet of our own", len(waits)-1)
	}
	a.Follow(local, moved)
	a.SetDuty(engine.Duty{Why: "test"})
	if len(waits) != 3 {
		t.Errorf("waited %d times, want once more for going off duty", len(waits)-2)
	}
}

// TestPacketsDroppedBeforeTheDeviceStayInTheLedger, also when the device, which
// counted them, is gone.
func TestPacketsDroppedBeforeTheDeviceStayInTheLedger(t *testing.T) {
	b := newBench(t, true)
	const sent = 5
	err := b.home.Do(func() error {
		l, err := netlink.LinkByIndex(b.tun)
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(l) // the kernel drops what is for it, as with a full queue
	})
	if err != nil {
		t.Fatal(err)
	}
	b.receive(t, b.peers[0], sent)
	deadline := time.Now().Add(patience)
	for {
		_, rx := b.a.Traffic()
		if rx.Packets == sent && rx.Drops[engine.RxBacklog] == sent && rx.Delivered == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("received %+v, want %d dropped", rx, sent)
		}
		time.Sleep(time.Millisecond)
	}
	if err := b.dev.Close(); err != nil {
		t.Fatal(err)
	}
	if _, rx := b.a.Traffic(); rx.Packets != sent || rx.Drops[engine.RxBacklog] != sent || rx.Delivered != 0 {
		t.Errorf("received %+v after the device was closed, want %d dropped", rx, sent)
	}
}

// TestWritesRefusedByTheDeviceAreNotDropsOfTheBacklog, although the kernel counts
// both at one place.
func TestWritesRefusedByTheDeviceAreNotDropsOfTheBacklog(t *testing.T) {
	b := newBench(t, true)
	b.receive(t, b.peers[0], 3)
	err := b.home.Do(func() error {
		l, err := netlink.LinkByIndex(b.tun)
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(l)
	})
	if err != nil {
		t.Fatal(err)
	}
	packet := tuntest.Packet{Src: b.peers[0].Subnet.Addr().Next(), Dst: ourSubnet.Addr().Next(), Proto: tuntest.UDP}.Bytes()
	for range 2 {
		if b.queue.WritePacket(packet) == nil {
			t.Fatal("a device that is down took a packet")
		}
	}
	deadline := time.Now().Add(patience)
	for {
		_, rx := b.a.Traffic()
		if rx.Drops[engine.RxBacklog] != 0 {
			t.Fatalf("received %+v, nothing was dropped before the device", rx)
		}
		if rx.Delivered == 3 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("received %+v, want 3 delivered", rx)
		}
		time.Sleep(time.Millisecond)
	}
}

// receive sends n valid datagrams of peer p from the far end.
func (b *bench) receive(t *testing.T, p table.Peer, n int) {
	t.Helper()
	f := vxlanFrame(p, from(p).Bytes())
	f.to = b.node
	frame := f.bytes()
	var mac [2]net.HardwareAddr
	for i, ns := range []*netns.Namespace{b.home, b.away} {
		err := ns.Do(func() error {
			l, err := netlink.LinkByName(netns.LANInterface)
			if err == nil {
				mac[i] = l.Attrs().HardwareAddr
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	copy(frame[0:], mac[0])
	copy(frame[6:], mac[1])
	for range n {
		if _, err := unix.Write(b.wire, frame); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWithoutTheRightsTheErrorNamesThem: the verifier says only that it refuses
// the program.
func TestWithoutTheRightsTheErrorNamesThem(t *testing.T) {
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // and the thread ends with its rights
		head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var all [2]unix.CapUserData
		if err := unix.Capget(&head, &all[0]); err != nil {
			failed <- err
			return
		}
		all[0].Effective &= 1 << unix.CAP_NET_ADMIN
		all[1].Effective &= 1 << (unix.CAP_BPF - 32)
		if err := unix.Capset(&head, &all[0]); err != nil {
			failed <- err
			return
		}
		_, err := New(testConfig())
		failed <- err
	}()
	err := <-failed
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_PERFMON") {
		t.Errorf("%v, want one that names CAP_PERFMON", err)
	}
}
