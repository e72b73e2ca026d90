package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"tweed/node"
)

// leaseKey is the key of the engine's own lease in etcd.
func leaseKey(e *daemon) string {
	return keyOf(e.status().Lease.Subnet)
}

func keyOf(subnet netip.Prefix) string {
	return fmt.Sprintf("%s/subnets/%s-%d", prefix, subnet.Addr(), subnet.Bits())
}

// tweedField is the one field a lease of ours has more than flannel's.
var tweedField = regexp.MustCompile(`,"Tweed":\{[^{}]*\}\}$`)

// flanneldNode starts flanneld on node i with its own flags or variables.
func flanneldNode(w *world, i int, env []string, args ...string) *daemon {
	w.t.Helper()
	name := fmt.Sprintf("flanneld%d", i+1)
	e := &daemon{w: w, i: i, name: name, ns: w.lan.Nodes[i], dir: filepath.Join(w.dir, name)}
	e.before = traces(w.t, e.ns)
	e.api = node.Dial(filepath.Join(e.dir, "api.sock"))
	w.t.Cleanup(e.api.Close)
	e.process = w.launchEnv(e.ns, name, env, append([]string{flanneldBin}, args...)...)
	e.awaitReady()
	return e
}

// TestFlanneldWritesWhatFlannelWrites pins the bytes of the lease and of
// subnet.env, for flags and for variables, with one dash and with two.
func TestFlanneldWritesWhatFlannelWrites(t *testing.T) {
	const mac = `"VtepMAC":"([0-9a-f]{2}(:[0-9a-f]{2}){5})"`
	for _, c := range []struct {
		name, config, lease string
		mtu                 int
	}{
		{"udp", udpConfig, `^\{"PublicIP":"192.0.2.1[12]","PublicIPv6":null\}$`, 1426},
		{"vxlan", vxlanConfig, `^\{"PublicIP":"192.0.2.1[12]","PublicIPv6":null,"BackendType":"vxlan","BackendData":\{"VNI":1,` + mac + `\}\}$`, 1450},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, 2)
			w.config(c.config)
			fileA, fileB := filepath.Join(w.dir, "run-a", "subnet.env"), filepath.Join(w.dir, "run-b", "subnet.env")
			a := flanneldNode(w, 0, nil, "-etcd-endpoints="+w.endpoint(), "--iface=eth0", "-subnet-file="+fileA,
				"-state-dir", filepath.Join(w.dir, "flanneld1"), "-iptables-forward-rules=false")
			b := flanneldNode(w, 1, []string{"FLANNELD_ETCD_ENDPOINTS=" + w.endpoint(), "FLANNELD_IFACE=192.0.2.12", "FLANNELD_SUBNET_FILE=" + fileB,
				"FLANNELD_STATE_DIR=" + filepath.Join(w.dir, "flanneld2"), "FLANNELD_IPTABLES_FORWARD_RULES=false"})
			awaitPeers(1, a, b)
			for e, file := range map[*daemon]string{a: fileA, b: fileB} {
				s := e.status()
				value := w.get(keyOf(s.Lease.Subnet))
				theirs := tweedField.ReplaceAllString(value, "}")
				if theirs == value || !regexp.MustCompile(c.lease).MatchString(theirs) || !strings.Contains(theirs, e.underlay().String()) {
					t.Errorf("%s: lease %s, want %s of %s and the field Tweed", e.name, value, c.lease, e.underlay())
				}
				want := fmt.Sprintf("FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=%s/24\nFLANNEL_MTU=%d\nFLANNEL_IPMASQ=false\n", s.Lease.Subnet.Addr().Next(), c.mtu)
				if got := readFile(t, file); got != want {
					t.Errorf("%s: subnet.env\n%swant\n%s", e.name, got, want)
				}
				if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o644 {
					t.Errorf("%s: mode of subnet.env: %v %v", e.name, info.Mode(), err)
				}
				if s.Device.Name != "flannel0" || s.Device.Address != s.Lease.Subnet.Addr() {
					t.Errorf("%s: device %s with %s, want flannel0 with %s", e.name, s.Device.Name, s.Device.Address, s.Lease.Subnet.Addr())
				}
			}
			assertTraffic(t, a.host(), b.host(), 1<<20, []int{1, 30000})
			a.down()
			b.down()
		})
	}
}

// TestMTU: the defaults and every way to set it. The limit is in
// TestUnusableHostIsRefused.
func TestMTU(t *testing.T) {
	w := newWorld(t, 1)
	for _, c := range []struct {
		config string
		flags  []string
		want   int
	}{
		{udpConfig, nil, 1426},
		{vxlanConfig, nil, 1450},
		{udpConfig, []string{"--mtu", "max"}, 1472},
		{vxlanConfig, []string{"--mtu", "max"}, 1450},
		{udpConfig, []string{"--mtu", "1300"}, 1300},
		{vxlanConfig, []string{"--mtu", "1300"}, 1300},
		// flannel's Backend.MTU is the MTU of the underlay.
		{`{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","MTU":1400}}`, nil, 1350},
	} {
		w.config(c.config)
		e := w.up(0, c.flags...)
		got := []int{e.status().Device.MTU, deviceMTU(t, e)}
		if !slices.Equal(got, []int{c.want, c.want}) || !strings.Contains(readFile(t, e.subnetFile()), fmt.Sprintf("FLANNEL_MTU=%d\n", c.want)) {
			t.Errorf("%s %v: status and device %v, %s want %d", c.config, c.flags, got, readFile(t, e.subnetFile()), c.want)
		}
		e.down()
	}
}

func deviceMTU(t *testing.T, e *daemon) int {
	t.Helper()
	mtu := 0
	netlinkIn(t, e.ns, func(h *netlink.Handle) {
		link, err := h.LinkByName(e.status().Device.Name)
		if err != nil {
			t.Fatal(err)
		}
		mtu = link.Attrs().MTU
	})
	return mtu
}

// TestDeviceAndRoute: address, route and link flags as flannel has them.
func TestDeviceAndRoute(t *testing.T) {
	w := newWorld(t, 1)
	w.config(udpConfig)
	e := w.up(0)
	s := e.status()
	netlinkIn(t, e.ns, func(h *netlink.Handle) {
		link, err := h.LinkByName("tweed0")
		if err != nil {
			t.Fatal(err)
		}
		addrs, err := h.AddrList(link, netlink.FAMILY_V4)
		if err != nil || len(addrs) != 1 || addrs[0].IPNet.String() != s.Lease.Subnet.Addr().String()+"/32" {
			t.Errorf("addresses %v (%v), want only the subnet's first, /32", addrs, err)
		}
		routes, err := h.RouteList(link, netlink.FAMILY_V4)
		if err != nil || len(routes) != 1 || routes[0].Dst.String() != "10.244.0.0/16" {
			t.Errorf("routes %v (%v), want only the network", routes, err)
		}
	})
	// A second engine on the same port is refused, and the first does not notice.
	other := w.launch(e.ns, "second", append(slices.Clone(e.argv), "--state-dir", filepath.Join(w.dir, "second"),
		"--subnet-file", filepath.Join(w.dir, "second.env"), "--tun-name", "other0")...)
	if status := other.wait(); status == 0 {
		t.Errorf("a second engine on the same address started: %s", other.output())
	}
	if got := e.status(); !got.Ready || got.PID != s.PID {
		t.Error("the first engine was disturbed")
	}
	if overlayRoute(t, e.ns, netip.MustParseAddr("10.244.7.7")) != "tweed0" {
		t.Error("the route to the overlay is gone")
	}
	e.down()
}
