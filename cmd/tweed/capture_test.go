package main

import (
	"bytes"
	"encoding/json"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"tweed/capture"
	"tweed/capture/filter"
	"tweed/capture/pcapng"
	"tweed/engine"
	"tweed/engine/tap"
	"tweed/tun/tuntest"
)

func TestCaptureLimits(t *testing.T) {
	var l captureLimits
	for _, good := range []string{"duration:0.5", "filesize:10", "packets:3", "files:7"} {
		if err := l.Set(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	if l != (captureLimits{duration: 500 * time.Millisecond, filesize: 10_000, packets: 3, files: 7}) {
		t.Errorf("%+v", l)
	}
	for _, bad := range []string{"", "3", "hours:3", "duration:-1", "duration:x", "duration:NaN", "packets:0", "packets:-1", "files:1.5", "filesize:99999999999"} {
		if err := l.Set(bad); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

func TestStrftime(t *testing.T) {
	at := time.Date(2026, 3, 4, 15, 6, 7, 0, time.UTC)
	for format, want := range map[string]string{
		"x-%Y%m%d-%H%M%S.pcap": "x-20260304-150607.pcap", "%F_%T": "2026-03-04_15:06:07", "%%%q%": "%%q%", "%s": "1772636767", "%j": "063", "plain2006": "plain2006",
	} {
		if got := strftime(format, at); got != want {
			t.Errorf("%s: %s, want %s", format, got, want)
		}
	}
}

func TestFlowFilter(t *testing.T) {
	text, err := flowFilter("10.1.1.2,10.1.2.3:80")
	if err != nil {
		t.Fatal(err)
	}
	f, err := filter.Compile(text, filter.Options{})
	if err != nil {
		t.Fatal(err)
	}
	match := func(src, dst string, sport, dport uint16) bool {
		p := tuntest.Packet{Proto: tuntest.TCP, Src: netip.MustParseAddr(src), Dst: netip.MustParseAddr(dst), SrcPort: sport, DstPort: dport}.Bytes()
		return f.Match(&filter.Meta{Inner: p, Layer: filter.LayerInner}, p)
	}
	if !match("10.1.1.2", "10.1.2.3", 5, 80) || !match("10.1.2.3", "10.1.1.2", 80, 9) || match("10.1.1.2", "10.1.2.3", 80, 5) || match("10.1.1.9", "10.1.2.3", 5, 80) {
		t.Errorf("%s matches the wrong packets", text)
	}
	for _, bad := range []string{"", "10.1.1.2", "a,b", "10.1.1.2:0,10.1.2.3", "10.1.1.2,10.1.2.3,10.1.2.4", "::1,::2", "10.1.1.2:x,10.1.1.3"} {
		if _, err := flowFilter(bad); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

// planOf parses flags into what would be written.
func planOf(t *testing.T, args ...string) (filePlan, error) {
	t.Helper()
	var o captureOptions
	cmd := &cobra.Command{}
	o.register(cmd)
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	return o.plan(cmd.Flags())
}

func TestCapturePlans(t *testing.T) {
	for args, want := range map[string]filePlan{
		"-w x":                               {path: "x", format: formatPcapng},
		"-w x.pcap":                          {path: "x.pcap", format: formatPcap},
		"-w x.pcap --format pcapng":          {path: "x.pcap", format: formatPcapng},
		"-w x -b filesize:5 -b files:2":      {path: "x", format: formatPcapng, naming: dumpcapRing, next: captureLimits{filesize: 5000, files: 2}},
		"-w x -b files:2 -a filesize:5":      {path: "x", format: formatPcapng, naming: dumpcapRing, next: captureLimits{filesize: 5000, files: 2}},
		"-w x -b packets:5 -a files:2":       {path: "x", format: formatPcapng, naming: dumpcapRing, next: captureLimits{packets: 5}, stopFiles: 2},
		"-w x -G 5 -W 3":                     {path: "x", format: formatPcapng, naming: tcpdumpRing, next: captureLimits{duration: 5 * time.Second}, stopFiles: 3},
		"-w x -C 2 -W 3":                     {path: "x", format: formatPcapng, naming: tcpdumpRing, next: captureLimits{filesize: 2_000_000}, wrap: 3},
		"-w -":                               {path: "-", format: formatPcapng},
		"-w - --format pcap -a filesize:100": {path: "-", format: formatPcap},
	} {
		got, err := planOf(t, strings.Fields(args)...)
		if err != nil || got.path != want.path || got.format != want.format || got.naming != want.naming || got.next != want.next || got.stopFiles != want.stopFiles || got.wrap != want.wrap {
			t.Errorf("%s: %+v, %v", args, got, err)
		}
	}
	for _, args := range []string{
		"-b packets:3", "-w x -b files:2", "-w - -b packets:2", "-w x -a files:2", "-w x -b packets:2 -C 1", "-w x -W 2", "-w x -C -1",
		"-w x --format text", "--format pcap", "-a filesize:3",
	} {
		if p, err := planOf(t, strings.Fields(args)...); err == nil {
			t.Errorf("%s: no error, %+v", args, p)
		}
	}
}

// feed writes n packets with the given plan and returns the files made, by
// name, with the number of packets in each.
func feed(t *testing.T, plan filePlan, n int) map[string]int {
	t.Helper()
	dir := t.TempDir()
	plan.path = filepath.Join(dir, plan.path)
	f, err := newCaptureFiles(plan, capture.Hello{Node: "n1", Points: []string{"tun-in"}, Snap: 2000})
	if err != nil {
		t.Fatal(err)
	}
	var stats capture.Stats
	for range n {
		stats.Seen[tap.TunIn]++
		p := capture.Packet{Time: 1e18, Point: tap.TunIn, Data: make([]byte, 1000)}
		if err := f.packet(&p, &stats); err != nil {
			t.Fatal(err)
		}
		if err := f.turn(); err != nil && err != errEnough {
			t.Fatal(err)
		}
	}
	if err := f.finish(&stats); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]int{}
	for _, e := range entries {
		file, err := os.Open(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		r, err := pcapng.NewReader(file)
		if err != nil {
			t.Fatal(err)
		}
		var p pcapng.Packet
		for err = r.Next(&p); err == nil; err = r.Next(&p) {
			files[e.Name()]++
		}
		if err != io.EOF {
			t.Errorf("%s: %v", e.Name(), err)
		}
		file.Close()
	}
	return files
}

func TestFilesOfMinusC(t *testing.T) {
	p := filePlan{path: "x.pcap", format: formatPcap, naming: tcpdumpRing, next: captureLimits{filesize: 1_000_000}}
	// 24 bytes of header and 1016 a packet: a file is past its size with 985.
	if got := feed(t, p, 2000); len(got) != 3 || got["x.pcap"] != 985 || got["x.pcap1"] != 985 || got["x.pcap2"] != 30 {
		t.Errorf("-C 1: %v", got)
	}
	p.wrap = 2
	if got := feed(t, p, 2000); len(got) != 2 || got["x.pcap0"] != 30 || got["x.pcap1"] != 985 {
		t.Errorf("-C 1 -W 2: %v", got)
	}
}

func TestFilesOfMinusG(t *testing.T) {
	dir := t.TempDir()
	f, err := newCaptureFiles(filePlan{path: filepath.Join(dir, "x-%s"), format: formatPcapng, naming: tcpdumpRing, stopFiles: 2,
		next: captureLimits{duration: time.Second}}, capture.Hello{Points: []string{"tun-in"}, Snap: 100})
	if err != nil {
		t.Fatal(err)
	}
	opened := f.opened
	for after, want := range map[time.Duration]error{time.Second / 2: nil, time.Second: nil} {
		if err := f.tick(opened.Add(after)); err != want {
			t.Errorf("after %s: %v", after, err)
		}
	}
	if err := f.tick(opened.Add(2 * time.Second)); err != errEnough {
		t.Errorf("-W 2: %v", err)
	}
	names, _ := filepath.Glob(filepath.Join(dir, "x-*"))
	if len(names) != 2 {
		t.Errorf("%v", names)
	}
}

func TestFilesArePrivate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.pcapng")
	if err := os.WriteFile(path, []byte("old and open to all"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := newCaptureFiles(filePlan{path: path, format: formatPcapng}, capture.Hello{Points: []string{"drop"}, Snap: 100})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.finish(&capture.Stats{}); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
}

func TestPacketLines(t *testing.T) {
	h := &capture.Hello{Peers: map[string]string{"192.0.2.2": "n2"}}
	tcp := tuntest.Packet{Proto: tuntest.TCP, SrcPort: 41000, DstPort: 80, Seq: 7, Flags: tuntest.SYN, Window: 64240}.Bytes()
	for _, c := range []struct {
		p    capture.Packet
		want string
	}{
		{capture.Packet{Point: tap.TunIn, Data: tcp, Peer: netip.MustParseAddrPort("192.0.2.2:8285")},
			"00:00:01.000000002 tun-in   > n2  IP 10.1.1.2.41000 > 10.1.2.3.80: Flags [S], seq 7, win 64240, length 0\n"},
		{capture.Packet{Point: tap.Drop, Reason: engine.TxNoRoute, Data: tcp},
			"00:00:01.000000002 drop     > -   IP 10.1.1.2.41000 > 10.1.2.3.80: Flags [S], seq 7, win 64240, length 0  DROP no-route (no lease covers the destination)\n"},
		{capture.Packet{Point: tap.TunOut, Receive: true, Data: tuntest.Packet{Proto: tuntest.UDP, SrcPort: 1, DstPort: 2, Payload: []byte("abc")}.Bytes(), Peer: netip.MustParseAddrPort("192.0.2.9:1")},
			"00:00:01.000000002 tun-out  < 192.0.2.9  IP 10.1.1.2.1 > 10.1.2.3.2: UDP, length 3\n"},
	} {
		var out bytes.Buffer
		p := newPacketPrinter(&out, h, false, false)
		p.loc = time.UTC
		c.p.Time = 1_000_000_002
		if err := p.packet(&c.p, nil); err != nil {
			t.Fatal(err)
		}
		p.flush()
		if out.String() != c.want {
			t.Errorf("\n have %q\n want %q", out.String(), c.want)
		}
		out.Reset()
		p = newPacketPrinter(&out, h, true, false)
		p.packet(&c.p, nil)
		p.flush()
		var o printedPacket
		if err := json.Unmarshal(out.Bytes(), &o); err != nil || o.Schema != 1 || o.Point != c.p.Point.String() || (o.Verdict == "drop") != (c.p.Point == tap.Drop) {
			t.Errorf("%v: %s", err, &out)
		}
	}
}

// FuzzPacketLine: whatever a peer sends must not stop the one who watches.
func FuzzPacketLine(f *testing.F) {
	f.Add(tuntest.Packet{Proto: tuntest.TCP, Payload: []byte("x")}.Bytes(), false)
	f.Add(slices.Concat(make([]byte, 28), tuntest.Packet{Proto: tuntest.ICMP, Payload: []byte{8, 0, 0, 0, 0, 1, 0, 2}}.Bytes()), true)
	f.Fuzz(func(t *testing.T, data []byte, outer bool) {
		for _, vxlan := range []bool{false, true} {
			if s := decodeLine(&capture.Packet{Data: data, Outer: outer, VXLAN: vxlan}); s == "" || strings.ContainsAny(s, "\n\x1b") {
				t.Errorf("%q", s)
			}
		}
	})
}

func TestExtcapTellsWiresharkWhatItAsks(t *testing.T) {
	ask := func(args ...string) string {
		t.Helper()
		var out, errs bytes.Buffer
		if status := run(t.Context(), append([]string{"extcap"}, args...), &out, &errs); status != 0 {
			t.Errorf("%v: exit status %d, %s", args, status, &errs)
		}
		return out.String()
	}
	if out := ask("--extcap-interfaces", "--extcap-version=4.0", "--some-later-flag"); !strings.HasPrefix(out, "extcap {version=") {
		t.Errorf("interfaces: %s", out)
	}
	if out := ask("--extcap-dlts", "--extcap-interface", "tweed0-inner"); out != "dlt {number=228}{name=IPV4}{display=IPv4}\n" {
		t.Errorf("dlts: %s", out)
	}
	if out := ask("--extcap-config", "--extcap-interface", "tweed0-drops"); !strings.Contains(out, "{value=drop}{display=drop}{default=true}") || !strings.Contains(out, "{value=tun-in}{display=tun-in}{default=false}") {
		t.Errorf("config: %s", out)
	}
	if out := ask("--extcap-interface", "tweed0-inner", "--extcap-capture-filter", "icmp and peer n2"); out != "" {
		t.Errorf("good filter: %s", out)
	}
	if out := ask("--extcap-interface", "tweed0-inner", "--extcap-capture-filter", "icmp and prot 3"); !strings.Contains(out, "column 10") {
		t.Errorf("bad filter: %s", out)
	}
}
