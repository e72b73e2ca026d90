// Package attach gives a container an interface of the overlay: it sends a
// helper into the container's namespaces, which makes the interface and hands
// back the descriptor the engine reads and writes. The engine itself never
// enters a namespace and needs no capability for it.
//
// There is more than one way to make the interface, the tiers. The best that
// works is taken, and what was wrong with the better ones is told along with
// what to type about it.
//
//	tun       a TUN device; needs a usable /dev/net/tun
//	veth      a veth pair with a packet socket on its far end; needs no device
//	          node and carries super-packets all the same
//	netstack  no interface at all: package netstack, not made here
//
// Whatever is made vanishes with the descriptor, however the engine ends.
package attach

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"tweed/netns"
	"tweed/tun"
)

// Tier is a way to connect a container.
type Tier string

// The tiers, the best first.
const (
	TierTUN      Tier = "tun"
	TierVeth     Tier = "veth"
	TierNetstack Tier = "netstack"
)

// TierAuto stands for the best tier that works.
const TierAuto Tier = "auto"

// ParseTier reads the value of the --tier flag; empty means auto.
func ParseTier(s string) (Tier, error) {
	switch t := Tier(s); t {
	case "":
		return TierAuto, nil
	case TierAuto, TierTUN, TierVeth, TierNetstack:
		return t, nil
	}
	return "", fmt.Errorf("tier %q: expected auto, tun, veth or netstack", s)
}

// Verdict is why a tier was not taken, and what to type to get it.
type Verdict struct {
	Tier Tier   `json:"tier"`
	Why  string `json:"why"`
	Fix  string `json:"fix,omitempty"`
}

func (v Verdict) String() string {
	s := fmt.Sprintf("%s: %s", v.Tier, v.Why)
	if v.Fix != "" {
		s += " (" + v.Fix + ")"
	}
	return s
}

// Link is the interface a container is to have.
type Link struct {
	// Name of the interface, at most 15 bytes.
	Name string `json:"name"`
	// Addr is set as a /32, and Network routed to the interface.
	Addr    netip.Addr   `json:"address"`
	Network netip.Prefix `json:"network"`
	// MTU and GSOMaxSize, the largest super-packet, are in bytes; GSOMaxSize 0
	// means no super-packets.
	MTU        int         `json:"mtu"`
	GSOMaxSize int         `json:"gso_max_size"`
	Offload    tun.Offload `json:"offload"`
}

// Made is an interface inside a container and our end of it.
type Made struct {
	// File is the descriptor to read and write; closing it, and every copy of
	// it, removes the interface. The caller owns it.
	File *os.File
	// Queue says how the descriptor is used.
	Queue tun.FDConfig
	Tier  Tier
	// OffloadReason says in a few words why the rung in Queue is in use.
	OffloadReason string
	// Passed are the better tiers, with what was wrong with them.
	Passed []Verdict
}

// Error is why a container has no interface: a step that failed inside, or
// every tier with what was wrong with it.
type Error struct {
	// Target is the container as the user named it.
	Target string
	// Stage is the step inside the container, empty if no tier worked.
	Stage string
	Text  string
	// Passed are the tiers that were tried.
	Passed []Verdict
}

func (e *Error) Error() string {
	if e.Stage != "" {
		return fmt.Sprintf("attach: %s: %s: %s", e.Target, e.Stage, e.Text)
	}
	var tiers []string
	for _, v := range e.Passed {
		tiers = append(tiers, v.String())
	}
	return fmt.Sprintf("attach: %s: no tier works: %s", e.Target, strings.Join(tiers, "; "))
}

// request and answer are what goes to and comes from the helper.
type request struct {
	Link  Link   `json:"link"`
	Tiers []Tier `json:"tiers"`
}

type answer struct {
	Tier    Tier        `json:"tier"`
	Offload tun.Offload `json:"offload"`
	Reason  string      `json:"offload_reason"`
	Self    [6]byte     `json:"self"`
	Peer    [6]byte     `json:"peer"`
	Passed  []Verdict   `json:"passed"`
	Stage   string      `json:"stage"`
	Error   string      `json:"error"`
}

// Make makes the interface in the target's network namespace and brings it up
// with address and route. tier is TierTUN or TierVeth to force one, or
// TierAuto. On an error nothing is left in the container.
func Make(ctx context.Context, target *netns.Target, link Link, tier Tier) (*Made, error) {
	r := request{Link: link, Tiers: []Tier{TierTUN, TierVeth}}
	switch tier {
	case TierAuto:
	case TierTUN, TierVeth:
		r.Tiers = []Tier{tier}
	default:
		return nil, fmt.Errorf("attach: tier %s makes no interface in a container", tier)
	}
	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	b, files, err := target.Run(ctx, b)
	if err != nil {
		return nil, err
	}
	var a answer
	if err := json.Unmarshal(b, &a); err != nil {
		closeAll(files)
		return nil, fmt.Errorf("attach: %s: answer of the helper: %w", target, err)
	}
	if a.Error != "" || a.Tier == "" {
		closeAll(files)
		return nil, &Error{Target: target.String(), Stage: a.Stage, Text: a.Error, Passed: a.Passed}
	}
	if len(files) != 1 {
		closeAll(files)
		return nil, fmt.Errorf("attach: %s: the helper passed %d descriptors: expected 1 (its limit is low: ulimit -n)", target, len(files))
	}
	return &Made{
		File: files[0],
		Queue: tun.FDConfig{
			Ethernet: a.Tier == TierVeth, Self: a.Self, Peer: a.Peer, Offload: a.Offload,
		},
		Tier: a.Tier, OffloadReason: a.Reason, Passed: a.Passed,
	}, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// IsHelper reports whether this process was started as a helper; its main then
// calls HelperMain and nothing else.
func IsHelper() bool { return len(os.Args) == 2 && os.Args[1] == netns.HelperArg }

// HelperMain is the main of a helper. It returns the exit status.
func HelperMain() int {
	return netns.Helper(func(b []byte) ([]byte, []*os.File) {
		var r request
		var a answer
		var f *os.File
		err := json.Unmarshal(b, &r)
		if err == nil {
			a, f, err = serve(r)
		}
		if err != nil {
			a.Error, a.Stage = err.Error(), "helper"
			var s *stageError
			if errors.As(err, &s) {
				a.Error, a.Stage = s.err.Error(), s.stage
			}
		}
		out, err := json.Marshal(a)
		if err != nil || f == nil {
			return out, nil
		}
		return out, []*os.File{f}
	})
}
