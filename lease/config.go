package lease

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Backend types tweed can run. They are the words of the Backend.Type field of
// the network configuration and of BackendType in a lease.
const (
	BackendUDP   = "udp"
	BackendVXLAN = "vxlan"
)

const (
	// maxConfigSize bounds the value of the config key, in bytes.
	maxConfigSize = 64 << 10
	// maxVNI is the largest VXLAN network identifier: 24 bits, RFC 7348 section 5.
	maxVNI = 1<<24 - 1
	// defaultVNI is the VNI of a network configuration that names none.
	defaultVNI = 1
)

// NetworkConfig is the network configuration of an overlay: the value of
// <prefix>/config with every default filled in. Two configurations are the same
// if they compare equal with ==.
type NetworkConfig struct {
	// Network is the address range of the whole overlay, masked.
	Network netip.Prefix
	// SubnetLen is the prefix length of every node's subnet, in bits:
	// from Network.Bits()+2 to 30.
	SubnetLen int
	// SubnetMin and SubnetMax are the first and the last subnet a node may
	// claim, both inclusive, both on a SubnetLen boundary inside Network.
	SubnetMin, SubnetMax netip.Addr
	// EnableIPv4 is always true and EnableIPv6 always false in a valid
	// configuration: the overlay carries IPv4 only.
	EnableIPv4, EnableIPv6 bool
	// EnableNFTables asks for nftables instead of iptables rules.
	EnableNFTables bool
	// Backend says how packets travel between nodes.
	Backend Backend
}

// Backend is the Backend object of a network configuration.
type Backend struct {
	// Type is BackendUDP or BackendVXLAN, lower case.
	Type string
	// Port is the UDP port of the underlay; 0 means the default of the type.
	Port uint16
	// VNI is the VXLAN network identifier, 24 bits; the default is 1.
	VNI uint32
	// MTU is the configured MTU in bytes, 0 if unset. For vxlan flannel means the
	// MTU of the underlay by it.
	MTU int
	// GBP, Learning and DirectRouting are flannel's vxlan switches, reported as
	// they are configured; see [NetworkConfig.Notes].
	GBP, Learning, DirectRouting bool
}

// NewNetworkConfig returns the default configuration of a network: IPv4, udp
// backend, nothing else set. [NetworkConfig.Complete] derives the rest.
func NewNetworkConfig(network netip.Prefix) NetworkConfig {
	return NetworkConfig{
		Network:    network,
		EnableIPv4: true,
		Backend:    Backend{Type: BackendUDP, VNI: defaultVNI},
	}
}

// ParseNetworkConfig reads the value of the config key, fills in what is derived
// and validates it. Field names are matched without regard to case and unknown
// fields are ignored, as flannel does. The error names the field, its value and
// what to write instead.
func ParseNetworkConfig(data []byte) (NetworkConfig, error) {
	raw, err := decodeConfig(data)
	if err != nil {
		return NetworkConfig{}, fmt.Errorf("lease: network config: %w", err)
	}
	cfg, err := raw.config()
	if err != nil {
		return NetworkConfig{}, fmt.Errorf("lease: network config: %w", err)
	}
	return cfg.Complete()
}

// Complete returns the configuration with Network masked and SubnetLen,
// SubnetMin, SubnetMax and Backend.Type derived where they are zero. It is an
// error if the result cannot be run; the rules are flannel's
// (pkg/subnet/config.go), plus SubnetMin not above SubnetMax.
func (c NetworkConfig) Complete() (NetworkConfig, error) {
	if err := c.complete(); err != nil {
		return NetworkConfig{}, fmt.Errorf("lease: network config: %w", err)
	}
	return c, nil
}

func (c *NetworkConfig) complete() error {
	switch {
	case c.EnableIPv6:
		return errors.New("EnableIPv6 is true: the overlay carries IPv4 only; remove it or write \"EnableIPv6\": false")
	case !c.EnableIPv4:
		return errors.New("EnableIPv4 is false: the overlay carries IPv4 only; remove it or write \"EnableIPv4\": true")
	case !c.Network.IsValid():
		//lint:ignore ST1005 Network is the field's name
		return errors.New("Network is missing: write for example \"Network\": \"10.244.0.0/16\"")
	case !c.Network.Addr().Is4():
		//lint:ignore ST1005 Network is the field's name
		return fmt.Errorf("Network %s is not IPv4: write for example \"Network\": \"10.244.0.0/16\"", c.Network)
	}
	c.Network = c.Network.Masked()
	if c.Backend.Type == "" {
		c.Backend.Type = BackendUDP
	}
	if err := c.Backend.validate(); err != nil {
		return err
	}
	if err := c.completeSubnetLen(); err != nil {
		return err
	}
	return c.completeSubnetRange()
}

func (c *NetworkConfig) completeSubnetLen() error {
	p := c.Network.Bits()
	if c.SubnetLen == 0 {
		switch {
		case p > 28:
			//lint:ignore ST1005 Network is the field's name
			return fmt.Errorf("Network %s is too small: it must be /28 or larger to hold subnets for several nodes", c.Network)
		case p > 22:
			c.SubnetLen = p + 2
		default:
			c.SubnetLen = 24
		}
	}
	switch {
	case c.SubnetLen > 30 || c.SubnetLen < 0:
		return fmt.Errorf("SubnetLen %d is out of range: it must be from %d to 30", c.SubnetLen, p+2)
	case c.SubnetLen < p+2:
		return fmt.Errorf("SubnetLen %d leaves fewer than 4 subnets in Network %s: it must be from %d to 30", c.SubnetLen, c.Network, p+2)
	}
	return nil
}

func (c *NetworkConfig) completeSubnetRange() error {
	size := uint32(1) << (32 - c.SubnetLen)
	first := addrBits(c.Network.Addr())
	last := first | hostMask(c.Network.Bits())
	if !c.SubnetMin.IsValid() || c.SubnetMin.IsUnspecified() {
		c.SubnetMin = bitsAddr(first + size)
	}
	if !c.SubnetMax.IsValid() || c.SubnetMax.IsUnspecified() {
		c.SubnetMax = bitsAddr(last - size + 1)
	}
	for _, b := range []struct {
		field string
		addr  netip.Addr
	}{{"SubnetMin", c.SubnetMin}, {"SubnetMax", c.SubnetMax}} {
		if !b.addr.Is4() || !c.Network.Contains(b.addr) {
			return fmt.Errorf("%s %s is outside Network %s", b.field, b.addr, c.Network)
		}
		if base := netip.PrefixFrom(b.addr, c.SubnetLen).Masked().Addr(); base != b.addr {
			return fmt.Errorf("%s %s is not on a /%d boundary: the subnet that holds it starts at %s", b.field, b.addr, c.SubnetLen, base)
		}
	}
	if c.SubnetMax.Less(c.SubnetMin) {
		return fmt.Errorf("SubnetMin %s is above SubnetMax %s: no subnet is left to claim", c.SubnetMin, c.SubnetMax)
	}
	return nil
}

func (b *Backend) validate() error {
	switch {
	case b.Type != BackendUDP && b.Type != BackendVXLAN:
		return fmt.Errorf("backend type %q is not supported: use %q or %q", b.Type, BackendUDP, BackendVXLAN)
	case b.VNI > maxVNI:
		return fmt.Errorf("Backend.VNI %d is out of range: it must be from 0 to %d", b.VNI, maxVNI)
	case b.MTU < 0 || b.MTU > 65535:
		return fmt.Errorf("Backend.MTU %d is out of range: it must be from 0 to 65535 bytes", b.MTU)
	}
	return nil
}

// Notes lists, one sentence each, what the configuration asks for and tweed does
// another way. None of it keeps the overlay from working.
func (c NetworkConfig) Notes() []string {
	var notes []string
	if c.Backend.DirectRouting {
		notes = append(notes, "Backend.DirectRouting is not followed: this node always encapsulates; "+
			"flannel nodes on its link send to it without encapsulation, past its source checks and captures")
	}
	return notes
}

// Subnets is the number of subnets that nodes may claim.
func (c NetworkConfig) Subnets() int {
	return int((addrBits(c.SubnetMax)-addrBits(c.SubnetMin))>>(32-c.SubnetLen)) + 1
}

// Compatible reports whether a node may hold the subnet under this
// configuration: its length is SubnetLen and it lies from SubnetMin to
// SubnetMax. Network itself is not looked at, as in flannel.
func (c NetworkConfig) Compatible(subnet netip.Prefix) bool {
	return subnet.IsValid() && subnet.Addr().Is4() && subnet.Bits() == c.SubnetLen &&
		!subnet.Addr().Less(c.SubnetMin) && !c.SubnetMax.Less(subnet.Addr())
}

// Marshal returns the configuration as the JSON flannel and tweed read. Derived
// values that equal the defaults are left out. It is an error if the
// configuration is not valid.
func (c NetworkConfig) Marshal() ([]byte, error) {
	full, err := c.Complete()
	if err != nil {
		return nil, err
	}
	bare := NewNetworkConfig(full.Network)
	// A network too small for a default SubnetLen has no default at all.
	def, defErr := bare.Complete()

	var out struct {
		Network        string
		SubnetLen      int    `json:",omitempty"`
		SubnetMin      string `json:",omitempty"`
		SubnetMax      string `json:",omitempty"`
		EnableNFTables bool   `json:",omitempty"`
		Backend        struct {
			Type          string
			VNI           *uint32 `json:",omitempty"`
			Port          uint16  `json:",omitempty"`
			MTU           int     `json:",omitempty"`
			GBP           bool    `json:",omitempty"`
			Learning      bool    `json:",omitempty"`
			DirectRouting bool    `json:",omitempty"`
		}
	}
	out.Network = full.Network.String()
	if defErr != nil || full.SubnetLen != def.SubnetLen {
		out.SubnetLen = full.SubnetLen
	}
	bare.SubnetLen = full.SubnetLen
	if def, err = bare.Complete(); err != nil {
		return nil, err
	}
	if full.SubnetMin != def.SubnetMin {
		out.SubnetMin = full.SubnetMin.String()
	}
	if full.SubnetMax != def.SubnetMax {
		out.SubnetMax = full.SubnetMax.String()
	}
	out.EnableNFTables = full.EnableNFTables
	b := full.Backend
	out.Backend.Type = b.Type
	out.Backend.Port, out.Backend.MTU = b.Port, b.MTU
	out.Backend.GBP, out.Backend.Learning, out.Backend.DirectRouting = b.GBP, b.Learning, b.DirectRouting
	if b.Type == BackendVXLAN || b.VNI != defaultVNI {
		out.Backend.VNI = &b.VNI
	}
	return json.Marshal(out)
}

// String is the configuration in one line of JSON, for messages.
func (c NetworkConfig) String() string {
	data, err := c.Marshal()
	if err != nil {
		return fmt.Sprintf("invalid network config %s", c.Network)
	}
	return string(data)
}

// rawConfig is the configuration with every field still undecoded, so that each
// can be refused by name.
type rawConfig struct {
	EnableIPv4     json.RawMessage
	EnableIPv6     json.RawMessage
	EnableNFTables json.RawMessage
	Network        json.RawMessage
	SubnetLen      json.RawMessage
	SubnetMin      json.RawMessage
	SubnetMax      json.RawMessage
	Backend        json.RawMessage
}

func decodeConfig(data []byte) (*rawConfig, error) {
	if len(data) > maxConfigSize {
		return nil, fmt.Errorf("%d bytes long, more than %d", len(data), maxConfigSize)
	}
	if err := checkJSON(data); err != nil {
		return nil, err
	}
	if !isObject(data) {
		return nil, errors.New("not a JSON object: write for example {\"Network\": \"10.244.0.0/16\"}")
	}
	raw := new(rawConfig)
	if err := json.Unmarshal(data, raw); err != nil {
		return nil, err
	}
	return raw, nil
}

func (r *rawConfig) config() (NetworkConfig, error) {
	c := NewNetworkConfig(netip.Prefix{})
	for _, f := range []struct {
		name string
		raw  json.RawMessage
		set  func(name string, raw json.RawMessage) error
	}{
		{"EnableIPv4", r.EnableIPv4, boolField(&c.EnableIPv4)},
		{"EnableIPv6", r.EnableIPv6, boolField(&c.EnableIPv6)},
		{"EnableNFTables", r.EnableNFTables, boolField(&c.EnableNFTables)},
		{"Network", r.Network, cidrField(&c.Network)},
		{"SubnetLen", r.SubnetLen, numberField(&c.SubnetLen, 24)},
		{"SubnetMin", r.SubnetMin, addrField(&c.SubnetMin)},
		{"SubnetMax", r.SubnetMax, addrField(&c.SubnetMax)},
		{"Backend", r.Backend, backendField(&c.Backend)},
	} {
		if absent(f.raw) {
			continue
		}
		if err := f.set(f.name, f.raw); err != nil {
			return c, err
		}
	}
	return c, nil
}

func backendField(b *Backend) func(string, json.RawMessage) error {
	return func(name string, raw json.RawMessage) error {
		if !isObject(raw) {
			return fmt.Errorf("%s is %s: write an object, %q: {\"Type\": \"vxlan\"}", name, brief(raw), name)
		}
		var r struct {
			Type, Port, VNI, MTU, GBP, Learning, DirectRouting json.RawMessage
		}
		if err := json.Unmarshal(raw, &r); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if absent(r.Type) || json.Unmarshal(r.Type, &b.Type) != nil || b.Type == "" {
			return fmt.Errorf("%s has no Type: write %s or %s, or leave %s out for udp", name,
				`"Type": "udp"`, `"Type": "vxlan"`, name)
		}
		b.Type = strings.ToLower(b.Type)
		if err := b.validate(); err != nil {
			return err
		}
		port, vni := 0, defaultVNI
		for _, f := range []struct {
			name string
			raw  json.RawMessage
			set  func(string, json.RawMessage) error
		}{
			{"Port", r.Port, numberField(&port, 8472)},
			{"VNI", r.VNI, numberField(&vni, 1)},
			{"MTU", r.MTU, numberField(&b.MTU, 1500)},
			{"GBP", r.GBP, boolField(&b.GBP)},
			{"Learning", r.Learning, boolField(&b.Learning)},
			{"DirectRouting", r.DirectRouting, boolField(&b.DirectRouting)},
		} {
			if absent(f.raw) {
				continue
			}
			if err := f.set(name+"."+f.name, f.raw); err != nil {
				return err
			}
		}
		if port < 0 || port > 65535 {
			return fmt.Errorf("%s.Port %d is out of range: it must be from 1 to 65535, or 0 for the default", name, port)
		}
		if vni < 0 || vni > maxVNI {
			return fmt.Errorf("%s.VNI %d is out of range: it must be from 0 to %d", name, vni, maxVNI)
		}
		b.Port, b.VNI = uint16(port), uint32(vni)
		return nil
	}
}

func boolField(v *bool) func(string, json.RawMessage) error {
	return func(name string, raw json.RawMessage) error {
		if err := json.Unmarshal(raw, v); err != nil {
			return fmt.Errorf("%s is %s: write true or false without quotes", name, brief(raw))
		}
		return nil
	}
}

func numberField(v *int, example int) func(string, json.RawMessage) error {
	return func(name string, raw json.RawMessage) error {
		n, err := strconv.ParseInt(string(raw), 10, 32)
		if err != nil || n < 0 {
			field := name[strings.LastIndexByte(name, '.')+1:]
			return fmt.Errorf("%s is %s: write a plain number, %q: %d", name, brief(raw), field, example)
		}
		*v = int(n)
		return nil
	}
}

func cidrField(v *netip.Prefix) func(string, json.RawMessage) error {
	return func(name string, raw json.RawMessage) error {
		var s string
		if json.Unmarshal(raw, &s) == nil {
			if p, err := netip.ParsePrefix(s); err == nil {
				*v = p
				return nil
			}
		}
		return fmt.Errorf("%s is %s: write an address range, %q: \"10.244.0.0/16\"", name, brief(raw), name)
	}
}

func addrField(v *netip.Addr) func(string, json.RawMessage) error {
	return func(name string, raw json.RawMessage) error {
		var s string
		if json.Unmarshal(raw, &s) == nil {
			if a, err := netip.ParseAddr(s); err == nil && a.Is4() {
				*v = a
				return nil
			}
		}
		return fmt.Errorf("%s is %s: write an IPv4 address without a length, %q: \"10.244.1.0\"", name, brief(raw), name)
	}
}

// absent reports whether a field was left out, or null, which JSON decoding
// treats as left out.
func absent(raw json.RawMessage) bool { return len(raw) == 0 || string(raw) == "null" }

func isObject(data []byte) bool {
	data = bytes.TrimLeft(data, " \t\r\n")
	return len(data) > 0 && data[0] == '{'
}

// brief is a JSON value shortened for a message.
func brief(raw []byte) string {
	const max = 60
	if len(raw) > max {
		return strings.ToValidUTF8(string(raw[:max]), "") + "..."
	}
	return string(raw)
}

// addrBits is an IPv4 address as a number in host byte order.
func addrBits(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

// bitsAddr is the inverse of addrBits.
func bitsAddr(v uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], v)
	return netip.AddrFrom4(b)
}

// hostMask has the host bits of a prefix of the given length set.
func hostMask(bits int) uint32 { return uint32(1<<(32-bits) - 1) }
