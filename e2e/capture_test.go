package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"tweed/capture/pcapng"
	"tweed/engine/tap"
	"tweed/node"
)

// capture starts `tweed capture` on a daemon and waits until it captures.
func (e *daemon) capture(args ...string) *process {
	e.w.t.Helper()
	argv := append([]string{tweedBin, "capture", "--state-dir", e.dir}, args...)
	p := e.w.launch(e.ns, "capture", argv...)
	e.w.await("capturing", func() bool {
		select {
		case <-p.ended:
			e.w.t.Fatalf("%s ended: %s", strings.Join(argv[1:], " "), p.output())
		default:
		}
		return strings.Contains(p.output(), "capturing on ")
	})
	return p
}

// summary are the three numbers a capture ends with.
func (p *process) summary() (captured, received, dropped uint64) {
	p.t.Helper()
	m := regexp.MustCompile(`(?m)^(\d+) packets? (captured|received by filter|dropped by capture)(?:, in \d+ records?)?$`).FindAllStringSubmatch(p.output(), -1)
	if len(m) != 3 {
		p.t.Fatalf("no summary of three lines:\n%s", p.output())
	}
	n := func(i int) uint64 { v, _ := strconv.ParseUint(m[i][1], 10, 64); return v }
	return n(0), n(1), n(2)
}

// captureFile is what a file says, read without the code that wrote it where
// the counters are concerned.
type captureFile struct {
	packets [tap.NumPoints]uint64
	// received, dropped and delivered are the counters of the statistics blocks.
	received, dropped, delivered [tap.NumPoints]uint64
	comments                     map[string]uint64
	points                       map[uint64][]tap.Point // by packet id
}

func readCapture(t *testing.T, path string) captureFile {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%s: mode %v, want 0600 (%v)", path, fi.Mode(), err)
	}
	r, err := pcapng.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	f := captureFile{comments: map[string]uint64{}, points: map[uint64][]tap.Point{}}
	point := func(i int) tap.Point {
		p, err := tap.ParsePoint(r.Interfaces()[i].Name)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	var p pcapng.Packet
	for err = r.Next(&p); err == nil; err = r.Next(&p) {
		at := point(p.Interface)
		f.packets[at]++
		f.points[p.ID] = append(f.points[p.ID], at)
		if p.Comment != "" {
			f.comments[p.Comment]++
		}
		inbound := at == tap.WireIn || at == tap.TunOut
		if at != tap.Drop && inbound != (p.Flags&pcapng.FlagDirMask == pcapng.FlagInbound) {
			t.Fatalf("%s: flags %x", at, p.Flags)
		}
	}
	for len(b) >= 12 {
		size := binary.LittleEndian.Uint32(b[4:])
		if binary.LittleEndian.Uint32(b) == 5 { // interface statistics
			at := point(int(binary.LittleEndian.Uint32(b[8:])))
			for o := b[20 : size-4]; len(o) >= 4; {
				code, n := binary.LittleEndian.Uint16(o), int(binary.LittleEndian.Uint16(o[2:]))
				if to := map[uint16]*uint64{4: &f.received[at], 5: &f.dropped[at], 8: &f.delivered[at]}[code]; to != nil {
					*to = binary.LittleEndian.Uint64(o[4:])
				}
				o = o[4+(n+3)&^3:]
			}
		}
		b = b[size:]
	}
	return f
}

// taken are what the ledger entered between two readings, by tap point.
func taken(a, b node.Ledger) [tap.NumPoints]uint64 {
	return [tap.NumPoints]uint64{
		tap.TunIn: b.Tx.Packets - a.Tx.Packets, tap.WireOut: b.Tx.Delivered - a.Tx.Delivered,
		tap.WireIn: b.Rx.Packets - a.Rx.Packets, tap.TunOut: b.Rx.Delivered - a.Rx.Delivered,
		tap.Drop: b.Tx.Dropped - a.Tx.Dropped + b.Rx.Dropped - a.Rx.Dropped,
	}
}

// opensEverywhere checks that the tools read a file without a complaint.
func opensEverywhere(t *testing.T, path string) {
	t.Helper()
	needTool(t, "tshark", "tcpdump", "capinfos")
	decode := []string{"-d", "udp.port==8472,vxlan", "-d", "udp.port==8285,ip"}
	check := []string{"-o", "ip.check_checksum:TRUE", "-o", "udp.check_checksum:TRUE", "-o", "tcp.check_checksum:TRUE"}
	for _, argv := range [][]string{
		append(append([]string{"tshark", "-n", "-r", path, "-Y", "_ws.malformed || _ws.expert.group == checksum || ip.checksum.status == 0 || udp.checksum.status == 0"}, decode...), check...),
		{"capinfos", path}, {"tcpdump", "-T", "vxlan", "-nr", path},
	} {
		var out, errs bytes.Buffer
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Stdout, cmd.Stderr = &out, &errs
		err := cmd.Run()
		complaint := regexp.MustCompile(`(?m)^(Running as user.*|reading from file.*)?\n`).ReplaceAllString(errs.String(), "")
		if err != nil || complaint != "" || argv[0] == "tshark" && out.Len() > 0 {
			t.Errorf("%s: %v %s%s", argv[0], err, complaint, lastLines(out.String(), 5))
		}
	}
}

func TestCaptureShowsBothSidesOfEveryPacket(t *testing.T) {
	for framing, config := range map[string]string{"udp": udpConfig, "vxlan": vxlanConfig} {
		t.Run(framing, func(t *testing.T) {
			w := newWorld(t, 2)
			w.config(config)
			a, b := w.up(0), w.up(1)
			awaitPeers(1, a, b)
			file := filepath.Join(w.dir, "x.pcapng")
			before := assertBalance(t, a)
			c := a.capture("--outer", "-w", file)
			for _, size := range []int{0, 1, 56, 1398, 4000} {
				assertPing(t, a.host(), b.host(), size)
				assertPing(t, b.host(), a.host(), size)
			}
			// Ending it must not cut off what is on its way.
			if status := c.end(unix.SIGINT); status != 0 {
				t.Errorf("exit status %d: %s", status, c.output())
			}
			want := taken(before, assertBalance(t, a))
			f := readCapture(t, file)
			if f.packets != want || f.delivered != want || f.received != want || f.packets[tap.TunIn] < 10 {
				t.Errorf("in the file %v, counters %v of %v, ledger %v", f.packets, f.delivered, f.received, want)
			}
			captured, received, dropped := c.summary()
			if n := sum(want); captured != n || received != n || dropped != 0 {
				t.Errorf("%d captured, %d received, %d dropped, want %d", captured, received, dropped, n)
			}
			for id, points := range f.points {
				if s := fmt.Sprint(points); s != "[tun-in wire-out]" && s != "[wire-in tun-out]" {
					t.Errorf("packet %d at %s", id, s)
				}
			}
			opensEverywhere(t, file)
			line := regexp.MustCompile(`look at it: (tshark .*)`).FindStringSubmatch(c.output())
			if line == nil {
				t.Fatalf("no command to look at the file:\n%s", c.output())
			}
			out, err := exec.Command("sh", "-c", line[1]+` -Y 'icmp && frame.interface_name == "wire-out"' 2>/dev/null`).Output()
			if n := strings.Count(string(out), "\n"); err != nil || n < 5 {
				t.Errorf("%s shows %d packets of ICMP at wire-out (%v)", line[1], n, err)
			}
		})
	}
}

func sum(counts [tap.NumPoints]uint64) (n uint64) {
	for _, v := range counts {
		n += v
	}
	return n
}

// TestCaptureAccountsForBulkTraffic: what is not in the file has been counted.
func TestCaptureAccountsForBulkTraffic(t *testing.T) {
	for _, accelerate := range []string{"auto", "off"} {
		t.Run("accelerate "+accelerate, func(t *testing.T) { testBulkCapture(t, accelerate) })
	}
}

func testBulkCapture(t *testing.T, accelerate string) {
	w := newWorld(t, 2)
	w.config(vxlanConfig)
	a, b := w.up(0, "--accelerate", accelerate), w.up(1, "--accelerate", accelerate)
	awaitPeers(1, a, b)
	file := filepath.Join(w.dir, "bulk.pcapng")
	before := assertBalance(t, a)
	supers := filepath.Join(w.dir, "supers.pcapng")
	c, d := a.capture("--point", "all", "-s", "128", "-w", file), a.capture("--point", "all", "-s", "128", "--super-packets", "-w", supers)
	assertTraffic(t, a.host(), b.host(), transferBytes(), []int{1, 1400, 60000})
	for _, p := range []*process{c, d} {
		if status := p.end(unix.SIGTERM); status != 0 {
			t.Errorf("exit status %d: %s", status, p.output())
		}
	}
	want := taken(before, assertBalance(t, a))
	assertCarriedBy(t, accelerate, a, b) // a capture changes nothing about the way
	assertSuperPackets(t, d, supers, want)
	f := readCapture(t, file)
	for p := range tap.NumPoints {
		if f.received[p] != want[p] || f.packets[p]+f.dropped[p] != want[p] || f.delivered[p] != f.packets[p] {
			t.Errorf("%s: %d in the file + %d dropped of %d received, ledger %d", p, f.packets[p], f.dropped[p], f.received[p], want[p])
		}
	}
	captured, received, dropped := c.summary()
	if captured+dropped != received || received != sum(want) {
		t.Errorf("%d captured + %d dropped, %d received, ledger %d", captured, dropped, received, sum(want))
	}
	t.Logf("%d captured, %d dropped by capture", captured, dropped)
	assertNoDrops(t, a, b)
	needTool(t, "capinfos")
	if out, err := exec.Command("capinfos", file).CombinedOutput(); err != nil || strings.Contains(string(out), "cut short") {
		t.Errorf("capinfos: %v, %s", err, lastLines(string(out), 5))
	}
}

// assertSuperPackets: the counters are those of the ledger, the records fewer.
func assertSuperPackets(t *testing.T, c *process, file string, want [tap.NumPoints]uint64) {
	t.Helper()
	f := readCapture(t, file)
	for p := range tap.NumPoints {
		if f.received[p] != want[p] || f.delivered[p]+f.dropped[p] != want[p] {
			t.Errorf("super-packets, %s: %d in the file + %d dropped of %d received, ledger %d", p, f.delivered[p], f.dropped[p], f.received[p], want[p])
		}
	}
	for _, p := range []tap.Point{tap.TunIn, tap.TunOut} {
		if f.packets[p] == 0 || f.packets[p] >= f.delivered[p] {
			t.Errorf("%s: %d records of %d packets: no super-packet among them", p, f.packets[p], f.delivered[p])
		}
	}
	captured, received, dropped := c.summary()
	if captured+dropped != received || received != sum(want) {
		t.Errorf("super-packets: %d captured + %d dropped, %d received, ledger %d", captured, dropped, received, sum(want))
	}
}

func TestCaptureShowsEveryForgeryWithItsReason(t *testing.T) {
	w := newWorld(t, 4)
	w.config(vxlanConfig)
	victim, peer, third := w.up(0), w.up(1), w.up(2)
	awaitPeers(2, victim, peer, third)
	ours, theirs := mustMAC(t, victim.status().Node.VtepMAC), mustMAC(t, peer.status().Node.VtepMAC)
	good := innerPacket(t, peer.addr(), victim.addr(), nil)
	forged := vxlanForgeries(t, innerForgeries(t, victim.addr(), peer.addr(), third.addr()), good, ours, theirs)
	drops, spoofed := filepath.Join(w.dir, "drops.pcapng"), filepath.Join(w.dir, "spoofed.pcapng")
	all := victim.capture("--point", "drop", "-w", drops)
	one := victim.capture("--reason", "spoofed-source", "-w", spoofed)
	before := assertBalance(t, victim)
	fromPeer, fromStranger := newSender(t, w, 1, victim, 8472), newSender(t, w, 3, victim, 8472)
	want := map[string]uint64{}
	for _, f := range forged {
		if f.stranger {
			fromStranger(f.payload)
		} else {
			fromPeer(f.payload)
		}
		want[fmt.Sprintf("drop:%s (%s)", f.reason, f.reason.Doc())]++
	}
	total := before.Rx.Packets + uint64(len(forged))
	w.await("every datagram entered", func() bool { return assertBalance(t, victim).Rx.Packets >= total })
	for _, c := range []*process{all, one} {
		if status := c.end(unix.SIGINT); status != 0 {
			t.Errorf("exit status %d: %s", status, c.output())
		}
	}
	if got := readCapture(t, drops); asJSON(t, got.comments) != asJSON(t, want) {
		t.Errorf("comments\n%s\nwant\n%s", asJSON(t, got.comments), asJSON(t, want))
	}
	for text := range want {
		if !strings.HasPrefix(text, "drop:spoofed-source ") {
			delete(want, text)
		}
	}
	if got := readCapture(t, spoofed); len(want) != 1 || asJSON(t, got.comments) != asJSON(t, want) {
		t.Errorf("--reason spoofed-source: %s, want %s", asJSON(t, got.comments), asJSON(t, want))
	}
}

// TestCapturesInTroubleDoNotTouchTraffic: a full disk, a closed pipe, SIGKILL,
// a reader that stops, and as many captures as there may be.
func TestCapturesInTroubleDoNotTouchTraffic(t *testing.T) {
	w := newWorld(t, 2)
	w.config(udpConfig)
	a, b := w.up(0), w.up(1)
	awaitPeers(1, a, b)
	s := stream(t, a.host(), b.host())
	awaitFlow(w, s, 10)
	if status, _, errs := run(t, tweedBin, "capture", "--state-dir", a.dir, "-w", "/dev/full"); status != 1 || !strings.Contains(errs, "disk is full") {
		t.Errorf("full disk: exit status %d, %s", status, errs)
	}
	for _, flags := range [][]string{{"-w", "-"}, nil} {
		var errs bytes.Buffer
		cmd := exec.Command(tweedBin, append([]string{"capture", "--state-dir", a.dir}, flags...)...)
		cmd.Stderr = &errs
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		_, err = out.Read(make([]byte, 1))
		out.Close()
		cmd.Wait()
		if err != nil || cmd.ProcessState.ExitCode() != 1 || !strings.Contains(errs.String(), "closed the pipe") {
			t.Errorf("closed pipe: %v, exit status %d, %s", err, cmd.ProcessState.ExitCode(), &errs)
		}
	}
	killed := a.capture("-w", filepath.Join(w.dir, "killed.pcapng"))
	killed.end(unix.SIGKILL)
	stopped := a.capture("--point", "all", "-w", filepath.Join(w.dir, "stopped.pcapng"))
	stopped.signal(unix.SIGSTOP)
	var all []*node.Capture
	for {
		c, err := a.api.Capture(t.Context(), node.CaptureRequest{})
		if err != nil {
			if !strings.Contains(err.Error(), "64 captures are running") {
				t.Error(err)
			}
			break
		}
		all = append(all, c)
	}
	if len(all) < 62 {
		t.Errorf("only %d captures", len(all))
	}
	awaitFlow(w, s, 200)
	for _, c := range all {
		c.Close()
	}
	stopped.signal(unix.SIGCONT)
	if status := stopped.end(unix.SIGINT); status != 0 {
		t.Errorf("after SIGCONT: exit status %d: %s", status, stopped.output())
	}
	assertClean(t, s)
	assertNoDrops(t, a, b)
}

// TestCaptureFilesAreDumpcaps compares names and sizes of ring files.
func TestCaptureFilesAreDumpcaps(t *testing.T) {
	needTool(t, "dumpcap", "tcpdump", "capinfos")
	w := newWorld(t, 2)
	w.config(udpConfig)
	// dumpcap listens on the TUN device, which shows what the accelerator carries
	// only once the node has noticed that somebody listens.
	a, b := w.up(0, "--accelerate", "off"), w.up(1)
	awaitPeers(1, a, b)
	// Only what the test sends counts, and every packet of it has one size.
	const only = "icmp[icmptype] == icmp-echo"
	for i, args := range [][]string{
		{"-b", "packets:4", "-b", "files:2", "-c", "14"},
		{"-b", "packets:3", "-a", "files:2"},
		{"-b", "packets:5", "-c", "5"},
		{"-c", "7"},
		{"-a", "packets:6"},
	} {
		ours, theirs := filepath.Join(w.dir, fmt.Sprint("tweed", i)), filepath.Join(w.dir, fmt.Sprint("dumpcap", i))
		for _, dir := range []string{ours, theirs} {
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		c := a.capture(append([]string{"--point", "tun-in", "-w", filepath.Join(ours, "x.pcapng"), only}, args...)...)
		d := w.launch(a.ns, "dumpcap", append([]string{"dumpcap", "-q", "-i", "tweed0", "-f", only, "-w", filepath.Join(theirs, "x.pcapng")}, args...)...)
		w.await("dumpcap captures", func() bool { return strings.Contains(d.output(), "File: ") })
		for range 16 {
			assertPing(t, a.host(), b.host(), 100)
		}
		if c.wait() != 0 || d.wait() != 0 {
			t.Errorf("%v: exit status: %s%s", args, c.output(), d.output())
		}
		if x, y := ringOf(t, ours), ringOf(t, theirs); x != y {
			t.Errorf("%v:\n tweed   %s\n dumpcap %s", args, x, y)
		}
	}
}

// ringOf lists the files of a directory, their names without the time, and the
// number of packets in each.
func ringOf(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		out, err := exec.Command("capinfos", "-Tcmr", filepath.Join(dir, e.Name())).Output()
		if err != nil {
			t.Fatal(err)
		}
		fields := strings.Split(strings.TrimSpace(string(out)), ",")
		all = append(all, regexp.MustCompile(`\d{14}`).ReplaceAllString(e.Name(), "TIME")+":"+fields[len(fields)-1])
	}
	return strings.Join(all, " ")
}

func TestCaptureRefusals(t *testing.T) {
	w := newWorld(t, 1)
	w.config(udpConfig)
	a := w.up(0)
	for _, c := range []struct {
		status int
		words  string
		args   []string
	}{
		{2, "column 5", []string{"tcp prot 80"}},
		{2, "column 8", []string{"reason bad-luck"}},
		{2, "expected tun-in", []string{"--point", "tun"}},
		{2, "expected one of", []string{"--reason", "bad-luck"}},
		{1, `peer "n9": no such node`, []string{"--peer", "n9"}},
		{2, "expected HOST", []string{"--flow", "a,b"}},
		{2, "-b files", []string{"-w", "x", "-b", "files:3"}},
		{2, "-w FILE", []string{"-b", "packets:3"}},
		{2, "expected pcapng or pcap", []string{"--format", "text", "-w", "x"}},
		{2, "--autostop", []string{"-a", "hours:3"}},
		{1, "no such file or directory", []string{"-w", "/nowhere/x.pcapng"}},
		{1, "no such socket", []string{"--state-dir", w.dir + "/nobody"}},
		{1, "no such program", []string{"--wireshark=no-such-program"}},
	} {
		args := append([]string{"capture", "--state-dir", a.dir}, c.args...)
		status, out, errs := run(t, tweedBin, args...)
		if status != c.status || !strings.Contains(errs, c.words) || strings.Count(errs, "\n") != 1 || out != "" {
			t.Errorf("%v: exit status %d, expected %d and %q in one line: %s%s", c.args, status, c.status, c.words, out, errs)
		}
	}
}

// TestCaptureIsRefusedToOtherUsers, those who can connect to the socket included.
func TestCaptureIsRefusedToOtherUsers(t *testing.T) {
	w := newWorld(t, 1)
	w.config(udpConfig)
	a := w.up(0)
	as := func(words string) {
		t.Helper()
		var errs bytes.Buffer
		cmd := exec.Command(tweedBin, "capture", "--state-dir", a.dir, "-c", "1")
		cmd.Stderr = &errs
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		err := cmd.Run()
		if cmd.ProcessState == nil {
			if os.Getenv("CI") == "true" {
				t.Fatal(err)
			}
			t.Skipf("cannot become another user here: %v", err)
		}
		if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(errs.String(), words) {
			t.Errorf("exit status %d, expected 1 and %q: %s", cmd.ProcessState.ExitCode(), words, &errs)
		}
	}
	for _, path := range []string{filepath.Dir(tweedBin), w.dir} {
		if err := os.Chmod(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	as("permission denied: run as root or as the user that started the engine")
	for path, mode := range map[string]os.FileMode{a.dir: 0o755, filepath.Join(a.dir, "api.sock"): 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	as("a capture shows what people send, so only root and uid 0 may do this")
}

// TestTsharkCapturesThroughExtcap: tweed is a capture source like any other.
func TestTsharkCapturesThroughExtcap(t *testing.T) {
	needTool(t, "tshark")
	w := newWorld(t, 2)
	w.config(udpConfig)
	a, b := w.up(0), w.up(1)
	awaitPeers(1, a, b)
	t.Setenv("HOME", w.dir)
	t.Setenv("XDG_CONFIG_HOME", filepath.Join(w.dir, ".config"))
	t.Setenv("XDG_DATA_HOME", filepath.Join(w.dir, ".local"))
	dir := filepath.Join(w.dir, ".config", "wireshark", "extcap")
	if status, out, errs := run(t, tweedBin, "extcap", "install", "--dir", dir); status != 0 {
		t.Fatal(out, errs)
	}
	env := []string{"TWEED_STATE_DIR=" + a.dir}
	argv := func(args ...string) []string { return append([]string{"tshark", "-n"}, args...) }
	list := w.launchEnv(a.ns, "tshark", env, argv("-D")...)
	list.wait()
	for _, name := range []string{"tweed0-inner", "tweed0-outer", "tweed0-drops", "tweed0-all"} {
		if !strings.Contains(list.output(), name) {
			t.Errorf("tshark -D does not list %s:\n%s", name, list.output())
		}
	}
	p := w.launchEnv(a.ns, "tshark", env, argv("-l", "-i", "tweed0-inner", "-f", "icmp", "-c", "4")...)
	w.await("packets arrive", func() bool {
		assertPing(t, a.host(), b.host(), 56)
		return strings.Count(p.output(), "Echo (ping)") >= 4
	})
	p.wait()
	// tshark does not wait for what a program that ends at once has to say.
	w.await("a bad filter is explained", func() bool {
		bad := w.launchEnv(a.ns, "tshark", env, argv("-i", "tweed0-inner", "-f", "tcp prot 80", "-c", "1")...)
		bad.wait()
		return strings.Contains(bad.output(), "column 5")
	})
}

func TestFlightRecorder(t *testing.T) {
	w := newWorld(t, 2)
	w.config(udpConfig)
	a, b := w.up(0, "--flight-recorder", "40"), w.up(1)
	awaitPeers(1, a, b)
	fromStranger := newSender(t, w, 1, a, 8285)
	for range 3 {
		fromStranger([]byte("no packet at all"))
	}
	for range 30 {
		assertPing(t, a.host(), b.host(), 1000)
	}
	file := filepath.Join(w.dir, "past.pcapng")
	if status, _, errs := run(t, tweedBin, "capture", "--state-dir", a.dir, "--recorder", "-w", file); status != 0 {
		t.Fatalf("exit status %d: %s", status, errs)
	}
	f := readCapture(t, file)
	if n := sum(f.packets); n != 43 || f.packets[tap.Drop] != 3 || f.packets[tap.TunIn] != 10 {
		t.Errorf("%v: want the last 40 packets and 3 drops", f.packets)
	}
	a.signal(unix.SIGUSR1)
	w.await("the recorder saved", func() bool { return strings.Contains(a.output(), "flight recorder saved") })
	saved, err := filepath.Glob(filepath.Join(a.dir, "recorder-*.pcapng"))
	if err != nil || len(saved) != 1 {
		t.Fatal(saved, err)
	}
	if again := readCapture(t, saved[0]); again.packets != f.packets {
		t.Errorf("on SIGUSR1 %v, over the API %v", again.packets, f.packets)
	}
	if status, _, errs := run(t, tweedBin, "capture", "--state-dir", b.dir, "--recorder"); status != 1 || !strings.Contains(errs, "--flight-recorder N") {
		t.Errorf("without a recorder: exit status %d, %s", status, errs)
	}
}
