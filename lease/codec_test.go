package lease

import (
	"bytes"
	"encoding/json"
	"net"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func mac(t *testing.T, s string) net.HardwareAddr {
	t.Helper()
	m, err := net.ParseMAC(s)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestLeaseValueIsFlannelsByteForByte(t *testing.T) {
	ip := netip.MustParseAddr("1.2.3.4")
	vtep := mac(t, "c6:d2:32:6f:8f:44")
	for _, tc := range []struct {
		attrs Attrs
		want  string
	}{
		{Attrs{PublicIP: ip, BackendType: BackendUDP}, `{"PublicIP":"1.2.3.4","PublicIPv6":null}`},
		{Attrs{PublicIP: ip, BackendType: BackendVXLAN, VNI: 1, VtepMAC: vtep},
			`{"PublicIP":"1.2.3.4","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}`},
		{Attrs{PublicIP: ip, BackendType: BackendUDP, NodeID: "u", NodeName: "n"},
			`{"PublicIP":"1.2.3.4","PublicIPv6":null,"Tweed":{"NodeID":"u","Name":"n"}}`},
		{Attrs{PublicIP: ip, BackendType: BackendVXLAN, VNI: 9, VtepMAC: vtep, NodeID: "u", NodeName: "n", PartialChecksums: true},
			`{"PublicIP":"1.2.3.4","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":9,"VtepMAC":"c6:d2:32:6f:8f:44"},` +
				`"Tweed":{"NodeID":"u","Name":"n","Caps":["partial-checksum"]}}`},
	} {
		got, err := encodeAttrs(tc.attrs)
		if err != nil || string(got) != tc.want {
			t.Errorf("got  %s, %v\nwant %s", got, err, tc.want)
			continue
		}
		if back, err := decodeAttrs(got); err != nil || !reflect.DeepEqual(back, tc.attrs) {
			t.Errorf("%s: read back as %+v, %v", got, back, err)
		}
	}
}

// flannelAttrs is the structure flannel reads lease values into
// (pkg/lease/lease.go), written down from its documented behaviour.
type flannelAttrs struct {
	PublicIP      net.IP
	PublicIPv6    *net.IP
	BackendType   string          `json:",omitempty"`
	BackendData   json.RawMessage `json:",omitempty"`
	BackendV6Data json.RawMessage `json:",omitempty"`
}

func TestFlannelReadsOurValueAsItsOwn(t *testing.T) {
	data, err := encodeAttrs(Attrs{PublicIP: netip.MustParseAddr("1.2.3.4"), BackendType: BackendVXLAN, VNI: 1,
		VtepMAC: mac(t, "c6:d2:32:6f:8f:44"), NodeID: "u", NodeName: "n", PartialChecksums: true})
	if err != nil {
		t.Fatal(err)
	}
	var f flannelAttrs
	if err := json.Unmarshal(data, &f); err != nil {
		t.Fatal(err)
	}
	back, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	want, _, _ := bytes.Cut(data, []byte(`,"Tweed"`))
	if string(back) != string(want)+"}" {
		t.Errorf("flannel would write back %s", back)
	}
}

func TestLeaseValuesOfAllFlannelsAreRead(t *testing.T) {
	ip := netip.MustParseAddr("1.2.3.4")
	vtep := mac(t, "c6:d2:32:6f:8f:44")
	for _, tc := range []struct {
		value string
		want  Attrs
	}{
		{`{"PublicIP":"1.2.3.4"}`, Attrs{PublicIP: ip, BackendType: BackendUDP}},
		{`{"PublicIP":"1.2.3.4","PublicIPv6":null,"BackendType":"","BackendData":null}`, Attrs{PublicIP: ip, BackendType: BackendUDP}},
		{`{"publicip":"1.2.3.4","backendtype":"VXLAN","backenddata":{"vtepmac":"C6-D2-32-6F-8F-44"}}`,
			Attrs{PublicIP: ip, BackendType: BackendVXLAN, VNI: 1, VtepMAC: vtep}},
		{`{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{"VNI":0,"VtepMAC":"c6d2.326f.8f44"}}`,
			Attrs{PublicIP: ip, BackendType: BackendVXLAN, VNI: 0, VtepMAC: vtep}},
		{`{"PublicIP":"1.2.3.4","BackendType":"wireguard","BackendData":{"PublicKey":"x"}}`, Attrs{PublicIP: ip, BackendType: "wireguard"}},
		{`{"PublicIP":"1.2.3.4","BackendType":"extension","BackendData":"text"}`, Attrs{PublicIP: ip, BackendType: "extension"}},
		{`{"PublicIP":"1.2.3.4","Other":{"deep":[[1]]},"Tweed":{"NodeID":"a","Caps":["x","partial-checksum"],"Later":1}}`,
			Attrs{PublicIP: ip, BackendType: BackendUDP, NodeID: "a", PartialChecksums: true}},
		{`{"PublicIP":"169.254.3.4"}`, Attrs{PublicIP: netip.MustParseAddr("169.254.3.4"), BackendType: BackendUDP}},
	} {
		if got, err := decodeAttrs([]byte(tc.value)); err != nil || !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s: got %+v, %v", tc.value, got, err)
		}
	}
}

// badValues are lease values no node may use.
var badValues = []string{
	``, `{`, `null`, `7`, `"x"`, `[]`, `{"PublicIP":7}`, `{"PublicIP":"1.2.3.4"} x`,
	`{}`, `{"PublicIP":""}`, `{"PublicIP":"1.2.3"}`, `{"PublicIP":"::1"}`, `{"PublicIP":"::ffff:1.2.3.4"}`,
	`{"PublicIP":"0.0.0.0"}`, `{"PublicIP":"0.1.2.3"}`, `{"PublicIP":"127.0.0.1"}`, `{"PublicIP":"224.0.0.1"}`,
	`{"PublicIP":"239.1.1.1"}`, `{"PublicIP":"255.255.255.255"}`,
	`{"PublicIP":"1.2.3.4","BackendType":"vxlan"}`,
	`{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":"x"}`,
	`{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{"VNI":16777216,"VtepMAC":"c6:d2:32:6f:8f:44"}}`,
	`{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{"VNI":-1,"VtepMAC":"c6:d2:32:6f:8f:44"}}`,
	`{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":""}}`,
	`{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"00:00:00:00:00:00"}}`,
	`{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}}`,
	`{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}}`,
	`{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:5e:10:00:00:00:01"}}`,
	`{"PublicIP":"1.2.3.4","BackendType":"a\u001b[2J"}`,
	`{"PublicIP":"1.2.3.4","BackendType":"` + strings.Repeat("x", 33) + `"}`,
	`{"PublicIP":"1.2.3.4","Tweed":{"NodeID":"` + strings.Repeat("x", 65) + `"}}`,
	`{"PublicIP":"1.2.3.4","Tweed":{"Name":"a\nb"}}`,
	`{"PublicIP":"1.2.3.4","Tweed":"x"}`,
	`{"PublicIP":"1.2.3.4","X":"` + strings.Repeat("x", maxValueSize) + `"}`,
	`{"PublicIP":"1.2.3.4","X":` + strings.Repeat("[", 5000) + strings.Repeat("]", 5000) + `}`,
	`{"PublicIP":"1.2.3.4","X":` + strings.Repeat(`{"a":`, 8) + `1` + strings.Repeat("}", 8) + `}`,
}

func TestBadLeaseValuesAreRefused(t *testing.T) {
	for _, v := range badValues {
		if got, err := decodeAttrs([]byte(v)); err == nil {
			t.Errorf("%.100s: read as %+v", v, got)
		} else if len(err.Error()) > 300 || !printable(err.Error()) {
			t.Errorf("%.100s: unfit for a log line: %.400q", v, err)
		}
	}
}

func TestSubnetKeysHaveOneForm(t *testing.T) {
	if got := subnetKey(netip.MustParsePrefix("10.5.52.0/24")); got != "10.5.52.0-24" {
		t.Errorf("got %s", got)
	}
	for _, name := range badKeys {
		if p, err := parseSubnetKey(name); err == nil {
			t.Errorf("%.100q: read as %s", name, p)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		p := netip.PrefixFrom(bitsAddr(rapid.Uint32().Draw(t, "addr")), rapid.IntRange(minPeerBits, maxPeerBits).Draw(t, "bits")).Masked()
		if got, err := parseSubnetKey(subnetKey(p)); err != nil || got != p {
			t.Fatalf("%s: got %s, %v", p, got, err)
		}
	})
}

var badKeys = []string{
	"", "junk", "10.12.13.0", "10.12.13.0-", "-24", "10.12.13.0/24", "10.12.13.0-24x", "10.12.13.0-24 ", " 10.12.13.0-24",
	"10.12.13.300-24", "10.12.13-24", "10.12.13.0.0-24", "010.12.13.0-24", "10.12.13.0-024", "10.12.13.0-+24", "10.12.13.0--24",
	"10.12.13.0-0", "10.12.13.0-31", "10.12.13.0-32", "10.12.13.0-33", "10.12.13.1-24", "10.12.13.0-16", "x/10.12.13.0-24",
	"10.12.13.0-24/x", "10.12.13.0-24&fd00:12:13::-56", "10.12.13.0-24&2001-56", "fd00::-64", "::ffff:10.12.13.0-24",
	"10.12.13.0-24\x00", strings.Repeat("1", 3000),
}

func TestKeysJoinAsFlannelJoinsThem(t *testing.T) {
	for _, tc := range []struct{ prefix, config, subnets string }{
		{"/coreos.com/network", "/coreos.com/network/config", "/coreos.com/network/subnets/"},
		{"/coreos.com/network/", "/coreos.com/network/config", "/coreos.com/network/subnets/"},
		{"coreos.com/network", "coreos.com/network/config", "coreos.com/network/subnets/"},
		{"/", "/config", "/subnets/"},
	} {
		if c, s := configKey(tc.prefix), subnetsPrefix(tc.prefix); c != tc.config || s != tc.subnets {
			t.Errorf("%s: got %s and %s", tc.prefix, c, s)
		}
	}
}

func FuzzParseSubnetKey(f *testing.F) {
	for _, k := range append(badKeys, "10.5.52.0-24", "0.0.0.0-1") {
		f.Add(k)
	}
	f.Fuzz(func(t *testing.T, name string) {
		p, err := parseSubnetKey(name)
		if err == nil && (subnetKey(p) != name || p != p.Masked() || !p.Addr().Is4()) {
			t.Fatalf("%q: read as %s", name, p)
		}
	})
}

func FuzzDecodeAttrs(f *testing.F) {
	for _, v := range badValues {
		f.Add([]byte(v))
	}
	f.Add([]byte(`{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"Tweed":{"NodeID":"a","Name":"b"}}`))
	f.Fuzz(func(t *testing.T, value []byte) {
		a, err := decodeAttrs(value)
		if err != nil {
			return
		}
		if err := checkAttrs(a); err != nil {
			t.Fatalf("%s: accepted %+v: %v", value, a, err)
		}
		data, err := encodeAttrs(a)
		if err != nil {
			t.Fatal(err)
		}
		if a.NodeID == "" { // a capability or a name without an id is not written
			a.NodeName, a.PartialChecksums = "", false
		}
		if back, err := decodeAttrs(data); err != nil || !reflect.DeepEqual(back, a) {
			t.Fatalf("%s: read back as %+v, %v, want %+v", data, back, err, a)
		}
	})
}
