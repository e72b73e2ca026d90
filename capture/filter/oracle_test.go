package filter

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/net/bpf"
)

// needTool returns the path of a program the test compares with. Without it
// the test cannot run, which is a failure where tests are to be complete.
func needTool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed, and CI=true wants every comparison made", name)
		}
		t.Skipf("%s is not installed; nothing to compare with", name)
	}
	return path
}

// errRejectsAll is tcpdump's refusal of an expression nothing can match.
var errRejectsAll = errors.New("expression rejects all packets")

// tcpdumpCompile has tcpdump compile an expression.
func tcpdumpCompile(tool string, link LinkType, optimise bool, expr string) (*bpf.VM, error) {
	dlt := map[LinkType]string{LinkEthernet: "EN10MB", LinkRaw: "RAW", LinkIPv4: "IPV4"}[link]
	args := []string{"-ddd", "-y", dlt}
	if !optimise {
		args = append(args, "-O")
	}
	cmd := exec.Command(tool, append(args, "--", expr)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if strings.Contains(stderr.String(), errRejectsAll.Error()) {
			return nil, errRejectsAll
		}
		return nil, fmt.Errorf("tcpdump: %s", strings.TrimSpace(stderr.String()))
	}
	var raw []bpf.RawInstruction
	lines := bufio.NewScanner(&stdout)
	lines.Scan() // the number of instructions
	for lines.Scan() {
		var in bpf.RawInstruction
		if _, err := fmt.Sscan(lines.Text(), &in.Op, &in.Jt, &in.Jf, &in.K); err != nil {
			return nil, fmt.Errorf("tcpdump -ddd printed %q: %w", lines.Text(), err)
		}
		if in.Op == 0x84 { // negate, which bpf.VM lacks
			in.Op, in.K = 0x24, 0xffffffff
		}
		raw = append(raw, in)
	}
	return newVM(raw)
}

func newVM(raw []bpf.RawInstruction) (*bpf.VM, error) {
	program, ok := bpf.Disassemble(raw)
	if !ok {
		return nil, errors.New("not all instructions are known")
	}
	return bpf.NewVM(program)
}

func runVM(t *testing.T, vm *bpf.VM, packet []byte) bool {
	if vm == nil {
		return false
	}
	n, err := vm.Run(packet)
	if err != nil {
		t.Fatalf("bpf.VM: %v", err)
	}
	return n != 0
}

// comparison counts the packets expressions were compared on.
type comparison struct {
	expressions, verdicts, disagreements int
	// split counts the verdicts on which tcpdump and tcpdump -O differ: packets
	// cut off between two loads that libpcap's optimiser swaps or drops.
	split int
	// eitherWay accepts either verdict where those two differ.
	eitherWay bool
}

// compare judges every packet with our program, in both its forms, and with
// tcpdump's.
func (c *comparison) compare(t *testing.T, tool string, link LinkType, e corpusEntry, packets [][]byte) {
	ours, err := Compile(e.expr, Options{Link: link})
	want, wantErr := tcpdumpCompile(tool, link, true, e.oracle)
	if errors.Is(wantErr, errRejectsAll) {
		wantErr = nil // and want a machine that rejects
	}
	if (err != nil) != (wantErr != nil) {
		t.Errorf("link %d, %q: we say %v, tcpdump says %v", link, e.expr, err, wantErr)
		c.disagreements++
		return
	}
	if err != nil {
		return
	}
	written, err := tcpdumpCompile(tool, link, false, e.oracle)
	if err != nil {
		t.Fatalf("link %d, %q: tcpdump -O: %v", link, e.oracle, err)
	}
	raw, ok := ours.Classic()
	if !ok {
		t.Fatalf("link %d, %q has no classic form", link, e.expr)
	}
	classic, err := newVM(raw)
	if err != nil {
		t.Fatalf("link %d, %q: invalid classic program: %v", link, e.expr, err)
	}
	c.expressions++
	for _, p := range packets {
		c.verdicts++
		got, asClassic, expected := ours.Match(nil, p), runVM(t, classic, p), runVM(t, want, p)
		unoptimised := runVM(t, written, p)
		if expected != unoptimised {
			c.split++
		}
		if got != expected && !(c.eitherWay && got == unoptimised) || asClassic != got {
			c.disagreements++
			t.Errorf("link %d, %q: we say %v (as classic BPF %v), tcpdump %v, tcpdump -O %v, on %d bytes\n%x",
				link, e.expr, got, asClassic, expected, unoptimised, len(p), p)
			return
		}
		if got && ours.Never() != nil {
			t.Errorf("link %d, %q matches a packet but claims: %v", link, e.expr, ours.Never())
		}
	}
}

var allLinks = []LinkType{LinkIPv4, LinkRaw, LinkEthernet}

func TestCorpusAgreesWithTcpdump(t *testing.T) {
	tool := needTool(t, "tcpdump")
	if len(corpus) < 200 {
		t.Fatalf("the corpus has %d expressions, want at least 200", len(corpus))
	}
	for _, link := range allLinks {
		t.Run(fmt.Sprint("link ", link), func(t *testing.T) {
			t.Parallel()
			packets := randomPackets(rand.New(rand.NewPCG(1, uint64(link))), link, 4000)
			var c comparison
			for _, e := range corpus {
				c.compare(t, tool, link, e, packets)
			}
			t.Logf("%d expressions, %d verdicts, %d disagreements; %d where tcpdump and tcpdump -O differ",
				c.expressions, c.verdicts, c.disagreements, c.split)
		})
	}
}
