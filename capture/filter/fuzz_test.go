package filter

import (
	"errors"
	"testing"
)

// FuzzCompile checks that no expression makes the compiler panic or produce a
// program that is too large, invalid, or not the same as its classic form; and
// that every error points into the expression.
func FuzzCompile(f *testing.F) {
	for _, e := range corpus {
		f.Add(e.expr, tcpPacket)
	}
	for _, e := range []string{"peer n1 and inner tcp", "reason no-route or too-big", "outer (host 1.2.3.4 or dir in)", "vni 7 or point drop"} {
		f.Add(e, udpDatagram)
	}
	f.Fuzz(func(t *testing.T, expr string, packet []byte) {
		for _, link := range allLinks {
			p, err := Compile(expr, testOptions(link))
			if err != nil {
				var e *Error
				if !errors.As(err, &e) || e.Start < 0 || e.Start > e.End || e.End > len(expr) || e.Msg == "" {
					t.Fatalf("%q: bad error %#v", expr, err)
				}
				e.Caret()
				continue
			}
			if len(p.steps) > MaxInstructions || len(p.classic) > MaxInstructions {
				t.Fatalf("%q: %d instructions, %d as classic BPF", expr, len(p.steps), len(p.classic))
			}
			m := &Meta{Inner: packet, Outer: udpDatagram, Layer: LayerOuter, Tagged: true}
			got := p.Match(m, packet)
			if got && p.Never() != nil {
				t.Fatalf("%q matches but claims: %v", expr, p.Never())
			}
			raw, ok := p.Classic()
			if !ok {
				continue
			}
			vm, err := newVM(raw)
			if err != nil {
				t.Fatalf("%q: invalid classic program: %v", expr, err)
			}
			if want := runVM(t, vm, packet); got != want {
				t.Fatalf("%q on %x: Match says %v, bpf.VM %v", expr, packet, got, want)
			}
		}
	})
}
