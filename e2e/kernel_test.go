package e2e

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/google/gopacket/pcapgo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tweed/node"
)

// kernelPeer is node i with the kernel's own vxlan device, set up the way
// flannel does it: permanent neighbour and FDB entries and an onlink route for
// each peer, and a lease in etcd.
type kernelPeer struct {
	host
	w      *world
	i      int
	subnet netip.Prefix
	mac    net.HardwareAddr
}

const kernelDevice = "flannel.1"

func newKernelPeer(w *world, i int, subnet string) *kernelPeer {
	w.t.Helper()
	k := &kernelPeer{w: w, i: i, subnet: netip.MustParsePrefix(subnet), mac: net.HardwareAddr{0x02, 0, 0, 0xcc, 0, byte(i)}}
	k.host = host{"kernel", w.lan.Nodes[i], k.subnet.Addr()}
	netlinkIn(w.t, k.ns, func(h *netlink.Handle) {
		under, err := h.LinkByName("eth0")
		if err != nil {
			w.t.Fatal(err)
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr, attrs.MTU = kernelDevice, k.mac, 1450
		err = h.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs, VxlanId: 1, VtepDevIndex: under.Attrs().Index,
			SrcAddr: w.lan.Addr(i).AsSlice(), Port: 8472, UDPCSum: true})
		if err != nil {
			w.t.Fatalf("kernel vxlan device: %v", err)
		}
		link, err := h.LinkByName(kernelDevice)
		if err != nil {
			w.t.Fatal(err)
		}
		addr, err := netlink.ParseAddr(k.addr.String() + "/32")
		if err != nil {
			w.t.Fatal(err)
		}
		if err := h.AddrAdd(link, addr); err != nil {
			w.t.Fatal(err)
		}
		if err := h.LinkSetUp(link); err != nil {
			w.t.Fatal(err)
		}
	})
	w.put(keyOf(k.subnet), vxlanLease(w.lan.Addr(i).String(), k.mac.String()))
	return k
}

// know enters a peer's lease into the kernel's tables.
func (k *kernelPeer) know(e *daemon) {
	k.w.t.Helper()
	s := e.status()
	mac, err := net.ParseMAC(s.Node.VtepMAC)
	if err != nil {
		k.w.t.Fatal(err)
	}
	gateway := net.IP(s.Lease.Subnet.Addr().AsSlice())
	netlinkIn(k.w.t, k.ns, func(h *netlink.Handle) {
		link, err := h.LinkByName(kernelDevice)
		if err != nil {
			k.w.t.Fatal(err)
		}
		index := link.Attrs().Index
		entries := []*netlink.Neigh{
			{LinkIndex: index, State: netlink.NUD_PERMANENT, Type: unix.RTN_UNICAST, IP: gateway, HardwareAddr: mac},
			{LinkIndex: index, State: netlink.NUD_PERMANENT, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, IP: e.underlay().AsSlice(), HardwareAddr: mac},
		}
		for _, n := range entries {
			if err := h.NeighSet(n); err != nil {
				k.w.t.Fatal(err)
			}
		}
		err = h.RouteReplace(&netlink.Route{LinkIndex: index, Gw: gateway, Flags: int(netlink.FLAG_ONLINK),
			Src: k.addr.AsSlice(),
			Dst: &net.IPNet{IP: gateway, Mask: net.CIDRMask(s.Lease.Subnet.Bits(), 32)}})
		if err != nil {
			k.w.t.Fatal(err)
		}
	})
}

// TestKernelVXLANPeer talks to the kernel's implementation with its offloads
// on: it hands us un-segmented frames and partial checksums.
func TestKernelVXLANPeer(t *testing.T) {
	w := newWorld(t, 4)
	w.config(vxlanConfig)
	fast, full, none := w.up(3), w.up(0, "--accelerate", "off"), w.up(1, "--offload", "none", "--accelerate", "off")
	k := newKernelPeer(w, 2, "10.244.100.0/24")
	for _, e := range []*daemon{fast, full, none} {
		awaitPeers(3, e)
		k.know(e)
	}
	assertTraffic(t, fast.host(), k.host, transferBytes(), datagramSizes())
	assertTraffic(t, full.host(), k.host, transferBytes(), datagramSizes())
	assertTraffic(t, none.host(), k.host, 4<<20, []int{1, 1399, 1400, 1401, 30000, 60000})
	s := stream(t, k.host, full.host())
	awaitFlow(w, s, 500)
	assertClean(t, s)
	assertNoDrops(t, fast, full, none)
}

// TestFramesDecodeWithoutAWarning looks at our frames on the wire through
// tshark, and at every field of our own headers. To a peer that has not said
// that it completes inner checksums itself, those are complete too.
func TestFramesDecodeWithoutAWarning(t *testing.T) {
	needTool(t, "tshark", "ethtool")
	w := newWorld(t, 3)
	w.config(vxlanConfig)
	wireLike(t, w, 0)
	// The accelerator leaves the checksum out (accel/send_test.go).
	a, b := w.up(0, "--accelerate", "off"), w.up(1, "--accelerate", "off")
	k := newKernelPeer(w, 2, "10.244.100.0/24")
	awaitPeers(2, a, b)
	k.know(a)
	sizes := []int{1, 1400, 9000, 60000}
	for _, c := range []struct {
		name, mac string
		to        host
		underlay  netip.Addr
		options   []string
	}{
		{"kernel peer", k.mac.String(), k.host, w.lan.Addr(2), []string{"-o", "tcp.check_checksum:TRUE"}},
		{"tweed peer", b.status().Node.VtepMAC, b.host(), b.underlay(), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := filepath.Join(w.dir, "wire.pcap")
			stop := sniff(t, a, file)
			assertTraffic(t, a.host(), c.to, 1<<20, sizes)
			frames := assertOwnHeaders(t, stop(), a.status(), c.underlay, c.mac)
			if frames < 500 {
				t.Errorf("only %d frames of ours on the wire", frames)
			}
			ours := fmt.Sprintf("ip.src == %s && ip.dst == %s && vxlan.vni == 1", a.underlay(), c.underlay)
			if n := len(tshark(t, file, ours, nil, "frame.number")); n != frames {
				t.Errorf("tshark sees %d VXLAN frames of ours, gopacket %d", n, frames)
			}
			// Warnings about the conversation (a closed window, say) are not
			// about the frames.
			warnings := tshark(t, file, ours+` && (_ws.malformed || (_ws.expert.severity >= "Warning" && !tcp.analysis.flags && !tcp.flags.reset == 1))`,
				append(c.options, "-o", "ip.check_checksum:TRUE", "-o", "udp.check_checksum:"+fmt.Sprint(c.options != nil)), "frame.number", "_ws.expert.message")
			if len(warnings) > 0 {
				t.Errorf("tshark warns about %d frames, the first: %s", len(warnings), warnings[0])
			}
		})
	}
}

// wireLike makes the interface of node i hand over frames as they would be on
// a wire; a virtual link passes super-packets and open checksums on.
func wireLike(t *testing.T, w *world, i int) {
	t.Helper()
	cmd := exec.Command("ethtool", "-K", "eth0", "gso", "off", "gro", "off", "tso", "off", "tx-udp-segmentation", "off", "tx", "off")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := w.lan.Nodes[i].Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("ethtool: %v: %s", err, &out)
	}
}

// tshark returns one line of fields for each frame the filter selects.
func tshark(t *testing.T, file, filter string, options []string, fields ...string) []string {
	t.Helper()
	// Without this, a port that happens to be some protocol's makes it look for
	// that in our random bytes. The later -d wins.
	args := []string{"-n", "-r", file, "-d", "udp.port==1-65535,data", "-d", "tcp.port==1-65535,data", "-d", "udp.port==8472,vxlan", "-Y", filter, "-T", "fields"}
	args = append(args, options...)
	for _, f := range fields {
		args = append(args, "-e", f)
	}
	cmd := exec.Command("tshark", args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tshark: %v: %s", err, &errs)
	}
	return slices.DeleteFunc(strings.Split(string(out), "\n"), func(l string) bool { return l == "" })
}

// sniff captures on the engine's underlay interface until the returned
// function is called, which writes the file and returns the packets.
func sniff(t *testing.T, e *daemon, file string) func() [][]byte {
	t.Helper()
	fd := -1
	err := e.ns.Do(func() error {
		link, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		proto := uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(proto)); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: link.Index})
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil {
		// Root of a user namespace may not; the plain call is capped.
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 64<<20)
	}
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50000})
	var packets [][]byte
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		buf := make([]byte, 1<<17)
		for {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err == nil {
				packets = append(packets, append([]byte(nil), buf[:n]...))
				continue
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
	return func() [][]byte {
		close(stop)
		<-stopped
		unix.Close(fd)
		f, err := os.Create(file)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		pw := pcapgo.NewWriter(f)
		if err := pw.WriteFileHeader(1<<17, layers.LinkTypeEthernet); err != nil {
			t.Fatal(err)
		}
		for _, p := range packets {
			if err := pw.WritePacket(gopacket.CaptureInfo{Timestamp: time.Now(), CaptureLength: len(p), Length: len(p)}, p); err != nil {
				t.Fatal(err)
			}
		}
		return packets
	}
}

// assertOwnHeaders checks each VXLAN frame that a sent to a peer, field by
// field, and returns their number.
func assertOwnHeaders(t *testing.T, packets [][]byte, a node.Status, peer netip.Addr, mac string) int {
	t.Helper()
	frames := 0
	for i, raw := range packets {
		p := gopacket.NewPacket(raw, layers.LayerTypeEthernet, gopacket.NoCopy)
		outer, _ := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
		udp, _ := p.Layer(layers.LayerTypeUDP).(*layers.UDP)
		if outer == nil || udp == nil || udp.DstPort != 8472 || !outer.SrcIP.Equal(a.Underlay.Address.AsSlice()) || !outer.DstIP.Equal(peer.AsSlice()) {
			continue
		}
		frames++
		body := udp.LayerPayload()
		vx := gopacket.NewPacket(body, layers.LayerTypeVXLAN, gopacket.NoCopy)
		eth, _ := vx.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
		inner, _ := vx.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
		if eth == nil || inner == nil {
			t.Fatalf("frame %d does not decode: % x", i, raw[:min(len(raw), 120)])
		}
		got := fmt.Sprintf("flags % x, %s > %s %s, length %d, checksum %t", body[:8], eth.SrcMAC, eth.DstMAC, eth.EthernetType, len(raw), udp.Checksum != 0)
		want := fmt.Sprintf("flags 08 00 00 00 00 00 01 00, %s > %s IPv4, length %d, checksum true", a.Node.VtepMAC, mac, 14+20+8+8+14+int(inner.Length))
		if got != want || len(raw) > 1514 {
			t.Fatalf("frame %d: %s\nwant %s", i, got, want)
		}
	}
	return frames
}
