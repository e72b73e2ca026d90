package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The files in testdata are real reports of iperf3 3.12, cut to the parts read.
func TestParseIperf3(t *testing.T) {
	for _, c := range []struct {
		file, load     string
		bytes, packets float64
		values         map[string]float64
	}{
		{"iperf3-tcp-reverse.json", "tcp1-reverse", 6291456, 0, map[string]float64{metricGbit: 0.0503262630898, metricRetransmits: 3}},
		{"iperf3-tcp-both.json", "tcp2-both", 2 * 12582912, 0, map[string]float64{metricGbit: 0.201255749976, metricRetransmits: 12}},
		{"iperf3-udp.json", "udp64", 20852416, 325819, map[string]float64{metricDelivered: 325.658124886, metricSent: 416.784108650}},
		{"iperf3-udp-old.json", "udp64", 326102 * 64, 326102, map[string]float64{metricDelivered: 325.940985153, metricSent: 416.784108650}},
	} {
		t.Run(c.file, func(t *testing.T) {
			text, err := os.ReadFile(filepath.Join("testdata", c.file))
			if err != nil {
				t.Fatal(err)
			}
			l, err := parseLoad(c.load)
			if err != nil {
				t.Fatal(err)
			}
			got, err := parseIperf3(l, text)
			if err != nil {
				t.Fatal(err)
			}
			if got.bytes != c.bytes || got.packets != c.packets {
				t.Errorf("%v bytes, %v packets; want %v, %v", got.bytes, got.packets, c.bytes, c.packets)
			}
			for metric, want := range c.values {
				if v := got.values[metric]; v < want*(1-1e-9) || v > want*(1+1e-9) {
					t.Errorf("%s = %v, want %v", metric, v, want)
				}
			}
		})
	}
}

func TestParseIperf3Errors(t *testing.T) {
	tcp, udp, bidir := load{kind: loadTCP}, load{kind: loadUDP, payload: 64}, load{kind: loadTCP, direction: both}
	for _, c := range []struct {
		l          load
		text, want string
	}{
		{tcp, `{"end":{},"error":"unable to connect to server: Connection refused"}`, "Connection refused"},
		{tcp, `iperf3: unrecognized option`, "iperf3: unrecognized option"},
		{tcp, `{"end":{}}`, "expected iperf3 3.7"},
		{udp, `{"end":{}}`, "expected iperf3 3.7"},
		{bidir, `{"end":{"sum_sent":{"bytes":1},"sum_received":{"bytes":1}}}`, "expected iperf3 3.7"},
		{tcp, `{"end":{"sum_sent":{"bytes":9},"sum_received":{"bytes":0}}}`, "nothing arrived"},
		{udp, `{"end":{"sum":{"packets":5,"lost_packets":5,"seconds":1}}}`, "nothing arrived"},
	} {
		if _, err := parseIperf3(c.l, []byte(c.text)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q in it", c.text, err, c.want)
		}
	}
}

func TestHasListener(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue
   0: 020000C0:1451 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 0100007F:094B 0100007F:1450 01 00000000:00000000 00:00000000 00000000     0        0 1 1
`
	for port, want := range map[int]bool{5201: true, 2379: false, 5200: false} {
		if got := hasListener(table, port); got != want {
			t.Errorf("port %d: %v", port, got)
		}
	}
}
