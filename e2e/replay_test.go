package e2e

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tweed/engine/tap"
	"tweed/node"
)

// replayed is what tweed replay -o json says.
type replayed struct {
	Replayed uint64
	Skipped  map[string]uint64
	Engine   node.ReplayResult
}

func (e *daemon) replay(args ...string) replayed {
	e.w.t.Helper()
	status, out, errs := run(e.w.t, tweedBin, append([]string{"replay", "--state-dir", e.dir, "-o", "json"}, args...)...)
	var r replayed
	if err := json.Unmarshal([]byte(out), &r); status != 0 || err != nil {
		e.w.t.Fatalf("replay %v: exit status %d, %v, %s%s", args, status, err, out, errs)
	}
	return r
}

// sendTo sends a UDP datagram from the daemon's host.
func (e *daemon) sendTo(t *testing.T, addr string) {
	t.Helper()
	err := e.ns.Do(func() error {
		c, err := net.Dial("udp4", addr)
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("to whom it may concern"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestReplayedPacketsTakeTheirWayAgain: what one capture recorded is sent,
// received, dropped, counted and captured once more, at both nodes.
func TestReplayedPacketsTakeTheirWayAgain(t *testing.T) {
	for framing, config := range map[string]string{"udp": udpConfig, "vxlan": vxlanConfig} {
		t.Run(framing, func(t *testing.T) {
			w := newWorld(t, 2)
			w.config(config)
			a, b := w.up(0), w.up(1)
			awaitPeers(1, a, b)
			file, again, theirs := filepath.Join(w.dir, "x.pcapng"), filepath.Join(w.dir, "again.pcapng"), filepath.Join(w.dir, "theirs.pcapng")
			ca, cb := a.capture("--point", "all", "-w", file), b.capture("--point", "all", "-w", theirs)
			for _, size := range []int{0, 56, 1300, 4000} {
				assertPing(t, a.host(), b.host(), size)
			}
			a.sendTo(t, "10.244.255.9:9") // nobody's
			w.await("the drop counted", func() bool { return a.status().Ledger.Tx.Drops["no-route"] > 0 })
			ca.end(unix.SIGINT)
			cb.end(unix.SIGINT)
			recorded := readCapture(t, file)

			// At A's TUN: B gets the requests again, and answers them.
			before, beforeB := assertBalance(t, a), assertBalance(t, b)
			c := a.capture("--point", "all", "-w", again)
			r := a.replay(file, "--speed", "0")
			n := recorded.packets[tap.TunIn]
			drops := recorded.packets[tap.Drop]
			if r.Replayed != n || r.Engine.Packets != n || r.Engine.Delivered != n-drops || r.Engine.Dropped["no-route"] != drops || r.Engine.Answered != drops {
				t.Errorf("%d recorded, %d drops; replayed %+v", n, drops, r)
			}
			if got := r.Skipped["of other tap points"]; got != sum(recorded.packets)-n {
				t.Errorf("skipped %v", r.Skipped)
			}
			w.await("B received them", func() bool { return b.status().Ledger.Rx.Delivered-beforeB.Rx.Delivered >= n-drops })
			w.await("the answers came back", func() bool { return a.status().Ledger.Rx.Delivered-before.Rx.Delivered >= n-drops })
			c.end(unix.SIGINT)
			want := taken(before, assertBalance(t, a))
			if f := readCapture(t, again); f.packets != want || want[tap.TunIn] < n {
				t.Errorf("in the second file %v, ledger %v", f.packets, want)
			}
			opensEverywhere(t, again)

			// At B's socket: its host gets them again.
			beforeB = assertBalance(t, b)
			r = b.replay(theirs, "--point", "wire-in", "--rate", "1000", "--loop=2")
			if n := 2 * readCapture(t, theirs).packets[tap.WireIn]; n == 0 || r.Engine.Packets != n || r.Engine.Delivered != n || r.Engine.Foreign != 0 {
				t.Errorf("%d datagrams recorded twice, replayed %+v", n, r)
			}
			if got := assertBalance(t, b).Rx.Delivered - beforeB.Rx.Delivered; got < r.Engine.Delivered {
				t.Errorf("B's ledger grew by %d", got)
			}
		})
	}
}

// TestReplayedForgeriesAreDroppedAgain, each for the same reason.
func TestReplayedForgeriesAreDroppedAgain(t *testing.T) {
	w := newWorld(t, 4)
	w.config(vxlanConfig)
	victim, peer, third := w.up(0), w.up(1), w.up(2)
	awaitPeers(2, victim, peer, third)
	ours, theirs := mustMAC(t, victim.status().Node.VtepMAC), mustMAC(t, peer.status().Node.VtepMAC)
	good := innerPacket(t, peer.addr(), victim.addr(), nil)
	forged := vxlanForgeries(t, innerForgeries(t, victim.addr(), peer.addr(), third.addr()), good, ours, theirs)
	file := filepath.Join(w.dir, "forged.pcapng")
	before := assertBalance(t, victim)
	c := victim.capture("--point", "wire-in", "-w", file)
	fromPeer, fromStranger := newSender(t, w, 1, victim, 8472), newSender(t, w, 3, victim, 8472)
	want := map[string]uint64{}
	for _, f := range forged {
		if f.stranger {
			fromStranger(f.payload)
		} else {
			fromPeer(f.payload)
		}
		want[f.reason.String()]++
	}
	w.await("every datagram entered", func() bool { return assertBalance(t, victim).Rx.Packets >= before.Rx.Packets+uint64(len(forged)) })
	c.end(unix.SIGINT)
	r := victim.replay(file, "--point", "wire-in")
	if asJSON(t, r.Engine.Dropped) != asJSON(t, want) || r.Engine.Delivered != 0 || r.Replayed != uint64(len(forged)) {
		t.Errorf("%d forgeries, dropped\n%s\nreplayed %d, dropped\n%s", len(forged), asJSON(t, want), r.Replayed, asJSON(t, r.Engine.Dropped))
	}
}

func TestReplayRefusals(t *testing.T) {
	w := newWorld(t, 2)
	w.config(udpConfig)
	a, b := w.up(0), w.up(1)
	awaitPeers(1, a, b)
	whole, cut := filepath.Join(w.dir, "whole.pcapng"), filepath.Join(w.dir, "cut.pcap")
	c, d := a.capture("-w", whole), a.capture("-s", "40", "-w", cut)
	assertPing(t, a.host(), b.host(), 56)
	c.end(unix.SIGINT)
	d.end(unix.SIGINT)
	content, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	text, broken := filepath.Join(w.dir, "text"), filepath.Join(w.dir, "broken.pcapng")
	for path, b := range map[string][]byte{text: []byte("no packets"), broken: content[:len(content)-3]} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		status int
		words  string
		args   []string
	}{
		{1, "text: byte 0: not a capture file: it starts with 6e 6f 20 70, pcapng with 0a 0d 0d 0a", []string{text}},
		{1, "broken.pcapng: byte ", []string{broken, "--speed", "0"}},
		{1, "no such file", []string{"/nowhere/x"}},
		{1, "nothing to replay at tun-in", []string{cut}},
		{1, "--all takes the packets of other tap points", []string{whole, "--point", "wire-in"}},
		{1, "no such socket", []string{whole, "--state-dir", w.dir + "/nobody"}},
		{2, "expected tun-in or wire-in", []string{whole, "--point", "drop"}},
		{2, "one of them", []string{whole, "--rate", "1", "--speed", "2"}},
		{2, "packets per second above 0", []string{whole, "--rate", "-1"}},
		{2, "a capture FILE", nil},
	} {
		args := append([]string{"replay", "--state-dir", a.dir}, c.args...)
		status, _, errs := run(t, tweedBin, args...)
		if status != c.status || !strings.Contains(errs, c.words) {
			t.Errorf("%v: exit status %d, expected %d and %q: %s", c.args, status, c.status, c.words, errs)
		}
	}

	// While one runs, a second is refused; the first ends with a summary.
	p := w.launch(a.ns, "replay", tweedBin, "replay", "--state-dir", a.dir, whole, "--loop", "--rate", "200")
	w.await("the replay runs", func() bool { return strings.Contains(p.output(), "replaying ") })
	if status, _, errs := run(t, tweedBin, "replay", "--state-dir", a.dir, whole); status != 1 || !strings.Contains(errs, "another replay is running") {
		t.Errorf("a second replay: exit status %d, %s", status, errs)
	}
	sent := a.status().Ledger.Tx.Packets
	w.await("the replay goes on", func() bool { return a.status().Ledger.Tx.Packets > sent+20 })
	if status := p.end(unix.SIGINT); status != 0 || !strings.Contains(p.output(), " replayed, skipped ") || !strings.Contains(p.output(), "received by the engine: ") {
		t.Errorf("after SIGINT: exit status %d, %s", status, p.output())
	}
	// It does not outlive its engine, and ends although the engine waits for it.
	p = w.launch(a.ns, "replay", tweedBin, "replay", "--state-dir", a.dir, whole, "--loop", "--rate", "0.01")
	w.await("the replay runs", func() bool { return strings.Contains(p.output(), "replaying ") })
	a.down()
	if status := p.wait(); status != 1 || !strings.Contains(p.output(), "the engine has ") {
		t.Errorf("without an engine: exit status %d, %s", status, p.output())
	}
}
