package main

import (
	"reflect"
	"strings"
	"testing"
)

func TestParseLoads(t *testing.T) {
	got, err := parseLoads("tcp1, tcp64-reverse,tcp4-both,tcp1-captured,udp64,udp1300x4,ping,idle,")
	if err != nil {
		t.Fatal(err)
	}
	want := []load{
		{name: "tcp1", kind: loadTCP, flows: 1},
		{name: "tcp64-reverse", kind: loadTCP, flows: 64, direction: reverse},
		{name: "tcp4-both", kind: loadTCP, flows: 4, direction: both},
		{name: "tcp1-captured", kind: loadTCP, flows: 1, captured: true},
		{name: "udp64", kind: loadUDP, flows: 1, payload: 64},
		{name: "udp1300x4", kind: loadUDP, flows: 4, payload: 1300},
		{name: "ping", kind: loadPing, flows: 1},
		{name: "idle", kind: loadIdle, flows: 1},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if _, err := parseLoads(defaultLoads); err != nil {
		t.Errorf("the default: %v", err)
	}
}

func TestParseLoadsRefusesAndSaysWhatIsExpected(t *testing.T) {
	for _, list := range []string{"", "tcp", "tcp0", "tcp129", "udp8", "udp1400", "udp64x0", "sctp1", "tcp1-up", "tcp99999999999999999999"} {
		_, err := parseLoads(list)
		if err == nil || !strings.Contains(err.Error(), "expected") {
			t.Errorf("%q: %v", list, err)
		}
	}
	if _, err := parseLoads("tcp1,tcp1"); err == nil {
		t.Error("the same load twice was accepted")
	}
}

func TestParseCaptureLoss(t *testing.T) {
	got, err := parseCaptureLoss("capturing on tun-in of a\n3 packets captured\n4 packets received by filter\n1 packet dropped by capture\n")
	if got != 25 || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	for _, text := range []string{"", "tweed: capture: the engine has gone", "0 packets received by filter\n0 packets dropped by capture\n"} {
		if got, err := parseCaptureLoss(text); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestIperf3Arguments(t *testing.T) {
	for name, want := range map[string]string{
		"tcp4":         "-P 4 --connect-timeout 3000",
		"tcp1-reverse": "-P 1 --connect-timeout 3000 -R",
		"tcp2-both":    "-P 2 --connect-timeout 3000 --bidir",
		"udp64x3":      "-P 3 --connect-timeout 3000 -u -b 0 -l 64",
	} {
		l, err := parseLoad(name)
		if err != nil {
			t.Fatal(err)
		}
		got := strings.Join(iperf3Args(l, way{from: "10.0.0.1", to: "10.0.0.2", port: iperf3Port}, 7), " ")
		if want := "-c 10.0.0.2 -B 10.0.0.1 -p 5201 -J -t 7 " + want; got != want {
			t.Errorf("%s:\n got %s\nwant %s", name, got, want)
		}
	}
}
