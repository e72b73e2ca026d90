package filter

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"tweed/capture/pcapng"
)

// TestLibpcapKeepsTheSamePackets runs tcpdump over files, so that libpcap itself
// judges the packets and not the machine of the other comparisons.
func TestLibpcapKeepsTheSamePackets(t *testing.T) {
	tool := needTool(t, "tcpdump")
	type set struct {
		link    LinkType
		packets [][]byte
		file    string
	}
	var sets []set
	for _, link := range []LinkType{LinkIPv4, LinkEthernet} {
		s := set{link, randomPackets(rand.New(rand.NewPCG(5, uint64(link))), link, 1500), filepath.Join(t.TempDir(), "in.pcap")}
		var b bytes.Buffer
		w, err := pcapng.NewPcapWriter(&b, uint16(link), 0, false)
		if err != nil {
			t.Fatal(err)
		}
		for i, p := range s.packets {
			if err := w.WritePacket(&pcapng.Packet{Time: int64(i) * 1000, Data: p}); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(s.file, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		sets = append(sets, s)
	}
	for i, e := range corpus {
		s := sets[i%len(sets)]
		ours, err := Compile(e.expr, Options{Link: s.link})
		if err != nil || ours.Never() != nil {
			continue // tcpdump refuses these as well; TestCorpus compares that
		}
		out, err := exec.Command(tool, "-n", "-r", s.file, "-w", "-", "--", e.oracle).Output()
		if err != nil {
			t.Fatalf("tcpdump %q: %v", e.oracle, err)
		}
		kept := map[int64]bool{}
		r, err := pcapng.NewReader(bytes.NewReader(out))
		for err == nil {
			var p pcapng.Packet
			if err = r.Next(&p); err == nil {
				kept[p.Time/1000] = true
			}
		}
		for n, p := range s.packets {
			if got := ours.Match(nil, p); got != kept[int64(n)] {
				t.Errorf("link %d, %q: we say %v, libpcap %v, of %x", s.link, e.expr, got, kept[int64(n)], p)
				break
			}
		}
	}
}
