package main

import (
	"bytes"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"tweed/encap"
	"tweed/node"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// golden compares with testdata/name, or writes it with -update.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; go test ./cmd/tweed -update rewrites it\ngot:\n%s\nwant:\n%s", path, got, want)
	}
}

var (
	testStart = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	testOwn   = node.LeaseStatus{
		Subnet: netip.MustParsePrefix("10.244.7.0/24"), PublicIP: netip.MustParseAddr("192.0.2.1"),
		BackendType: "vxlan", VNI: 1, VtepMAC: "ae:12:34:56:78:9a", NodeName: "n1", Own: true, Source: "etcd",
	}
)

var testPeers = []node.PeerStatus{
	{Subnet: netip.MustParsePrefix("10.244.8.0/24"), Endpoint: netip.MustParseAddrPort("192.0.2.2:8472"), Framing: encap.FramingVXLAN, MTU: 1450, NodeName: "n2", Source: "etcd"},
	{Subnet: netip.MustParsePrefix("10.244.100.0/24"), Endpoint: netip.MustParseAddrPort("192.0.2.203:8285"), Framing: encap.FramingUDP, MTU: 1450, Source: "etcd"},
}

func testStatus() node.Status {
	return node.Status{
		Schema: node.Schema, Program: "tweed", Version: "v1.0.0", PID: 4711, Started: testStart,
		Phase: node.PhaseRunning, Ready: true,
		Node:     node.NodeStatus{ID: "6a1f2c9e-0000-4000-8000-000000000001", Name: "n1", PublicIP: netip.MustParseAddr("192.0.2.1"), VtepMAC: "ae:12:34:56:78:9a"},
		Underlay: node.UnderlayStatus{Interface: "eth0", Address: netip.MustParseAddr("192.0.2.1"), MTU: 1500, Chosen: "default route"},
		Network:  &node.NetworkStatus{Network: netip.MustParsePrefix("10.244.0.0/16"), SubnetLen: 24, Backend: "vxlan", Port: 8472, VNI: 1},
		Device:   node.DeviceStatus{Name: "tweed0", Address: netip.MustParseAddr("10.244.7.0"), MTU: 1450, Up: true, Workers: 2, Offload: "full"},
		Framing:  encap.FramingVXLAN,
		Listen:   []node.ListenStatus{{Framing: encap.FramingVXLAN, Addr: netip.MustParseAddrPort("192.0.2.1:8472")}},
		Lease:    &node.OwnLeaseStatus{LeaseStatus: testOwn, State: "held"},
		Etcd:     node.EtcdStatus{Endpoints: []string{"http://192.0.2.9:2379"}, Prefix: "/coreos.com/network", Connected: true, Synced: true, Revision: 42},
		Peers:    map[string]int{"vxlan": 2, "udp": 1},
		Ledger: node.Ledger{
			Tx: node.DirectionLedger{Packets: 1001, Bytes: 1_500_000, Delivered: 1000, DeliveredBytes: 1_499_000, Dropped: 1, Drops: map[string]uint64{"no-route": 1}},
			Rx: node.DirectionLedger{Packets: 515, Bytes: 900, Delivered: 500, DeliveredBytes: 700, Dropped: 15, Drops: map[string]uint64{"unknown-source": 12, "spoofed-source": 3, "ttl-zero": 0}},
		},
	}
}

func TestStatusOfAHealthyNode(t *testing.T) {
	var b bytes.Buffer
	printStatus(&b, testStatus(), testPeers, testStart.Add(90*time.Minute))
	golden(t, "status.txt", b.Bytes())
}

func TestStatusOfANodeInTrouble(t *testing.T) {
	s := testStatus()
	s.Phase, s.Ready = node.PhaseCached, false
	s.Etcd.Connected, s.Etcd.Synced, s.Etcd.LastError = false, false, "dial tcp 192.0.2.9:2379: connection refused"
	s.Lease.State = "cached"
	s.Peers = nil
	s.Ledger = node.Ledger{}
	s.Device.Offload, s.Device.OffloadReason = "none", "TUNSETOFFLOAD: invalid argument"
	s.Rules = node.RulesStatus{Mode: "iptables", Masq: true, Forward: true}
	s.Skipped = []node.SkippedLease{{Subnet: netip.MustParsePrefix("10.244.9.0/24"), BackendType: "wireguard", Why: "framing not supported"}}
	s.Ignored = []node.IgnoredKey{{Key: "junk", Revision: 7, Reason: "key: not of the form <a.b.c.d>-<len>"}}
	s.Ledger.SocketDropped = 1
	s.Problems = []string{"etcd does not answer", "forwarding from the last good snapshot"}
	var b bytes.Buffer
	printStatus(&b, s, nil, testStart.Add(time.Second))
	golden(t, "status-trouble.txt", b.Bytes())
}

func TestStatusBeforeAnythingIsKnown(t *testing.T) {
	var b bytes.Buffer
	printStatus(&b, node.Status{Program: "tweed", Version: "v1.0.0", PID: 1, Started: testStart, Phase: node.PhaseWaiting}, nil, testStart)
	golden(t, "status-waiting.txt", b.Bytes())
}

func TestTables(t *testing.T) {
	var b bytes.Buffer
	printPeers(&b, node.PeersAnswer{Peers: testPeers})
	b.WriteString("\n")
	printRoutes(&b, node.RoutesAnswer{Routes: []node.RouteStatus{
		{Dst: netip.MustParsePrefix("10.244.7.0/24"), Via: "local", MTU: 1450, NodeName: "n1"},
		{Dst: netip.MustParsePrefix("10.244.8.0/24"), Via: "192.0.2.2:8472", Framing: encap.FramingVXLAN, MTU: 1450, NodeName: "n2"},
	}})
	b.WriteString("\n")
	printLeases(&b, node.LeasesAnswer{Leases: []node.LeaseStatus{
		testOwn,
		{Subnet: netip.MustParsePrefix("10.244.8.0/24"), PublicIP: netip.MustParseAddr("192.0.2.2"), Reservation: true, Source: "snapshot"},
	}})
	b.WriteString("\n")
	printRoute(&b, node.RouteAnswer{Dst: netip.MustParseAddr("10.244.8.3"), Result: "peer", Peer: &testPeers[0], Explain: "sent to n2 in vxlan framing, to 192.0.2.2:8472, subnet 10.244.8.0/24"})
	printRoute(&b, node.RouteAnswer{Dst: netip.MustParseAddr("10.244.7.3"), Result: "local"})
	printRoute(&b, node.RouteAnswer{Dst: netip.MustParseAddr("10.244.9.3"), Result: "drop", Reason: "no-route", Explain: "no lease covers the destination"})
	printRoute(&b, node.RouteAnswer{Dst: netip.MustParseAddr("192.0.2.77"), Result: "outside", Explain: "it is outside the overlay's network 10.244.0.0/16; the host's own routing table decides"})
	b.WriteString("\n")
	printPeers(&b, node.PeersAnswer{})
	golden(t, "tables.txt", b.Bytes())
}

func TestByteCounts(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 999: "999 B", 1000: "1.0 kB", 1_500_000: "1.5 MB", 2_000_000_000_000: "2.0 TB", 1<<64 - 1: "18.4 EB"} {
		if got := bytesText(n); got != want {
			t.Errorf("bytesText(%d) = %q, want %q", n, got, want)
		}
	}
}
