package lease

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"strconv"
	"strings"
)

// Bounds of what is accepted from etcd. Whoever can write one key must not be
// able to grow or stop any node that reads it.
const (
	maxValueSize   = 4 << 10 // bytes of a lease value
	maxJSONDepth   = 8       // nested objects and arrays
	maxNodeIDLen   = 64      // bytes
	maxNodeNameLen = 253     // bytes, the longest host name (RFC 1035)
	maxTypeLen     = 32      // bytes of BackendType
	minPeerBits    = 1       // shortest and longest prefix of a subnet key;
	maxPeerBits    = 30      // a longer one has no room for a gateway and a host
)

// capPartialChecksum is the capability a lease announces when its node completes
// inner checksums that arrive partial.
const capPartialChecksum = "partial-checksum"

// Attrs is what a lease says about the node that holds it.
type Attrs struct {
	// PublicIP is the underlay address the node is reached at.
	PublicIP netip.Addr
	// BackendType is the framing of the node, lower case: BackendUDP where the
	// lease names none, and the lease's own word for types that tweed does not
	// run ("wireguard", "host-gw", ...).
	BackendType string
	// VNI and VtepMAC are set if BackendType is BackendVXLAN: the VXLAN network
	// identifier, 24 bits, and the inner Ethernet address, 6 bytes, unicast.
	VNI     uint32
	VtepMAC net.HardwareAddr
	// NodeID and NodeName tell which node wrote the lease. Both are empty in
	// leases that flannel wrote, which ignores the field they travel in.
	NodeID, NodeName string
	// PartialChecksums says that the node completes inner checksums itself.
	PartialChecksums bool
}

// wireAttrs is the lease value in the field order of flannel's LeaseAttrs
// (pkg/lease/lease.go). PublicIPv6 is always written, as null. Tweed comes last;
// flannel ignores unknown fields.
type wireAttrs struct {
	PublicIP    string
	PublicIPv6  *string
	BackendType string          `json:",omitempty"`
	BackendData json.RawMessage `json:",omitempty"`
	Tweed       *wireTweed      `json:",omitempty"`
}

type wireTweed struct {
	NodeID string
	Name   string
	Caps   []string `json:",omitempty"`
}

type wireVXLAN struct {
	VNI     uint32
	VtepMAC string
}

// encodeAttrs returns the lease value.
func encodeAttrs(a Attrs) ([]byte, error) {
	if err := checkAttrs(a); err != nil {
		return nil, fmt.Errorf("lease: own attributes: %w", err)
	}
	w := wireAttrs{PublicIP: a.PublicIP.String()}
	if a.BackendType != BackendUDP {
		w.BackendType = a.BackendType
	}
	if a.BackendType == BackendVXLAN {
		data, err := json.Marshal(wireVXLAN{VNI: a.VNI, VtepMAC: a.VtepMAC.String()})
		if err != nil {
			return nil, fmt.Errorf("lease: own attributes: %w", err)
		}
		w.BackendData = data
	}
	if a.NodeID != "" {
		w.Tweed = &wireTweed{NodeID: a.NodeID, Name: a.NodeName}
		if a.PartialChecksums {
			w.Tweed.Caps = []string{capPartialChecksum}
		}
	}
	return json.Marshal(w)
}

// decodeAttrs reads a lease value. It accepts what flannel accepts within the
// bounds above, and nothing a data plane could not use: the result always has a
// usable PublicIP, and a VTEP address if it is vxlan.
func decodeAttrs(value []byte) (Attrs, error) {
	if len(value) > maxValueSize {
		return Attrs{}, fmt.Errorf("value is %d bytes long, more than %d", len(value), maxValueSize)
	}
	if err := checkJSON(value); err != nil {
		return Attrs{}, err
	}
	if !isObject(value) {
		return Attrs{}, errors.New("value is not a JSON object")
	}
	var w struct {
		PublicIP    string
		BackendType string
		BackendData json.RawMessage
		Tweed       struct {
			NodeID, Name string
			Caps         []string
		}
	}
	if err := json.Unmarshal(value, &w); err != nil {
		return Attrs{}, err
	}
	a := Attrs{
		BackendType: strings.ToLower(w.BackendType),
		NodeID:      w.Tweed.NodeID,
		NodeName:    w.Tweed.Name,
	}
	if a.BackendType == "" {
		a.BackendType = BackendUDP
	}
	for _, c := range w.Tweed.Caps {
		a.PartialChecksums = a.PartialChecksums || c == capPartialChecksum
	}
	var err error
	if a.PublicIP, err = netip.ParseAddr(w.PublicIP); err != nil {
		return Attrs{}, fmt.Errorf("PublicIP %q is not an IPv4 address", brief([]byte(w.PublicIP)))
	}
	if a.BackendType == BackendVXLAN {
		if err := decodeVXLAN(w.BackendData, &a); err != nil {
			return Attrs{}, err
		}
	}
	if err := checkAttrs(a); err != nil {
		return Attrs{}, err
	}
	return a, nil
}

func decodeVXLAN(data json.RawMessage, a *Attrs) error {
	// Old flannel wrote only VtepMAC; its VNI was the default.
	v := wireVXLAN{VNI: defaultVNI}
	if absent(data) {
		return errors.New("BackendType is vxlan but BackendData is missing")
	}
	if err := json.Unmarshal(data, &v); err != nil {
		return fmt.Errorf("BackendData: %w", err)
	}
	mac, err := net.ParseMAC(v.VtepMAC)
	if err != nil {
		return fmt.Errorf("VtepMAC %q is not an Ethernet address", brief([]byte(v.VtepMAC)))
	}
	a.VNI, a.VtepMAC = v.VNI, mac
	return nil
}

// checkAttrs holds what we write and what we read to the same rules.
func checkAttrs(a Attrs) error {
	if err := checkPublicIP(a.PublicIP); err != nil {
		return err
	}
	switch {
	case a.BackendType == "" || len(a.BackendType) > maxTypeLen || !printable(a.BackendType):
		return fmt.Errorf("BackendType %q is not a backend name", brief([]byte(a.BackendType)))
	case len(a.NodeID) > maxNodeIDLen || !printable(a.NodeID):
		return fmt.Errorf("node id %q is not printable text of at most %d bytes", brief([]byte(a.NodeID)), maxNodeIDLen)
	case len(a.NodeName) > maxNodeNameLen || !printable(a.NodeName):
		return fmt.Errorf("node name %q is not printable text of at most %d bytes", brief([]byte(a.NodeName)), maxNodeNameLen)
	}
	if a.BackendType != BackendVXLAN {
		return nil
	}
	switch {
	case a.VNI > maxVNI:
		return fmt.Errorf("VNI %d is above %d", a.VNI, maxVNI)
	case len(a.VtepMAC) != 6:
		return fmt.Errorf("VtepMAC %q is not an Ethernet address of 6 bytes", a.VtepMAC)
	case a.VtepMAC[0]&1 != 0 || bytes.Equal(a.VtepMAC, make([]byte, 6)):
		return fmt.Errorf("VtepMAC %s is not a unicast address", a.VtepMAC)
	}
	return nil
}

// checkPublicIP refuses addresses no node can be reached at. Nodes inside one
// program have loopback addresses, 127.0.0.1 excepted, which a broken
// configuration has; whoever uses a lease refuses those of other hosts.
func checkPublicIP(a netip.Addr) error {
	if !a.Is4() {
		return fmt.Errorf("PublicIP %s is not an IPv4 address", a)
	}
	switch b := a.As4(); {
	case b[0] == 0, b == [4]byte{127, 0, 0, 1}, a.IsMulticast(), b == [4]byte{255, 255, 255, 255}:
		return fmt.Errorf("PublicIP %s is not the address of another host", a)
	}
	return nil
}

// printable reports whether s is ASCII without control characters, so that it
// cannot disturb a terminal or a log.
func printable(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// subnetKey is the name of a subnet's key below <prefix>/subnets/.
func subnetKey(subnet netip.Prefix) string {
	return subnet.Addr().String() + "-" + strconv.Itoa(subnet.Bits())
}

// parseSubnetKey is the inverse of subnetKey. Only the text subnetKey would
// print is accepted, so that one subnet has one key.
func parseSubnetKey(name string) (netip.Prefix, error) {
	if strings.Contains(name, "&") {
		return netip.Prefix{}, errors.New("a dual-stack lease; the overlay carries IPv4 only")
	}
	addr, length, ok := strings.Cut(name, "-")
	if !ok || len(name) > len("255.255.255.255-32") {
		return netip.Prefix{}, errors.New("not of the form <a.b.c.d>-<len>")
	}
	a, err := netip.ParseAddr(addr)
	if err != nil || !a.Is4() {
		return netip.Prefix{}, errors.New("does not start with an IPv4 address")
	}
	bits, err := strconv.Atoi(length)
	if err != nil || bits < minPeerBits || bits > maxPeerBits {
		return netip.Prefix{}, fmt.Errorf("the length is not a number from %d to %d", minPeerBits, maxPeerBits)
	}
	p := netip.PrefixFrom(a, bits)
	if p != p.Masked() || subnetKey(p) != name {
		return netip.Prefix{}, fmt.Errorf("not in the canonical form %s", subnetKey(p.Masked()))
	}
	return p, nil
}

// configKey and subnetsPrefix join as flannel does: a trailing slash of the
// prefix is dropped, a missing leading one is kept missing. subnetsPrefix ends in
// a slash, so that a key like <prefix>/subnets-old is not among the leases.
func configKey(prefix string) string     { return path.Join(prefix, "config") }
func subnetsPrefix(prefix string) string { return path.Join(prefix, "subnets") + "/" }

// checkJSON reports why data is not JSON, or that it nests too deep. The depth is
// looked at first, so that hostile nesting costs the decoder nothing.
func checkJSON(data []byte) error {
	depth, inString := 0, false
	for i := 0; i < len(data); i++ {
		switch c := data[i]; {
		case inString && c == '\\':
			i++
		case c == '"':
			inString = !inString
		case inString:
		case c == '{' || c == '[':
			if depth++; depth > maxJSONDepth {
				return fmt.Errorf("JSON nests deeper than %d", maxJSONDepth)
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	var raw json.RawMessage
	err := json.Unmarshal(data, &raw)
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		return fmt.Errorf("not valid JSON at byte %d: %w", syntax.Offset, err)
	}
	return err
}
