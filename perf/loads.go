package main

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// defaultLoads are what is measured without --loads. idle stands last so that
// the memory it reads is what the engines hold after traffic.
const defaultLoads = "tcp1,tcp4,tcp1-reverse,tcp1-both,udp64,udp1300,ping,idle"

type loadKind int

const (
	loadTCP loadKind = iota
	loadUDP
	loadPing
	loadIdle
)

// direction is where the bytes of a TCP load go; forward is from side 0, where
// iperf3's client runs, to side 1.
type direction int

const (
	forward direction = iota
	reverse
	both
)

// load is one kind of traffic between the two sides.
type load struct {
	name string
	kind loadKind
	// flows is the number of TCP or UDP flows, in each direction.
	flows     int
	direction direction
	// captured means once with a capture and once without.
	captured bool
	// payload of a UDP datagram in bytes.
	payload int
}

var (
	tcpLoad = regexp.MustCompile(`^tcp(\d+)(-reverse|-both|-captured)?$`)
	udpLoad = regexp.MustCompile(`^udp(\d+)(?:x(\d+))?$`)
)

// parseLoads reads a comma separated list of loads.
func parseLoads(list string) ([]load, error) {
	var out []load
	for _, name := range splitList(list) {
		l, err := parseLoad(name)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(out, func(o load) bool { return o.name == l.name }) {
			return nil, fmt.Errorf("--loads: %s is given twice", name)
		}
		out = append(out, l)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("--loads: expected at least one of %s", defaultLoads)
	}
	return out, nil
}

func parseLoad(name string) (load, error) {
	l := load{name: name, flows: 1}
	ok := true
	number := func(s string, low, high int) int {
		n, err := strconv.Atoi(s)
		ok = ok && err == nil && n >= low && n <= high
		return n
	}
	switch {
	case name == "ping":
		l.kind = loadPing
	case name == "idle":
		l.kind = loadIdle
	case tcpLoad.MatchString(name):
		m := tcpLoad.FindStringSubmatch(name)
		l.kind = loadTCP
		l.flows = number(m[1], 1, maxFlows)
		l.direction = map[string]direction{"": forward, "-reverse": reverse, "-both": both}[m[2]]
		l.captured = m[2] == "-captured"
	case udpLoad.MatchString(name):
		m := udpLoad.FindStringSubmatch(name)
		l.kind = loadUDP
		l.payload = number(m[1], minPayload, maxPayload)
		if m[2] != "" {
			l.flows = number(m[2], 1, maxFlows)
		}
	default:
		ok = false
	}
	if !ok {
		return load{}, fmt.Errorf("--loads %q: expected tcpN, tcpN-reverse, tcpN-both or tcpN-captured (N flows, 1 to %d), "+
			"udpB or udpBxN (B bytes, %d to %d, N flows), ping or idle", name, maxFlows, minPayload, maxPayload)
	}
	return l, nil
}

// usesIperf3 says whether the load needs the iperf3 program.
func (l load) usesIperf3() bool { return l.kind == loadTCP || l.kind == loadUDP }

// title is the load in words.
func (l load) title() string {
	flows := "1 flow"
	if l.flows > 1 {
		flows = strconv.Itoa(l.flows) + " flows"
	}
	switch l.kind {
	case loadTCP:
		if l.captured {
			return "TCP " + flows + ", captured"
		}
		return "TCP " + flows + map[direction]string{forward: "", reverse: ", reverse", both: ", both ways"}[l.direction]
	case loadUDP:
		t := fmt.Sprintf("UDP %d B", l.payload)
		if l.flows > 1 {
			t += ", " + flows
		}
		return t
	case loadPing:
		return "ping"
	}
	return "idle"
}

// Metrics: the keys of Sample.Values.
const (
	// metricGbit is payload received, 10^9 bit/s, both directions added up.
	metricGbit = "gbit_per_s"
	// metricRetransmits counts TCP segments sent again.
	metricRetransmits = "retransmits"
	// metricDelivered and metricSent are datagrams per millisecond (kpps) at
	// the receiving and the sending program.
	metricDelivered = "delivered_kpps"
	metricSent      = "sent_kpps"
	// metricPingAvg, metricPingP99 and metricPingAdded are round trips in
	// microseconds; added is the average less raw veth's of the same round.
	metricPingAvg   = "avg_us"
	metricPingP99   = "p99_us"
	metricPingAdded = "added_us"
	metricPingLost  = "lost"
	// metricEngineGB and metricEngineMpkt are CPU seconds of both engines per
	// 10^9 bytes of payload and per 10^6 datagrams delivered.
	metricEngineGB   = "engine_s_per_gb"
	metricEngineMpkt = "engine_s_per_mpkt"
	// metricMachineGB and metricMachineMpkt are the same of the whole machine,
	// programs and kernel included: the only cost the kernel's vxlan shows.
	metricMachineGB   = "machine_s_per_gb"
	metricMachineMpkt = "machine_s_per_mpkt"
	// metricSteal is the share of the machine in percent that the hypervisor
	// gave to others.
	metricSteal = "steal_percent"
	// metricRSS and metricPeakRSS are MiB of the larger engine after the loads
	// and at its peak; metricRSSBoth is the sum of both engines.
	metricRSS     = "rss_mib"
	metricRSSBoth = "rss_both_mib"
	metricPeakRSS = "peak_rss_mib"
	// metricIdle is the CPU of the busier engine without traffic, in percent
	// of one core.
	metricIdle = "idle_percent"
)

// Groups of rows, one table each.
const (
	groupTraffic = "traffic"
	groupCost    = "cost"
)

// Row is one line of the tables: a metric of a load.
type Row struct {
	Load   string `json:"load"`
	Metric string `json:"metric"`
	Title  string `json:"title"`
	Unit   string `json:"unit"`
	Group  string `json:"group"`
	// LowerIsBetter holds for times and costs.
	LowerIsBetter bool `json:"lower_is_better,omitempty"`
	// NoRatio marks figures whose ratio to another subject says nothing.
	NoRatio bool `json:"no_ratio,omitempty"`
}

// rows are the lines the load adds to the tables.
func (l load) rows() []Row {
	traffic := func(metric, title, unit string) Row {
		return Row{Load: l.name, Metric: metric, Title: title, Unit: unit, Group: groupTraffic}
	}
	cost := func(metric, title, unit string) Row {
		return Row{Load: l.name, Metric: metric, Title: title, Unit: unit, Group: groupCost, LowerIsBetter: true}
	}
	switch l.kind {
	case loadTCP:
		if l.captured {
			share := traffic(metricCaptured, l.title()+" / without", "")
			lost := cost(metricCaptureLost, l.title()+", lost by the capture", "%")
			share.NoRatio, lost.NoRatio = true, true
			return []Row{traffic(metricGbit, l.title(), "Gbit/s"), share, lost}
		}
		return []Row{
			traffic(metricGbit, l.title(), "Gbit/s"),
			cost(metricEngineGB, l.title()+", engines", "CPU s/GB"),
			cost(metricMachineGB, l.title()+", machine", "CPU s/GB"),
		}
	case loadUDP:
		return []Row{
			traffic(metricDelivered, l.title()+" delivered", "kpps"),
			cost(metricEngineMpkt, l.title()+", engines", "CPU s/Mpkt"),
			cost(metricMachineMpkt, l.title()+", machine", "CPU s/Mpkt"),
		}
	case loadPing:
		rows := []Row{
			traffic(metricPingAvg, "ping average", "us"),
			traffic(metricPingP99, "ping p99", "us"),
			traffic(metricPingAdded, "ping added to raw", "us"),
		}
		for i := range rows {
			rows[i].LowerIsBetter = true
		}
		rows[2].NoRatio = true
		return rows
	}
	rows := []Row{
		cost(metricRSS, "RSS of the larger engine", "MiB"),
		cost(metricRSSBoth, "RSS of both engines", "MiB"),
		cost(metricIdle, "idle CPU of the busier engine", "% of a core"),
	}
	for i := range rows {
		rows[i].NoRatio = true
	}
	return rows
}

// splitList splits a comma separated list and drops blanks and empty entries.
func splitList(list string) []string {
	var out []string
	for _, s := range strings.Split(list, ",") {
		if s = strings.TrimSpace(s); s != "" {
			out = append(out, s)
		}
	}
	return out
}
