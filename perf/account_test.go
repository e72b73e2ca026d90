package main

import (
	"strings"
	"testing"
	"time"
)

// through is what the counters show when n bytes in p packets cross from side
// 0 to side 1 and nothing comes back.
func through(n, p float64) [2]counters {
	return [2]counters{{txBytes: n, txPackets: p}, {rxBytes: n, rxPackets: p}}
}

func TestCrossed(t *testing.T) {
	virtual := &overlay{dev: [2]string{"t0", "t0"}, pair: &pair{link: linkVirtual}}
	wire := &overlay{dev: [2]string{"t0", "t0"}, pair: &pair{link: linkWire}}
	bulk := traffic{bytes: 1e6}
	tcp := load{kind: loadTCP}
	for _, c := range []struct {
		name string
		o    *overlay
		l    load
		t    traffic
		u    spent
		want string
	}{
		{"all good", virtual, tcp, bulk, spent{dev: through(1e6, 20), link: through(1e6, 20)}, ""},
		{"a little is missing", virtual, tcp, bulk, spent{dev: through(96e4, 20), link: through(96e4, 20)}, ""},
		{"past the device", virtual, tcp, bulk, spent{link: through(1e6, 20)}, "did not cross t0 of the sending side"},
		{"past the underlay", virtual, tcp, bulk, spent{dev: through(1e6, 20)}, "did not cross eth0 of the sending side"},
		{"the other way", virtual, load{kind: loadTCP, direction: reverse}, bulk, spent{dev: through(1e6, 20), link: through(1e6, 20)}, "did not cross"},
		{"both ways, one came", virtual, load{kind: loadTCP, direction: both}, traffic{bytes: 2e6}, spent{dev: through(1e6, 20), link: through(1e6, 20)}, "did not cross"},
		{"pings", virtual, load{kind: loadPing}, traffic{packets: 500}, spent{dev: through(42e3, 500), link: through(42e3, 500)}, ""},
		{"pings past the device", virtual, load{kind: loadPing}, traffic{packets: 500}, spent{dev: through(42e6, 5), link: through(42e3, 500)}, "did not cross t0"},
		{"frames on a wire", wire, tcp, bulk, spent{dev: through(1e6, 20), link: through(1e6, 700)}, ""},
		{"super-packets on a wire", wire, tcp, bulk, spent{dev: through(1e6, 20), link: through(1e6, 20)}, "super-packets"},
	} {
		err := c.o.crossed(c.l, c.t, c.u)
		if (err == nil) != (c.want == "") || (err != nil && !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

func TestCosts(t *testing.T) {
	u := spent{engines: 3 * time.Second, machine: machineCPU{busy: 6 * time.Second, stolen: time.Second, all: 10 * time.Second}}
	tr := traffic{bytes: 1.5e9, values: map[string]float64{}}
	u.costs(load{kind: loadTCP}, tr, true)
	if v := tr.values; v[metricEngineGB] != 2 || v[metricMachineGB] != 4 || v[metricSteal] != 10 {
		t.Errorf("%v", v)
	}
	tr = traffic{packets: 1.5e6, values: map[string]float64{}}
	u.costs(load{kind: loadUDP}, tr, false)
	if _, ok := tr.values[metricEngineMpkt]; ok || tr.values[metricMachineMpkt] != 4 {
		t.Errorf("%v", tr.values)
	}
}

func TestPingResult(t *testing.T) {
	trips := make([]time.Duration, 995)
	for i := range trips {
		trips[i] = time.Duration(i+1) * time.Microsecond
	}
	got, err := pingResult(trips, 1000)
	if err != nil || got[metricPingAvg] != 498 || got[metricPingP99] != 986 || got[metricPingLost] != 5 {
		t.Errorf("%v, %v", got, err)
	}
	for _, n := range []int{0, 980} {
		if _, err := pingResult(trips[:n], 1000); err == nil {
			t.Errorf("%d replies of 1000 were accepted", n)
		}
	}
}

func TestIsReply(t *testing.T) {
	packet := make([]byte, 20+8)
	packet[0] = 0x45
	copy(packet[20:], []byte{0, 0, 0, 0, 0x12, 0x34, 0, 7})
	if !isReply(packet, 0x1234, 7) {
		t.Error("the reply was not recognised")
	}
	for name, p := range map[string][]byte{
		"another id": append(append([]byte{}, packet[:24]...), 0, 0, 0, 7), "short": packet[:27], "empty": nil,
		"a request":  append(append([]byte{}, packet[:20]...), 8, 0, 0, 0, 0x12, 0x34, 0, 7),
		"bad header": append([]byte{0x41}, packet[1:]...),
	} {
		if isReply(p, 0x1234, 7) {
			t.Errorf("%s was taken for the reply", name)
		}
	}
	// RFC 1071: a sum over data and its checksum is zero.
	echo := []byte{8, 0, 0, 0, 0x12, 0x34, 0, 7}
	sum := internetChecksum(echo)
	echo[2], echo[3] = byte(sum>>8), byte(sum)
	if internetChecksum(echo) != 0 {
		t.Error("the checksum does not verify")
	}
}

func TestSubnetBase(t *testing.T) {
	got, err := subnetBase("FLANNEL_NETWORK=10.77.0.0/16\nFLANNEL_SUBNET=10.77.72.1/24\nFLANNEL_MTU=1450\n")
	if err != nil || got.String() != "10.77.72.0" {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "FLANNEL_SUBNET=\n", "FLANNEL_SUBNET=10.77.72.1\n"} {
		if _, err := subnetBase(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestSegmentationFeatures(t *testing.T) {
	for name, want := range map[string]bool{
		"tx-tcp-segmentation": true, "tx-udp-segmentation": true, "tx-generic-segmentation": true, "tx-gso-list": true,
		"tx-udp_tnl-segmentation": true, "tx-checksum-ip-generic": false, "rx-gro": false, "tx-scatter-gather": false,
	} {
		if got := cutsOnSend(name); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
