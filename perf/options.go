package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
)

// options are the command line, checked.
type options struct {
	rounds, seconds, pings, idle int

	links []string
	// rootless compares ways to connect two containers of one machine, instead
	// of two hosts.
	rootless bool
	loads    []load
	// loadList and subjectList are as typed.
	loadList, subjectList string
	subjects              []chosen
	// tweed is a binary to use in place of a fresh build, against the second
	// one; the flags are added to their `up`.
	tweed, against           string
	tweedFlags, againstFlags string
	// out is the folder for the results; none means perf/results/<...>, and
	// "none" that nothing is written.
	out string
}

// outNone is the value of --out that writes nothing.
const outNone = "none"

const usage = `usage: go run ./perf [flags]     (as root)

Measures tweed beside raw veth, the kernel's vxlan and other overlays: two
network namespaces joined by a veth pair for each subject, all subjects taking
turns at every load of every round, a second at a time. Prints tables, and
writes result.json, result.md and chart.svg to perf/results/.

  subjects  raw, vxlan (the kernel's), tweed-udp, tweed-vxlan, flanneld, wireguard-go, nebula;
            tweed is both framings; tweed-vxlan@workers keeps every packet in user space,
            tweed-vxlan@tso at a rung as well (full, tso, none);
            tweed-b-udp and tweed-b-vxlan are the binary of --against
  loads     tcpN, tcpN-reverse, tcpN-both (N flows); tcpN-captured (with tweed capture of all points
            to a file, and without, one after the other); udpB, udpBxN (B bytes, N flows); ping; idle
  links     virtual (veth as it is: super-packets cross whole), wire (veth that cuts
            super-packets to real frames and merges them on receipt), both

With --rootless it measures two containers of one machine instead, in a user
namespace: tweed attach in each tier beside pasta and slirp4netns, where they
are on PATH; link machine, MTU 1500, loads tcpN. Any user may run it; for tier
tun /dev/net/tun must be usable.

  go run ./perf --rounds 1 --seconds 1 --link virtual      does it work at all?
  go run ./perf --rounds 5 --link both                     the figures of record
  go run ./perf --rootless --rounds 5                      containers without privilege
  go run ./perf --subjects vxlan,tweed-vxlan --loads tcp1,udp64 --against /tmp/tweed-old --out none

flags:
`

// errHelp is returned when help was asked for and printed.
var errHelp = errors.New("help")

// parseOptions reads the command line. What it refuses it explains on one line.
func parseOptions(args []string, stderr io.Writer) (*options, error) {
	o := &options{}
	fs := flag.NewFlagSet("perf", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	fs.IntVar(&o.rounds, "rounds", 5, "`number` of rounds, 1 to 100")
	fs.IntVar(&o.seconds, "seconds", 4, "`seconds` of each TCP and UDP load, 1 to 300")
	fs.IntVar(&o.pings, "pings", 500, "`number` of pings, 2 ms apart, 10 to 100000")
	fs.IntVar(&o.idle, "idle", 5, "`seconds` the idle engines are watched, 1 to 300")
	fs.BoolVar(&o.rootless, "rootless", false, "measure two containers of one machine, without privilege")
	link := fs.String("link", "both", "`kind` of link: virtual, wire or both")
	fs.StringVar(&o.loadList, "loads", defaultLoads, "comma separated `loads`")
	fs.StringVar(&o.subjectList, "subjects", "", "comma separated `subjects` (default: raw, vxlan, tweed, tweed-vxlan@workers, and the peers there are)")
	var peers repeated
	fs.Var(&peers, "peer", "`name=/path` of flanneld, wireguard-go or nebula; repeatable; else they are looked for on PATH")
	fs.StringVar(&o.tweed, "tweed", "", "`path` of a tweed binary to measure (default: built from ./cmd/tweed)")
	fs.StringVar(&o.tweedFlags, "tweed-flags", "", "further `flags` for its tweed up, separated by blanks")
	fs.StringVar(&o.against, "against", "", "`path` of a second tweed binary, measured as tweed-b in the same rounds")
	fs.StringVar(&o.againstFlags, "against-flags", "", "further `flags` for the second binary's tweed up")
	fs.StringVar(&o.out, "out", "", "`folder` for the results, or none (default: perf/results/<date>-<kernel>-<cpu>)")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fmt.Fprint(stderr, usage)
			fs.SetOutput(stderr)
			fs.PrintDefaults()
			return nil, errHelp
		}
		return nil, err
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q: expected flags only, see --help", fs.Arg(0))
	}
	if o.rootless {
		given := map[string]bool{}
		fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
		if given["link"] {
			return nil, errors.New("--link: does not go with --rootless, whose containers are on one machine")
		}
		*link = linkMachine
		if !given["loads"] {
			o.loadList = rootlessLoads
		}
	}
	return o, o.check(*link, peers)
}

func (o *options) check(link string, peers []string) error {
	for _, r := range []struct {
		flag             string
		value, low, high int
	}{
		{"--rounds", o.rounds, 1, 100}, {"--seconds", o.seconds, 1, 300},
		{"--pings", o.pings, 10, 100000}, {"--idle", o.idle, 1, 300},
	} {
		if r.value < r.low || r.value > r.high {
			return fmt.Errorf("%s %d: expected %d to %d", r.flag, r.value, r.low, r.high)
		}
	}
	switch link {
	case linkMachine:
		if !o.rootless {
			return errors.New("--link machine: expected --rootless instead")
		}
		o.links = []string{link}
	case linkVirtual, linkWire:
		o.links = []string{link}
	case "both":
		o.links = []string{linkVirtual, linkWire}
	default:
		return fmt.Errorf("--link %q: expected virtual, wire or both", link)
	}
	var err error
	if o.loads, err = parseLoads(o.loadList); err != nil {
		return err
	}
	if o.againstFlags != "" && o.against == "" {
		return errors.New("--against-flags: needs --against PATH; give the same binary to compare flags")
	}
	for _, p := range []struct {
		flag string
		path *string
	}{{"--tweed", &o.tweed}, {"--against", &o.against}} {
		if *p.path == "" {
			continue
		}
		full, err := exec.LookPath(*p.path)
		if err != nil {
			return fmt.Errorf("%s %s: %w", p.flag, *p.path, err)
		}
		if *p.path, err = filepath.Abs(full); err != nil {
			return err
		}
	}
	if o.rootless {
		return o.checkRootless(peers)
	}
	found, err := findPeers(peers)
	if err != nil {
		return err
	}
	o.subjects, err = chooseSubjects(splitList(o.subjectList), found, o.against != "")
	return err
}

// usesIperf3 says whether some load needs the iperf3 program.
func (o *options) usesIperf3() bool {
	for _, l := range o.loads {
		if l.usesIperf3() {
			return true
		}
	}
	return false
}

// usesEtcd says whether some subject needs etcd, and with it the tweed binary.
func (o *options) usesEtcd() bool {
	for _, s := range o.subjects {
		if isTweed(s.name) || s.name == peerFlanneld {
			return true
		}
	}
	return false
}

// repeated is a flag that may be given more than once.
type repeated []string

func (r *repeated) String() string { return strings.Join(*r, " ") }

func (r *repeated) Set(v string) error {
	*r = append(*r, v)
	return nil
}
