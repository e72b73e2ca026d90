package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

const (
	// maxFlows is iperf3's own limit (MAX_STREAMS in iperf.h).
	maxFlows = 128
	// minPayload is what iperf3's sequence number and time stamp need in a
	// datagram (MIN_UDP_BLOCKSIZE); maxPayload still fits every subject's MTU on
	// a 1500-byte underlay, so that no subject fragments.
	minPayload = 16
	maxPayload = 1390
	// iperf3Port is iperf3's default, given all the same: the environment
	// cannot change it then.
	iperf3Port = 5201
)

// errNoIperf3 says what to install.
var errNoIperf3 = errors.New("iperf3 is not installed: expected it on PATH; type one of\n" +
	"    apt-get install iperf3      (Debian, Ubuntu)\n" +
	"    dnf install iperf3          (Fedora, RHEL)\n" +
	"    apk add iperf3              (Alpine)\n" +
	"    zypper install iperf        (SUSE)\n" +
	"or leave its loads out: --loads ping,idle")

// findIperf3 returns the path and the version line of iperf3.
func findIperf3() (path, version string, err error) {
	if path, err = exec.LookPath("iperf3"); err != nil {
		return "", "", errNoIperf3
	}
	out, err := exec.Command(path, "--version").Output()
	if err != nil {
		return "", "", fmt.Errorf("%s --version: %w", path, err)
	}
	return path, firstLine(string(out)), nil
}

// iperf3Args is the client's command line, without the program.
func iperf3Args(l load, w way, seconds int) []string {
	args := []string{
		"-c", w.to,
	}
	if w.from != "" {
		args = append(args, "-B", w.from)
	}
	args = append(args, "-p", strconv.Itoa(w.port), "-J",
		"-t", strconv.Itoa(seconds), "-P", strconv.Itoa(l.flows), "--connect-timeout", "3000")
	switch {
	case l.kind == loadUDP:
		// -b 0: as fast as the sending thread can.
		args = append(args, "-u", "-b", "0", "-l", strconv.Itoa(l.payload))
	case l.direction == reverse:
		args = append(args, "-R")
	case l.direction == both:
		args = append(args, "--bidir")
	}
	return args
}

// iperf3Sum is one of the sums at the end of iperf3's report, as far as it is
// used here.
type iperf3Sum struct {
	Seconds     float64 `json:"seconds"`
	Bytes       float64 `json:"bytes"`
	Bits        float64 `json:"bits_per_second"`
	Packets     float64 `json:"packets"`
	Lost        float64 `json:"lost_packets"`
	Retransmits float64 `json:"retransmits"`
}

type iperf3Report struct {
	Error string `json:"error"`
	End   struct {
		Sum          *iperf3Sum `json:"sum"`
		Sent         *iperf3Sum `json:"sum_sent"`
		Received     *iperf3Sum `json:"sum_received"`
		BothSent     *iperf3Sum `json:"sum_sent_bidir_reverse"`
		BothReceived *iperf3Sum `json:"sum_received_bidir_reverse"`
	} `json:"end"`
}

// traffic is what an iperf3 run moved.
type traffic struct {
	values map[string]float64
	// bytes and packets arrived at the receiving program; packets is 0 for TCP.
	// bytes of a both ways run are those of both directions.
	bytes, packets float64
}

// parseIperf3 reads the client's JSON. The receiver's figures are in it: the
// two ends exchange them when the test is over.
func parseIperf3(l load, text []byte) (traffic, error) {
	var r iperf3Report
	if err := json.Unmarshal(text, &r); err != nil {
		return traffic{}, fmt.Errorf("iperf3 output: %w: %.120q", err, text)
	}
	if r.Error != "" {
		return traffic{}, fmt.Errorf("iperf3: %s", r.Error)
	}
	if l.kind == loadUDP {
		return parseIperf3UDP(l, r)
	}
	e := r.End
	if e.Sent == nil || e.Received == nil || (l.direction == both && (e.BothSent == nil || e.BothReceived == nil)) {
		return traffic{}, errors.New("iperf3 output has no sums for this test: expected iperf3 3.7 or newer")
	}
	t := traffic{bytes: e.Received.Bytes, values: map[string]float64{
		metricGbit:        e.Received.Bits / 1e9,
		metricRetransmits: e.Sent.Retransmits,
	}}
	if l.direction == both {
		t.bytes += e.BothReceived.Bytes
		t.values[metricGbit] += e.BothReceived.Bits / 1e9
		t.values[metricRetransmits] += e.BothSent.Retransmits
	}
	if t.bytes == 0 {
		return traffic{}, errors.New("iperf3: nothing arrived")
	}
	return t, nil
}

// parseIperf3UDP counts what the receiver got: the bytes it read divided by the
// length of a datagram. The packet count of the report is the highest sequence
// number instead, and its loss misses what was lost at the end.
func parseIperf3UDP(l load, r iperf3Report) (traffic, error) {
	sum, received := r.End.Sum, r.End.Received
	if sum == nil {
		return traffic{}, errors.New("iperf3 output has no sum for this test: expected iperf3 3.7 or newer")
	}
	delivered, seconds := sum.Packets-sum.Lost, sum.Seconds
	if received != nil && received.Bytes > 0 {
		delivered, seconds = received.Bytes/float64(l.payload), received.Seconds
	}
	if delivered <= 0 || seconds <= 0 {
		return traffic{}, errors.New("iperf3: nothing arrived")
	}
	return traffic{bytes: delivered * float64(l.payload), packets: delivered, values: map[string]float64{
		metricDelivered: delivered / seconds / 1e3,
		metricSent:      sum.Packets / sum.Seconds / 1e3,
	}}, nil
}

// runIperf3 runs one test, server on side 1 and client on side 0, in at most
// seconds plus stepSlack.
func (b *bench) runIperf3(ctx context.Context, l load, o *overlay, seconds int) (traffic, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(seconds)*time.Second+stepSlack)
	defer cancel()
	w := o.between()
	server, err := b.start(w.ns[1], "iperf3-server", b.iperf3, "-s", "-1", "-B", w.listen, "-p", strconv.Itoa(iperf3Port))
	if err != nil {
		return traffic{}, err
	}
	defer server.stop(0)
	if err := waitFor(ctx, 3*time.Second, func() error { return listening(server.pid(), iperf3Port) }); err != nil {
		return traffic{}, fmt.Errorf("iperf3 server: %w%s", err, server.tail())
	}
	out, err := b.output(ctx, w.ns[0], b.iperf3, iperf3Args(l, w, seconds)...)
	if len(out) > 0 && ctx.Err() == nil {
		return parseIperf3(l, out) // tells more than the exit status
	}
	if err == nil {
		err = errors.New("no output")
	}
	return traffic{}, fmt.Errorf("iperf3 client: %w", err)
}

// listening returns nil when a TCP socket of the namespace of process pid
// listens on port.
func listening(pid, port int) error {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp", pid))
	if err != nil {
		return err
	}
	if !hasListener(string(text), port) {
		return fmt.Errorf("nothing listens on TCP port %d", port)
	}
	return nil
}

// hasListener looks for port in state LISTEN (0A) in the text of /proc/net/tcp.
func hasListener(text string, port int) bool {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) > 3 && f[3] == "0A" && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) {
			return true
		}
	}
	return false
}

// firstLine is the first line of s that is not blank.
func firstLine(s string) string {
	for line := range strings.Lines(s) {
		if line = strings.TrimSpace(line); line != "" {
			return line
		}
	}
	return ""
}
