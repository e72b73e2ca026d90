package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"

	"tweed/netns"
)

const (
	// underlayDev is the underlay's interface on both sides.
	underlayDev = "eth0"
	underlayMTU = 1500
)

// underlayAddr are the underlay addresses of the two sides, of TEST-NET-1
// (RFC 5737). The namespaces of pairs are apart, so every pair has the same.
var underlayAddr = [2]netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")}

// Links: how the two sides are joined.
const (
	// linkVirtual is a veth pair as it comes: super-packets cross it whole.
	linkVirtual = "virtual"
	// linkWire is a veth pair that cuts every super-packet to frames of the
	// link's MTU before it crosses, and merges them again on the other side
	// (GRO), as network cards do.
	linkWire = "wire"
	// linkMachine is no link: the sides are two containers of one machine.
	linkMachine = "machine"
)

// pair is the underlay of one subject: two network namespaces joined by a veth
// pair, without default routes and without IPv6. The namespaces have no names
// and vanish with the last process and descriptor in them.
type pair struct {
	link string
	// host is where the engines of a machine pair run, nil for the other links.
	host *netns.Namespace
	// containers stand for the sides of a machine pair: each is a process in a
	// user and a network namespace of its own.
	containers [2]*process
	ns         [2]*netns.Namespace
	rt         [2]*netlink.Handle
	open       []io.Closer
}

// newPair builds a pair. On an error nothing is left behind.
func newPair(link string) (*pair, error) {
	p := &pair{link: link}
	if err := p.build(); err != nil {
		p.close()
		return nil, fmt.Errorf("underlay: %w", err)
	}
	return p, nil
}

func (p *pair) build() error {
	for side := range p.ns {
		ns, err := netns.New()
		if err != nil {
			return err
		}
		p.ns[side] = ns
		if err := ns.Do(quietIPv6); err != nil {
			return err
		}
		if p.rt[side], err = ns.Netlink(); err != nil {
			return err
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = underlayDev, underlayMTU
	err := p.rt[0].LinkAdd(&netlink.Veth{
		LinkAttrs: attrs, PeerName: underlayDev, PeerMTU: underlayMTU,
		PeerNamespace: netlink.NsFd(int(p.ns[1].File().Fd())),
	})
	if err != nil {
		return fmt.Errorf("veth: %w (needs the kernel's veth driver: modprobe veth)", err)
	}
	for side := range p.ns {
		if err := p.configure(side, underlayDev, netip.PrefixFrom(underlayAddr[side], 24)); err != nil {
			return err
		}
		if p.link != linkWire {
			continue
		}
		if err := p.ns[side].Do(func() error { return wireLike(underlayDev) }); err != nil {
			return err
		}
	}
	return nil
}

// configure gives a device its address and sets it up.
func (p *pair) configure(side int, dev string, addr netip.Prefix) error {
	l, err := p.rt[side].LinkByName(dev)
	if err != nil {
		return fmt.Errorf("%s: %w", dev, err)
	}
	if err := p.rt[side].AddrAdd(l, &netlink.Addr{IPNet: ipNet(addr)}); err != nil {
		return fmt.Errorf("address %s on %s: %w", addr, dev, err)
	}
	if err := p.rt[side].LinkSetUp(l); err != nil {
		return fmt.Errorf("%s up: %w", dev, err)
	}
	return nil
}

// counters are a device's since it was made.
type counters struct {
	txPackets, txBytes, rxPackets, rxBytes float64
}

// deviceCounters reads the counters of a device on one side.
func (p *pair) deviceCounters(side int, dev string) (counters, error) {
	l, err := p.rt[side].LinkByName(dev)
	if err != nil {
		return counters{}, fmt.Errorf("%s: %w", dev, err)
	}
	s := l.Attrs().Statistics
	if s == nil {
		return counters{}, fmt.Errorf("%s: the kernel gives no counters", dev)
	}
	return counters{
		txPackets: float64(s.TxPackets), txBytes: float64(s.TxBytes),
		rxPackets: float64(s.RxPackets), rxBytes: float64(s.RxBytes),
	}, nil
}

// forwardTCP serves 127.0.0.1:port on one side and passes every connection on
// to address target of the harness's own namespace. It is how nodes reach etcd
// without a packet of it on the link that is measured.
func (p *pair) forwardTCP(side, port int, target string) error {
	return p.forward(p.ns[side], port, target)
}

func (p *pair) forward(ns *netns.Namespace, port int, target string) error {
	var l net.Listener
	err := ns.Do(func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
		return err
	})
	if err != nil {
		return err
	}
	p.open = append(p.open, l)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed with the pair
			}
			go splice(c, target)
		}
	}()
	return nil
}

func splice(c net.Conn, target string) {
	defer c.Close()
	t, err := net.Dial("tcp4", target)
	if err != nil {
		return // the client sees its connection closed, and tries again
	}
	defer t.Close()
	go func() {
		io.Copy(t, c)
		t.Close() // ends the copy below
	}()
	io.Copy(c, t)
}

// close removes the link and gives the namespaces up. Processes inside must
// have ended.
func (p *pair) close() {
	for _, c := range p.open {
		c.Close()
	}
	if p.rt[0] != nil {
		// Removed by hand: the kernel tears a namespace down some time later.
		if l, err := p.rt[0].LinkByName(underlayDev); err == nil {
			p.rt[0].LinkDel(l)
		}
	}
	for _, c := range p.containers {
		if c != nil {
			c.stop(0)
		}
	}
	if p.host != nil {
		p.host.Close()
	}
	for side := range p.ns {
		if p.rt[side] != nil {
			p.rt[side].Close()
		}
		if p.ns[side] != nil {
			p.ns[side].Close()
		}
	}
}

// quietIPv6 switches IPv6 off in the calling thread's namespace, so that the
// only packets are those somebody sent.
func quietIPv6() error {
	for _, scope := range []string{"all", "default"} {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/"+scope+"/disable_ipv6", []byte("1"), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
