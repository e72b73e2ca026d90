package node

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
	"github.com/google/uuid"

	"tweed/lease"
)

// Files in the state directory.
const (
	identityFile = "node.json"
	snapshotFile = "snapshot.json"
	// snapshotPrevious is the copy before the last one.
	snapshotPrevious = "snapshot.json.1"

	// stateVersion is the version of both files. Another version is not read.
	stateVersion = 1
	// maxStateFile bounds what is read into memory: 65,536 leases need about 20 MB.
	maxStateFile = 64 << 20
)

// identity is what makes a node the same node after a restart.
type identity struct {
	Version int              `json:"version"`
	NodeID  string           `json:"node_id"`
	MAC     net.HardwareAddr `json:"-"`
	MACText string           `json:"vtep_mac"`
}

func newIdentity() (identity, error) {
	id, err := uuid.NewRandom()
	if err != nil {
		return identity{}, fmt.Errorf("node id: %w", err)
	}
	mac := make(net.HardwareAddr, 6)
	if _, err := rand.Read(mac); err != nil {
		return identity{}, fmt.Errorf("VTEP MAC: %w", err)
	}
	mac[0] = mac[0]&^0x01 | 0x02 // unicast, locally administered
	return identity{Version: stateVersion, NodeID: id.String(), MAC: mac, MACText: mac.String()}, nil
}

// check parses what was read and refuses what cannot be an identity.
func (i *identity) check() error {
	if i.Version != stateVersion {
		return fmt.Errorf("version %d, expected %d", i.Version, stateVersion)
	}
	if _, err := uuid.Parse(i.NodeID); err != nil {
		return fmt.Errorf("node_id %q: %w", i.NodeID, err)
	}
	mac, err := net.ParseMAC(i.MACText)
	if err != nil {
		return fmt.Errorf("vtep_mac: %w", err)
	}
	if len(mac) != 6 || mac[0]&0x01 != 0 || mac.String() == "00:00:00:00:00:00" {
		return fmt.Errorf("vtep_mac %s: expected a unicast Ethernet address", i.MACText)
	}
	i.MAC = mac
	return nil
}

// readIdentity returns os.ErrNotExist when there is none yet.
func readIdentity(dir string) (identity, error) {
	b, err := readBounded(filepath.Join(dir, identityFile))
	if err != nil {
		return identity{}, err
	}
	var i identity
	if err := json.Unmarshal(b, &i); err != nil {
		return identity{}, fmt.Errorf("%s: %w", filepath.Join(dir, identityFile), err)
	}
	if err := i.check(); err != nil {
		return identity{}, fmt.Errorf("%s: %w", filepath.Join(dir, identityFile), err)
	}
	return i, nil
}

func writeIdentity(dir string, i identity) error {
	b, err := json.MarshalIndent(i, "", "  ")
	if err != nil {
		return err
	}
	return writeState(filepath.Join(dir, identityFile), append(b, '\n'))
}

// savedTable is the last good state of the overlay, enough to forward without etcd.
type savedTable struct {
	// EtcdPrefix guards against forwarding another network's table.
	EtcdPrefix string    `json:"etcd_prefix"`
	Revision   int64     `json:"revision"`
	Saved      time.Time `json:"saved"`
	NodeID     string    `json:"node_id"`
	VtepMAC    string    `json:"vtep_mac"`
	// Config is the network config in force, in flannel's form.
	Config json.RawMessage `json:"config"`
	Own    savedLease      `json:"own"`
	Peers  []savedLease    `json:"peers"`
}

// savedLease is one lease. The names are this file's own, so that a change in
// package lease does not change the file.
type savedLease struct {
	Subnet           netip.Prefix `json:"subnet"`
	PublicIP         netip.Addr   `json:"public_ip"`
	BackendType      string       `json:"backend_type,omitempty"`
	VNI              uint32       `json:"vni,omitempty"`
	VtepMAC          string       `json:"vtep_mac,omitempty"`
	NodeID           string       `json:"node_id,omitempty"`
	NodeName         string       `json:"node_name,omitempty"`
	PartialChecksums bool         `json:"partial_checksums,omitempty"`
	Reservation      bool         `json:"reservation,omitempty"`
}

func saveLease(l lease.Lease) savedLease {
	s := savedLease{
		Subnet: l.Subnet, PublicIP: l.PublicIP, BackendType: l.BackendType, VNI: l.VNI,
		NodeID: l.NodeID, NodeName: l.NodeName,
		PartialChecksums: l.PartialChecksums, Reservation: l.Reservation,
	}
	if len(l.VtepMAC) > 0 {
		s.VtepMAC = l.VtepMAC.String()
	}
	return s
}

func (s savedLease) lease() (lease.Lease, error) {
	l := lease.Lease{Subnet: s.Subnet, Reservation: s.Reservation}
	l.PublicIP, l.BackendType, l.VNI = s.PublicIP, s.BackendType, s.VNI
	l.NodeID, l.NodeName, l.PartialChecksums = s.NodeID, s.NodeName, s.PartialChecksums
	if !s.Subnet.IsValid() || !s.Subnet.Addr().Is4() || !s.PublicIP.Is4() {
		return l, fmt.Errorf("lease %s at %s: expected IPv4", s.Subnet, s.PublicIP)
	}
	if s.VtepMAC != "" {
		mac, err := net.ParseMAC(s.VtepMAC)
		if err != nil {
			return l, err
		}
		l.VtepMAC = mac
	}
	return l, nil
}

// snapshotEnvelope carries the table as the very bytes the checksum covers.
type snapshotEnvelope struct {
	Version int             `json:"version"`
	SHA256  string          `json:"sha256"`
	Table   json.RawMessage `json:"table"`
}

func encodeSnapshot(t savedTable) ([]byte, error) {
	b, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(b)
	out, err := json.Marshal(snapshotEnvelope{Version: stateVersion, SHA256: hex.EncodeToString(sum[:]), Table: b})
	return append(out, '\n'), err
}

func decodeSnapshot(b []byte) (savedTable, error) {
	var e snapshotEnvelope
	if err := json.Unmarshal(b, &e); err != nil {
		return savedTable{}, err
	}
	if e.Version != stateVersion {
		return savedTable{}, fmt.Errorf("version %d, expected %d", e.Version, stateVersion)
	}
	sum := sha256.Sum256(e.Table)
	if hex.EncodeToString(sum[:]) != e.SHA256 {
		return savedTable{}, errors.New("checksum does not match")
	}
	var t savedTable
	if err := json.Unmarshal(e.Table, &t); err != nil {
		return savedTable{}, err
	}
	return t, nil
}

// state is the decoded form of a savedTable.
type cachedState struct {
	saved    time.Time
	revision int64
	nodeID   string
	mac      net.HardwareAddr
	config   lease.NetworkConfig
	own      lease.Lease
	peers    []lease.Lease
}

func (t savedTable) decode() (*cachedState, error) {
	c := &cachedState{saved: t.Saved, revision: t.Revision, nodeID: t.NodeID}
	var err error
	if c.mac, err = net.ParseMAC(t.VtepMAC); err != nil {
		return nil, err
	}
	if c.config, err = lease.ParseNetworkConfig(t.Config); err != nil {
		return nil, err
	}
	if c.own, err = t.Own.lease(); err != nil {
		return nil, err
	}
	for _, p := range t.Peers {
		l, err := p.lease()
		if err != nil {
			return nil, err
		}
		c.peers = append(c.peers, l)
	}
	return c, nil
}

// readSnapshot returns the newest good snapshot for the etcd prefix, or nil.
// The error says why a file was passed over and is a warning, not a failure.
func readSnapshot(dir, etcdPrefix string) (*cachedState, error) {
	var errs []error
	for _, name := range []string{snapshotFile, snapshotPrevious} {
		path := filepath.Join(dir, name)
		c, err := readSnapshotFile(path, etcdPrefix)
		if err == nil {
			return c, joinOrNil(errs)
		}
		if !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("%s is ignored: %w", path, err))
		}
	}
	return nil, joinOrNil(errs)
}

func joinOrNil(errs []error) error {
	if len(errs) == 0 {
		return nil
	}
	return joinLine(errs)
}

func readSnapshotFile(path, etcdPrefix string) (*cachedState, error) {
	b, err := readBounded(path)
	if err != nil {
		return nil, err
	}
	t, err := decodeSnapshot(b)
	if err != nil {
		return nil, err
	}
	if t.EtcdPrefix != etcdPrefix {
		return nil, fmt.Errorf("it is of etcd prefix %s, not %s", t.EtcdPrefix, etcdPrefix)
	}
	return t.decode()
}

// writeSnapshot replaces the snapshot atomically and keeps the one before.
func writeSnapshot(dir string, t savedTable) error {
	b, err := encodeSnapshot(t)
	if err != nil {
		return err
	}
	cur, prev := filepath.Join(dir, snapshotFile), filepath.Join(dir, snapshotPrevious)
	// A link, not a rename: at no moment is there no current file.
	if err := os.Remove(prev); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Link(cur, prev); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return writeState(cur, b)
}

// removeSnapshot forgets the table of a lease that was given back.
func removeSnapshot(dir string) error {
	var errs []error
	for _, name := range []string{snapshotFile, snapshotPrevious} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return joinOrNil(errs)
}

func writeState(path string, b []byte) error {
	return renameio.WriteFile(path, b, 0o600, renameio.WithTempDir(filepath.Dir(path)))
}

func readBounded(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.Size() > maxStateFile {
		return nil, fmt.Errorf("%s: %d bytes, more than the %d a state file can have", path, fi.Size(), maxStateFile)
	}
	return os.ReadFile(path)
}
