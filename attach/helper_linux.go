package attach

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tweed/netns"
	"tweed/tun"
)

const (
	cloneDevice = "/dev/net/tun"
	// txQueueLen is a TUN's transmit queue in packets; with the default of 500 a
	// burst of small packets is lost before the engine is scheduled.
	txQueueLen = 2000
	// socketBuffer is what a packet socket asks for, in bytes; the kernel grants
	// net.core.rmem_max unless the helper is root.
	socketBuffer = 64 << 20
	// farEnd is the name of the engine's end of a veth pair, in a namespace of
	// its own.
	farEnd = "engine"
	// routeProtocol marks our routes, as package node does.
	routeProtocol = 116
	// leftover bounds how long an interface of an engine that has just ended may
	// still be in the way: the kernel removes it in the background.
	leftover      = 2 * time.Second
	leftoverRetry = 20 * time.Millisecond
)

// stageError is a failed step that no other tier would cure.
type stageError struct {
	stage string
	err   error
}

func (e *stageError) Error() string { return e.stage + ": " + e.err.Error() }
func (e *stageError) Unwrap() error { return e.err }

// tierError is why a tier is not possible.
type tierError struct {
	err error
	fix string
}

func (e *tierError) Error() string { return e.err.Error() }
func (e *tierError) Unwrap() error { return e.err }

// serve makes the interface, inside the container's namespaces.
func serve(r request) (answer, *os.File, error) {
	var a answer
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return a, nil, &stageError{"netlink", err}
	}
	defer nl.Close()
	if err := prepareNamespace(nl); err != nil {
		return a, nil, err
	}
	for _, tier := range r.Tiers {
		make := makeTUN
		if tier == TierVeth {
			make = makeVeth
		}
		f, err := make(nl, r.Link, &a)
		var no *tierError
		if errors.As(err, &no) {
			a.Passed = append(a.Passed, Verdict{Tier: tier, Why: no.err.Error(), Fix: no.fix})
			continue
		}
		if err == nil {
			err = configure(nl, r.Link)
		}
		if err != nil {
			if f != nil {
				f.Close()
				remove(nl, r.Link.Name)
			}
			return a, nil, err
		}
		a.Tier = tier
		return a, f, nil
	}
	return a, nil, nil
}

// prepareNamespace sets loopback up and lets programs inside send pings, which
// a fresh network namespace forbids to everybody (net.ipv4.ping_group_range).
func prepareNamespace(nl *netlink.Handle) error {
	lo, err := nl.LinkByName("lo")
	if err != nil {
		return &stageError{"loopback", err}
	}
	if lo.Attrs().Flags&net.FlagUp == 0 {
		if err := nl.LinkSetUp(lo); err != nil {
			return &stageError{"loopback up", explainRights(err)}
		}
	}
	const pings = "/proc/sys/net/ipv4/ping_group_range"
	if b, err := os.ReadFile(pings); err == nil && string(b) == "1\t0\n" {
		// Groups that do not exist in the user namespace are refused.
		for _, all := range []string{"0 2147483647", "0 65535", "0 0"} {
			if os.WriteFile(pings, []byte(all), 0) == nil {
				break
			}
		}
	}
	return nil
}

func explainRights(err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: no rights over the namespace (AppArmor restricts unprivileged user namespaces? sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0)", err)
	}
	return err
}

// makeTUN makes a TUN device.
func makeTUN(nl *netlink.Handle, l Link, a *answer) (*os.File, error) {
	fd, err := unix.Open(cloneDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, explainDevice(cloneDevice, err)
	}
	f := os.NewFile(uintptr(fd), cloneDevice)
	ifr, err := unix.NewIfreq(l.Name)
	if err != nil {
		f.Close()
		return nil, &stageError{"interface name", fmt.Errorf("%q: expected 1 to 15 bytes", l.Name)}
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := retry(func() error { return unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr) }, unix.EBUSY, unix.EINVAL); err != nil {
		f.Close()
		switch {
		case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EINVAL):
			return nil, taken(l.Name)
		case errors.Is(err, unix.EPERM):
			return nil, &tierError{fmt.Errorf("a TUN device may not be made in this namespace: %w", err), "run the engine as the user that made the container, or as root"}
		}
		return nil, &tierError{fmt.Errorf("TUNSETIFF: %w", err), ""}
	}
	if a.Offload, a.Reason, err = tun.SetOffload(fd, l.Offload); err != nil {
		f.Close()
		return nil, &stageError{"offloads", err}
	}
	link, err := nl.LinkByName(l.Name)
	if err == nil {
		err = nl.LinkSetTxQLen(link, txQueueLen)
	}
	if err != nil {
		f.Close()
		return nil, &stageError{"queue length of " + l.Name, err}
	}
	return f, nil
}

// CheckDevice returns what is wrong with the TUN tier here as far as the device
// node goes, nil if it can be opened.
func CheckDevice() *Verdict {
	fd, err := unix.Open(cloneDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
		return nil
	}
	v := &Verdict{Tier: TierTUN, Why: err.Error()}
	var no *tierError
	if errors.As(explainDevice(cloneDevice, err), &no) {
		v.Why, v.Fix = no.err.Error(), no.fix
	}
	return v
}

// explainDevice says why the device node at path cannot be opened.
func explainDevice(path string, err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return &tierError{fmt.Errorf("there is no %s", path), "sudo modprobe tun; in a container: --device " + path}
	case errors.Is(err, unix.EACCES):
		mode := "its mode"
		if fi, serr := os.Stat(path); serr == nil {
			mode = fmt.Sprintf("its mode is %04o", fi.Mode().Perm())
		}
		return &tierError{fmt.Errorf("%s may not be opened (%s)", path, mode),
			"sudo chmod 0666 " + path + "; harmless, making a device takes CAP_NET_ADMIN all the same"}
	case errors.Is(err, unix.EPERM):
		return &tierError{fmt.Errorf("%s may not be opened (a container's device rule)", path), "run the container with --device " + path}
	}
	return &tierError{fmt.Errorf("open %s: %w", path, err), ""}
}

func taken(name string) error {
	return &stageError{"interface " + name, errors.New("there is one of this name in the container already: attached by another engine? choose another with --ifname")}
}

// retry repeats make while it returns one of the errors that an interface
// being removed in the background causes.
func retry(make func() error, while ...error) error {
	for deadline := time.Now().Add(leftover); ; time.Sleep(leftoverRetry) {
		err := make()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		again := false
		for _, w := range while {
			again = again || errors.Is(err, w)
		}
		if !again {
			return err
		}
	}
}

// makeVeth makes a veth pair whose far end lies in a network namespace of its
// own, which nothing but the packet socket on it keeps alive: when the socket
// is closed, by whatever end of the engine, the namespace goes and takes the
// pair along.
func makeVeth(nl *netlink.Handle, l Link, a *answer) (*os.File, error) {
	far, err := netns.New()
	if err != nil {
		return nil, &tierError{fmt.Errorf("a namespace for the far end: %w", err), "sudo sysctl -w user.max_net_namespaces=16384"}
	}
	defer far.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = l.Name, l.MTU
	attrs.TxQLen = 1000 // queues need a length the day somebody adds a qdisc
	pair := &netlink.Veth{
		LinkAttrs: attrs, PeerName: farEnd, PeerMTU: uint32(l.MTU),
		PeerNamespace: netlink.NsFd(int(far.File().Fd())),
	}
	err = retry(func() error { return nl.LinkAdd(pair) }, unix.EEXIST)
	switch {
	case errors.Is(err, unix.EEXIST):
		return nil, taken(l.Name)
	case errors.Is(err, unix.EOPNOTSUPP):
		return nil, &tierError{fmt.Errorf("the kernel has no veth devices: %w", err), "sudo modprobe veth"}
	case err != nil:
		return nil, &tierError{fmt.Errorf("veth pair: %w", explainRights(err)), ""}
	}
	near, err := nl.LinkByName(l.Name)
	if err != nil {
		return nil, &stageError{"interface " + l.Name, err}
	}
	// Without ARP every packet leaves at once, with the interface's own address
	// as destination; what matters is only the address of what comes back.
	if err := nl.LinkSetARPOff(near); err != nil {
		remove(nl, l.Name)
		return nil, &stageError{"neighbours of " + l.Name, err}
	}
	copy(a.Peer[:], near.Attrs().HardwareAddr)
	var fd int
	err = far.Do(func() (err error) { fd, err = openFarEnd(a); return err })
	if err != nil {
		remove(nl, l.Name)
		return nil, err
	}
	a.Offload, a.Reason = tun.OffloadFull, "veth and packet socket carry every super-packet"
	if l.GSOMaxSize == 0 || l.Offload == tun.OffloadNone {
		a.Offload, a.Reason = tun.OffloadNone, "asked for with --offload none"
		if err := nl.LinkSetGSOMaxSegs(near, 1); err != nil {
			unix.Close(fd)
			remove(nl, l.Name)
			return nil, &stageError{"segmentation of " + l.Name, err}
		}
	}
	return os.NewFile(uintptr(fd), "packet socket"), nil
}

// openFarEnd brings the engine's end of the pair up and opens the packet socket
// on it. It runs inside its namespace.
func openFarEnd(a *answer) (int, error) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return -1, &stageError{"netlink", err}
	}
	defer nl.Close()
	link, err := nl.LinkByName(farEnd)
	if err != nil {
		return -1, &stageError{"far end of the pair", err}
	}
	quietIPv6(farEnd)
	if err := errors.Join(nl.LinkSetARPOff(link), nl.LinkSetUp(link)); err != nil {
		return -1, &stageError{"far end of the pair", err}
	}
	copy(a.Self[:], link.Attrs().HardwareAddr)
	proto := int(htons(unix.ETH_P_IP))
	// Protocol 0 first: nothing is received before the options are set.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return -1, &tierError{fmt.Errorf("the kernel has no packet sockets: %w", err), "sudo modprobe af_packet"}
	}
	if err != nil {
		return -1, &tierError{fmt.Errorf("packet socket: %w", err), "CAP_NET_RAW over the namespace is needed"}
	}
	for _, o := range []struct {
		name       string
		level, opt int
		value      int
		optional   bool
	}{
		{"PACKET_VNET_HDR", unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1, false},
		{"PACKET_IGNORE_OUTGOING", unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1, true},
		// The queueing discipline of a link that has just come up drops what is
		// sent before the kernel has noticed; there is none to go through.
		{"PACKET_QDISC_BYPASS", unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1, true},
		{"SO_RCVBUF", unix.SOL_SOCKET, unix.SO_RCVBUF, socketBuffer, true},
		{"SO_SNDBUF", unix.SOL_SOCKET, unix.SO_SNDBUF, socketBuffer, true},
		{"SO_RCVBUFFORCE", unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBuffer, true},
		{"SO_SNDBUFFORCE", unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, socketBuffer, true},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.opt, o.value); err != nil && !o.optional {
			unix.Close(fd)
			return -1, &tierError{fmt.Errorf("packet socket: %s: %w", o.name, err), ""}
		}
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(proto), Ifindex: link.Attrs().Index}); err != nil {
		unix.Close(fd)
		return -1, &stageError{"bind the packet socket", err}
	}
	return fd, nil
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// configure gives the interface MTU, limits, address and route, and sets it up.
func configure(nl *netlink.Handle, l Link) error {
	link, err := nl.LinkByName(l.Name)
	if err != nil {
		return &stageError{"interface " + l.Name, err}
	}
	if link.Attrs().MTU != l.MTU {
		if err := nl.LinkSetMTU(link, l.MTU); err != nil {
			return &stageError{fmt.Sprintf("MTU %d", l.MTU), err}
		}
	}
	if l.GSOMaxSize > 0 {
		if err := nl.LinkSetGSOMaxSize(link, l.GSOMaxSize); err != nil {
			return &stageError{fmt.Sprintf("gso_max_size %d", l.GSOMaxSize), err}
		}
		// Kernels before 6.3 have one limit for both families.
		if link.Attrs().GSOIPv4MaxSize != 0 {
			if err := nl.LinkSetGSOIPv4MaxSize(link, l.GSOMaxSize); err != nil {
				return &stageError{fmt.Sprintf("gso_ipv4_max_size %d", l.GSOMaxSize), err}
			}
		}
	}
	quietIPv6(l.Name)
	addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(l.Addr, 32))}
	if err := nl.AddrAdd(link, addr); err != nil {
		return &stageError{fmt.Sprintf("address %s", l.Addr), explainRights(err)}
	}
	if err := nl.LinkSetUp(link); err != nil {
		return &stageError{l.Name + " up", explainRights(err)}
	}
	route := &netlink.Route{
		LinkIndex: link.Attrs().Index, Dst: ipNet(l.Network), Scope: netlink.SCOPE_LINK,
		Src: l.Addr.AsSlice(), Protocol: routeProtocol,
	}
	if err := nl.RouteAdd(route); err != nil {
		if errors.Is(err, unix.EEXIST) {
			err = fmt.Errorf("the container has this route already: remove it, or attach a container without this network")
		}
		return &stageError{fmt.Sprintf("route %s", l.Network), err}
	}
	return nil
}

// quietIPv6 keeps router solicitations out of an overlay that carries IPv4
// only. A kernel without IPv6 has no such file.
func quietIPv6(name string) {
	_ = os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", name, "disable_ipv6"), []byte("1"), 0)
}

func remove(nl *netlink.Handle, name string) {
	if link, err := nl.LinkByName(name); err == nil {
		_ = nl.LinkDel(link) // it goes with its descriptor anyway
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}
