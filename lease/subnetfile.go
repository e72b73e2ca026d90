package lease

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/google/renameio/v2"
)

// maxSubnetFileSize bounds what is read of a subnet file, in bytes.
const maxSubnetFileSize = 64 << 10

// SubnetFile is the content of subnet.env, the file Docker set-ups and flannel's
// CNI plugin take a node's subnet from.
type SubnetFile struct {
	// Network is the address range of the overlay and Subnet the node's part of
	// it, masked. The file itself holds the subnet's first host address.
	Network, Subnet netip.Prefix
	// MTU is the MTU of the overlay in bytes.
	MTU int
	// IPMasq says that the engine masquerades, so that nobody else should.
	IPMasq bool
}

// WriteSubnetFile replaces the file atomically: readers see the old text or the
// new one. Its directory is made if it is missing (mode 0755). The file's mode is
// 0644 whatever the umask, or the mode of the file it replaces. The text is
// flannel's (pkg/subnet/subnet.go).
func WriteSubnetFile(path string, f SubnetFile) error {
	if !f.Network.IsValid() || !f.Subnet.IsValid() {
		return fmt.Errorf("lease: write subnet file %s: network %s and subnet %s must both be set", path, f.Network, f.Subnet)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("lease: write subnet file: %w", err)
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "FLANNEL_NETWORK=%s\n", f.Network.Masked())
	fmt.Fprintf(&b, "FLANNEL_SUBNET=%s/%d\n", f.Subnet.Masked().Addr().Next(), f.Subnet.Bits())
	fmt.Fprintf(&b, "FLANNEL_MTU=%d\n", f.MTU)
	fmt.Fprintf(&b, "FLANNEL_IPMASQ=%t\n", f.IPMasq)
	err := renameio.WriteFile(path, b.Bytes(), 0o644,
		renameio.WithTempDir(filepath.Dir(path)), renameio.IgnoreUmask())
	if err != nil {
		return fmt.Errorf("lease: write subnet file: %w", err)
	}
	return nil
}

// ReadSubnetFile reads a file that WriteSubnetFile or flannel wrote. A variable
// that is missing or that does not parse is left zero: the file is a hint where
// the node was before, not a source of truth. As in flannel, a list of several
// valid ranges counts as none. The error wraps fs.ErrNotExist if there is no file.
func ReadSubnetFile(path string) (SubnetFile, error) {
	file, err := os.Open(path)
	if err != nil {
		return SubnetFile{}, fmt.Errorf("lease: read subnet file: %w", err)
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxSubnetFileSize))
	if err != nil {
		return SubnetFile{}, fmt.Errorf("lease: read subnet file: %w", err)
	}
	var f SubnetFile
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		name, value, ok := strings.Cut(strings.TrimSpace(lines.Text()), "=")
		if !ok {
			continue
		}
		value = unquote(strings.TrimSpace(value))
		switch strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(name), "export ")) {
		case "FLANNEL_NETWORK":
			f.Network = onlyPrefix(value)
		case "FLANNEL_SUBNET":
			f.Subnet = onlyPrefix(value)
		case "FLANNEL_MTU":
			if mtu, err := strconv.Atoi(value); err == nil && mtu > 0 && mtu <= 65535 {
				f.MTU = mtu
			}
		case "FLANNEL_IPMASQ":
			f.IPMasq = value == "true"
		}
	}
	return f, nil
}

// unquote removes the quotes of a dotenv value, or the comment after a bare one.
func unquote(s string) string {
	if len(s) >= 2 && (s[0] == '"' || s[0] == '\'') {
		if end := strings.IndexByte(s[1:], s[0]); end >= 0 {
			return s[1 : 1+end]
		}
	}
	s, _, _ = strings.Cut(s, " #")
	return strings.TrimSpace(s)
}

// onlyPrefix is the one valid IPv4 range of a comma list, masked, or none.
func onlyPrefix(list string) netip.Prefix {
	var found netip.Prefix
	for part := range strings.SplitSeq(list, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(part))
		if err != nil || !p.Addr().Is4() {
			continue
		}
		if found.IsValid() {
			return netip.Prefix{}
		}
		found = p.Masked()
	}
	return found
}
