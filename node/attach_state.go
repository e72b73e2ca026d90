package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"time"

	"tweed/attach"
	"tweed/tun/ring"
)

const (
	// attachmentsFile is the list of attachments in the state directory.
	attachmentsFile = "attachments.json"
	// maxName is the longest name of an attachment, in bytes.
	maxName = 63
)

// savedAttachment is what an attachment is made again from after a restart.
type savedAttachment struct {
	Name   string      `json:"name"`
	Addr   netip.Addr  `json:"address"`
	IfName string      `json:"interface,omitempty"`
	Tier   attach.Tier `json:"tier"`
	PID    int         `json:"pid,omitempty"`
	// Start is the process's start time in clock ticks since boot and Netns the
	// inode of its network namespace: together they say whether it is the same.
	Start uint64    `json:"start,omitempty"`
	Path  string    `json:"path,omitempty"`
	Netns uint64    `json:"netns,omitempty"`
	Since time.Time `json:"since"`
	// Socket is of a program, which attaches anew by itself.
	Socket string `json:"-"`
}

// savedAttachments is the state file.
type savedAttachments struct {
	Version     int               `json:"version"`
	Attachments []savedAttachment `json:"attachments"`
}

// restore reads what an earlier run left. The containers are connected as soon
// as there is an engine.
func (a *attachments) restore() {
	b, err := readBounded(a.path)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	var s savedAttachments
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err == nil && s.Version != stateVersion {
		err = fmt.Errorf("version %d, expected %d", s.Version, stateVersion)
	}
	if err != nil {
		a.log.Warn("attachments of the last run are lost", "file", a.path, "err", err)
		a.lost = append(a.lost, fmt.Sprintf("attachments of the last run are lost: %s: %v", a.path, err))
		return
	}
	for _, saved := range s.Attachments {
		if saved.Name == "" || a.all[saved.Name] != nil {
			continue
		}
		a.all[saved.Name] = &attachment{savedAttachment: saved}
	}
}

// save writes the state file.
func (a *attachments) save() {
	s := savedAttachments{Version: stateVersion, Attachments: []savedAttachment{}}
	for _, t := range a.list() {
		if t.Socket == "" {
			s.Attachments = append(s.Attachments, t.savedAttachment)
		}
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err == nil {
		err = writeState(a.path, append(b, '\n'))
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.problem = ""; err != nil {
		a.problem = err.Error()
	}
}

// AttachRequest asks to attach a container, by exactly one of PID and Path, or
// a program with a network stack of its own, by Socket.
type AttachRequest struct {
	// PID is a process of the container in the engine's pid namespace.
	PID int `json:"pid,omitempty"`
	// Path is the container's network namespace: a path, or a name in /run/netns
	// or $XDG_RUNTIME_DIR/netns.
	Path string `json:"path,omitempty"`
	// Socket is a SOCK_SEQPACKET unix socket to connect to, as an absolute path or
	// @ and an abstract name. Each message is a struct virtio_net_hdr (10 bytes)
	// and one IPv4 packet. Packets to the program are single ones, but their
	// transport checksum may be left to it (VIRTIO_NET_HDR_F_NEEDS_CSUM).
	Socket string `json:"socket,omitempty"`
	// SuperPackets says that the program behind Socket takes TCP super-packets
	// (VIRTIO_NET_HDR_GSO_TCPV4) as well. It may always send them, up to
	// GSOMaxSize of the answer.
	SuperPackets bool `json:"super_packets,omitempty"`
	// SharedMemory says that the program behind Socket takes packets through
	// shared memory. When SharedMemory of the answer says that it is so, the first
	// message on the socket is one byte with a descriptor of the memory (package
	// tun/ring), and all others are single bytes that wake the other side.
	SharedMemory bool `json:"shared_memory,omitempty"`
	// Name is what the attachment is called from now on; empty means pid-PID or
	// the last part of Path. Letters, digits, dot, minus and underscore, at most
	// 63 bytes.
	Name string `json:"name,omitempty"`
	// IfName is the interface inside, default tweed0.
	IfName string `json:"interface,omitempty"`
	// Addr asks for one address of the node's subnet.
	Addr netip.Addr `json:"address,omitzero"`
	// Tier forces a tier; empty or auto takes the best one that works.
	Tier string `json:"tier,omitempty"`
}

var attachmentName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]*$`)

// check completes the request and says what is wrong with it.
func (r *AttachRequest) check() (attach.Tier, error) {
	if r.Name != "" && (len(r.Name) > maxName || !attachmentName.MatchString(r.Name)) {
		return "", fmt.Errorf("name %q: expected 1 to %d letters, digits, dots, minus signs and underscores", r.Name, maxName)
	}
	tier, err := attach.ParseTier(r.Tier)
	if err != nil {
		return "", err
	}
	targets := 0
	for _, given := range []bool{r.PID != 0, r.Path != "", r.Socket != ""} {
		if given {
			targets++
		}
	}
	if targets != 1 {
		return "", errors.New("expected exactly one of a pid, a network namespace and a socket")
	}
	if r.SharedMemory && r.Socket == "" {
		return "", errors.New("shared_memory: expected with a socket only: a container has an interface")
	}
	if r.SuperPackets && r.Socket == "" {
		return "", errors.New("super_packets: expected with a socket only: a container's interface says so itself")
	}
	if r.Socket != "" {
		if tier != attach.TierAuto && tier != attach.TierNetstack {
			return "", fmt.Errorf("tier %s: a program behind a socket has no interface", tier)
		}
		if r.Socket[0] != '/' && r.Socket[0] != '@' {
			return "", fmt.Errorf("socket %q: expected an absolute path", r.Socket)
		}
		return attach.TierNetstack, nil
	}
	if tier == attach.TierNetstack {
		return "", errors.New("tier netstack makes no interface in a container: use tweed proxy, or tweed run --tier netstack")
	}
	if r.IfName == "" {
		r.IfName = DefaultIfName
	}
	if err := checkIfName(r.IfName); err != nil {
		return "", err
	}
	return tier, nil
}

func checkIfName(name string) error {
	if checkTUNName(name) != nil || name[len(name)-1] == 'd' && len(name) > 1 && name[len(name)-2] == '%' {
		return fmt.Errorf("interface name %q: expected 1 to %d characters without blank, slash, colon or percent", name, maxIfaceName)
	}
	return nil
}

// AttachmentStatus is one attached container or program.
type AttachmentStatus struct {
	Name string     `json:"name"`
	Addr netip.Addr `json:"address"`
	// State is up, or waiting while it is not connected.
	State   string `json:"state"`
	Problem string `json:"problem,omitempty"`
	// Tier is in use; Passed are the better ones, with what was wrong with them.
	Tier   attach.Tier      `json:"tier"`
	Passed []attach.Verdict `json:"passed_over"`
	// Interface, PID, Path and Netns, its inode, are of a container, Socket is of
	// a program.
	Interface string `json:"interface,omitempty"`
	PID       int    `json:"pid,omitempty"`
	Path      string `json:"path,omitempty"`
	Netns     uint64 `json:"netns,omitempty"`
	Socket    string `json:"socket,omitempty"`
	// SharedMemory says that a program's packets do not go through its socket.
	SharedMemory bool `json:"shared_memory,omitempty"`
	// Program is what a program with shared memory says of its network stack, not
	// older than a second or two.
	Program *ProgramStats `json:"program,omitempty"`
	// MTU is in bytes. Network is what the address reaches over the overlay.
	MTU int `json:"mtu"`
	// GSOMaxSize is the largest super-packet in bytes, 0 if there are none.
	GSOMaxSize    int          `json:"gso_max_size"`
	Network       netip.Prefix `json:"network,omitzero"`
	Offload       string       `json:"offload,omitempty"`
	OffloadReason string       `json:"offload_reason,omitempty"`
	Since         time.Time    `json:"since"`
}

// ProgramStats are the counters of a program's network stack, in packets since it
// was attached for the first time. A super-packet counts once.
type ProgramStats struct {
	// Received came from the engine. Of them, BadChecksum were dropped for their
	// TCP or UDP checksum, Malformed for their IP header, its checksum included.
	Received    uint64 `json:"received"`
	BadChecksum uint64 `json:"bad_checksum"`
	Malformed   uint64 `json:"malformed"`
	// Sent went to the engine, or met none: those are Lost.
	Sent uint64 `json:"sent"`
	Lost uint64 `json:"lost"`
	// Retransmitted are TCP segments that were sent again.
	Retransmitted uint64 `json:"retransmitted"`
}

// String is the counters in one line.
func (s ProgramStats) String() string {
	return fmt.Sprintf("received %d (bad checksum %d, malformed %d), sent %d (no engine %d), retransmitted %d",
		s.Received, s.BadChecksum, s.Malformed, s.Sent, s.Lost, s.Retransmitted)
}

// fields are the counters in the order of a ring's report.
func (s *ProgramStats) fields() [6]*uint64 {
	return [6]*uint64{&s.Received, &s.BadChecksum, &s.Malformed, &s.Sent, &s.Lost, &s.Retransmitted}
}

// Put writes the counters into a report.
func (s ProgramStats) Put(r *ring.Report) {
	for i, f := range s.fields() {
		r[i].Store(*f)
	}
}

func programStats(r *ring.Report) *ProgramStats {
	s := new(ProgramStats)
	for i, f := range s.fields() {
		*f = r[i].Load()
	}
	return s
}

// AttachmentsAnswer lists the attachments in order of their addresses.
type AttachmentsAnswer struct {
	Schema      int                `json:"schema"`
	Attachments []AttachmentStatus `json:"attachments"`
}

func (t *attachment) status() AttachmentStatus {
	s := AttachmentStatus{
		Name: t.Name, Addr: t.Addr, State: "waiting", Problem: t.problem, Tier: t.Tier,
		Interface: t.IfName, PID: t.PID, Path: t.Path, Netns: t.Netns, Socket: t.Socket, Since: t.Since,
		Passed: []attach.Verdict{},
	}
	if t.attached {
		s.State = "up"
	}
	if t.made != nil {
		s.Tier, s.MTU, s.GSOMaxSize, s.Network = t.made.Tier, t.link.MTU, t.link.GSOMaxSize, t.link.Network
		s.Offload, s.OffloadReason = t.made.Queue.Offload.String(), t.made.OffloadReason
		s.Passed = append(s.Passed, t.made.Passed...)
		if r := t.made.Queue.Ring; r != nil {
			s.SharedMemory, s.Program = true, programStats(r.Report())
		}
	}
	return s
}
