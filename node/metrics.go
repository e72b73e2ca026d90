package node

import (
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"tweed/encap"
	"tweed/engine"
	"tweed/lease"
)

// collector reads the node's status when it is scraped; nothing is kept in
// step with the packet loop.
type collector struct {
	n     *Node
	descs map[string]*prometheus.Desc
}

// metric is one row of the list of metrics.
type metric struct {
	name, help string
	labels     []string
}

var metrics = []metric{
	{"tweed_info", "Constant 1; who this node is.", []string{"version", "node", "node_id", "device", "framing", "offload"}},
	{"tweed_ready", "1 when the node is ready as /readyz has it.", nil},
	{"tweed_mtu_bytes", "MTU of the TUN device.", nil},
	{"tweed_packets_total", "Inner packets received, from the TUN (tx) or the underlay (rx).", []string{"direction"}},
	{"tweed_bytes_total", "Bytes of inner packets received.", []string{"direction"}},
	{"tweed_delivered_packets_total", "Inner packets handed on.", []string{"direction"}},
	{"tweed_delivered_bytes_total", "Bytes of inner packets handed on.", []string{"direction"}},
	{"tweed_drops_total", "Inner packets not handed on, by reason.", []string{"direction", "reason"}},
	{"tweed_icmp_errors_sent_total", "ICMP errors written to the TUN.", nil},
	{"tweed_icmp_errors_limited_total", "ICMP errors the rate limit held back.", nil},
	{"tweed_socket_drops_total", "Datagrams the kernel dropped because a receive buffer was full.", nil},
	{"tweed_peers", "Peers in the table, by framing.", []string{"framing"}},
	{"tweed_skipped_leases", "Leases the data plane cannot use.", nil},
	{"tweed_problems", "Problems that status lists.", nil},
	{"tweed_device_recreated_total", "How often the TUN device was made again after it vanished.", nil},
	{"tweed_etcd_connected", "1 while the etcd watch is established.", nil},
	{"tweed_etcd_revision", "etcd revision the table corresponds to.", nil},
	{"tweed_lease_held", "1 while our own lease is held in etcd.", nil},
	{"tweed_lease_events_total", "Control plane events, by kind.", []string{"kind"}},
	{"tweed_rules_restored_total", "How often missing traffic rules were put back.", nil},
}

func newCollector(n *Node) *collector {
	c := &collector{n: n, descs: map[string]*prometheus.Desc{}}
	for _, m := range metrics {
		c.descs[m.name] = prometheus.NewDesc(m.name, m.help, m.labels, nil)
	}
	return c
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range metrics {
		ch <- c.descs[m.name]
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	s := c.n.status()
	send := func(name string, v float64, labels ...string) {
		t := prometheus.GaugeValue
		if strings.HasSuffix(name, "_total") {
			t = prometheus.CounterValue
		}
		ch <- prometheus.MustNewConstMetric(c.descs[name], t, v, labels...)
	}
	flag := func(name string, on bool) {
		v := 0.0
		if on {
			v = 1
		}
		send(name, v)
	}
	send("tweed_info", 1, s.Version, s.Node.Name, s.Node.ID, s.Device.Name, s.Framing.String(), s.Device.Offload)
	flag("tweed_ready", s.Ready)
	send("tweed_mtu_bytes", float64(s.Device.MTU))
	for r := range engine.NumReasons {
		dir, l := "tx", &s.Ledger.Tx
		if r.Receive() {
			dir, l = "rx", &s.Ledger.Rx
		}
		// Every reason is reported, also at 0: a rate needs a first value.
		send("tweed_drops_total", float64(l.Drops[r.String()]), dir, r.String())
	}
	for _, d := range []struct {
		name string
		l    *DirectionLedger
	}{{"tx", &s.Ledger.Tx}, {"rx", &s.Ledger.Rx}} {
		send("tweed_packets_total", float64(d.l.Packets), d.name)
		send("tweed_bytes_total", float64(d.l.Bytes), d.name)
		send("tweed_delivered_packets_total", float64(d.l.Delivered), d.name)
		send("tweed_delivered_bytes_total", float64(d.l.DeliveredBytes), d.name)
	}
	send("tweed_icmp_errors_sent_total", float64(s.Ledger.ICMPSent))
	send("tweed_icmp_errors_limited_total", float64(s.Ledger.ICMPLimited))
	send("tweed_socket_drops_total", float64(s.Ledger.SocketDropped))
	for f := encap.Framing(0); f < encap.NumFramings; f++ {
		send("tweed_peers", float64(s.Peers[f.String()]), f.String())
	}
	send("tweed_skipped_leases", float64(len(s.Skipped)))
	send("tweed_problems", float64(len(s.Problems)))
	send("tweed_device_recreated_total", float64(s.Device.Recreated))
	flag("tweed_etcd_connected", s.Etcd.Connected)
	send("tweed_etcd_revision", float64(s.Etcd.Revision))
	flag("tweed_lease_held", s.Lease != nil && s.Lease.State == lease.OwnHeld)
	for kind, v := range map[string]uint64{
		"bad-key": s.Counters.BadKeys, "bad-value": s.Counters.BadValues,
		"relist": s.Counters.Relists, "compaction": s.Counters.Compactions,
		"watch-restart": s.Counters.WatchRestarts, "watch-stall": s.Counters.WatchStalls,
		"stale-event":      s.Counters.StaleEvents,
		"anti-entropy-run": s.Counters.AntiEntropyRuns, "anti-entropy-diff": s.Counters.AntiEntropyDiffs,
		"keepalive-error": s.Counters.KeepAliveErrors, "retaken": s.Counters.LeaseRetaken,
		"rollback": s.Counters.Rollbacks,
	} {
		send("tweed_lease_events_total", float64(v), kind)
	}
	send("tweed_rules_restored_total", float64(s.Rules.Restored))
}

// metricsHandler serves the node's metrics and those of the Go runtime.
func (n *Node) metricsHandler() http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(newCollector(n), collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError})
}
