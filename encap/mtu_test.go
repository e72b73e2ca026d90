package encap

import (
	"strings"
	"testing"
)

func TestMTUArithmetic(t *testing.T) {
	for _, c := range []struct {
		framing            Framing
		underlay, max, def int
	}{
		{FramingVXLAN, 1500, 1450, 1450},
		{FramingVXLAN, 9000, 8950, 8950},
		{FramingVXLAN, 1400, 1350, 1350},
		{FramingUDP, 1500, 1472, 1426},
		{FramingUDP, 9000, 8972, 8926},
		{FramingUDP, 1501, 1473, 1427},
		// Below 1500 the headroom is given up first, then the size.
		{FramingUDP, 1499, 1471, 1426},
		{FramingUDP, 1460, 1432, 1426},
		{FramingUDP, 1454, 1426, 1426},
		{FramingUDP, 1453, 1425, 1425},
		{FramingUDP, 1280, 1252, 1252},
		// An outer packet is an IPv4 packet: a loopback underlay of 65536 bytes
		// carries no more than 65535.
		{FramingVXLAN, 65536, 65485, 65485},
		{FramingUDP, 65536, 65507, 65461},
	} {
		if got := c.framing.MaxMTU(c.underlay); got != c.max {
			t.Errorf("%v over %d: largest MTU %d, want %d", c.framing, c.underlay, got, c.max)
		}
		if got := c.framing.DefaultMTU(c.underlay); got != c.def {
			t.Errorf("%v over %d: default MTU %d, want %d", c.framing, c.underlay, got, c.def)
		}
	}
}

func TestDefaultMTUAlwaysFits(t *testing.T) {
	for _, f := range []Framing{FramingUDP, FramingVXLAN} {
		for underlay := MinMTU + f.Overhead(); underlay <= 65536; underlay++ {
			if err := f.CheckMTU(f.DefaultMTU(underlay), underlay); err != nil {
				t.Fatalf("%v over %d: %v", f, underlay, err)
			}
			if f.DefaultMTU(underlay) < f.DefaultMTU(underlay-1) {
				t.Fatalf("%v over %d: a larger underlay gives a smaller MTU", f, underlay)
			}
		}
	}
}

func TestCheckMTUNamesTheLimit(t *testing.T) {
	for _, c := range []struct {
		framing       Framing
		mtu, underlay int
		want          string
	}{
		{FramingUDP, 1472, 1500, ""},
		{FramingUDP, 1473, 1500, "1472"},
		{FramingVXLAN, 1450, 1500, ""},
		{FramingVXLAN, 1451, 1500, "1450"},
		{FramingUDP, 576, 1500, ""},
		{FramingUDP, 575, 1500, "576"},
		{FramingUDP, -1, 1500, "576"},
	} {
		err := c.framing.CheckMTU(c.mtu, c.underlay)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, MTU %d over %d: error %v, want %q", c.framing, c.mtu, c.underlay, err, c.want)
		}
	}
}

// The kernel builds super-packets of at most gso_max_size - 321 bytes and
// whole segments; each must leave as one message of at most 64 segments and
// 65507 bytes, and one segment more must not have fitted.
func TestSuperPacketFitsOneMessage(t *testing.T) {
	for _, f := range []Framing{FramingUDP, FramingVXLAN} {
		for mtu := MinMTU; mtu <= f.MaxMTU(65536); mtu++ {
			size := f.GSOMaxSize(mtu)
			if size > 65536 {
				t.Fatalf("%v, MTU %d: gso_max_size %d", f, mtu, size)
			}
			for _, headers := range []int{40, 52} {
				segments := (size - tcpHeaderReserve - headers) / (mtu - headers)
				if segments > maxSegments || segments*(mtu+f.PrefixLen()) > maxPayload {
					t.Fatalf("%v, MTU %d, %d bytes of headers: %d segments of a super-packet of %d bytes do not fit a message", f, mtu, headers, segments, size)
				}
				if headers != tcpHeaders || size == 65536 {
					continue
				}
				if segments < 1 || segments < maxSegments && (segments+1)*(mtu+f.PrefixLen()) <= maxPayload {
					t.Fatalf("%v, MTU %d: super-packets of %d segments only", f, mtu, segments)
				}
			}
		}
	}
}

func TestFramingNames(t *testing.T) {
	for name, want := range map[string]Framing{"udp": FramingUDP, "vxlan": FramingVXLAN, "UDP": FramingUDP, "VxLAN": FramingVXLAN} {
		var got Framing = 99
		if err := got.UnmarshalText([]byte(name)); err != nil || got != want {
			t.Errorf("%q: %v, error %v", name, got, err)
		}
	}
	for _, f := range []Framing{FramingUDP, FramingVXLAN} {
		text, err := f.MarshalText()
		if got, perr := ParseFraming(string(text)); err != nil || perr != nil || got != f {
			t.Errorf("%v: text %q, errors %v, %v", f, text, err, perr)
		}
	}
	f := FramingVXLAN
	if err := f.UnmarshalText([]byte("geneve")); err == nil || !strings.Contains(err.Error(), "geneve") || f != FramingVXLAN {
		t.Errorf("geneve: error %v, value %v", err, f)
	}
	if s := Framing(7).String(); s != "framing(7)" {
		t.Errorf("unknown framing is called %q", s)
	}
}

func TestFramingFacts(t *testing.T) {
	for _, c := range []struct {
		f                Framing
		prefix, overhead int
		port             uint16
	}{{FramingUDP, 0, 28, 8285}, {FramingVXLAN, 22, 50, 8472}} {
		if c.f.PrefixLen() != c.prefix || c.f.Overhead() != c.overhead || c.f.DefaultPort() != c.port || c.prefix > MaxPrefixLen || c.f >= NumFramings {
			t.Errorf("%v: prefix %d, overhead %d, port %d", c.f, c.f.PrefixLen(), c.f.Overhead(), c.f.DefaultPort())
		}
	}
}
