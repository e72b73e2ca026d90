package main

import (
	"fmt"
	"slices"
)

// engineThreads is how many threads a load keeps busy: client, server, and in
// each of the two engines one that sends and one that receives.
const engineThreads = 6

// noisySteal, in percent, and noisyLoad, as a share of the cores, are above
// what a quiet machine shows.
const (
	noisySteal = 2.0
	noisyLoad  = 0.25
)

// notes say what limits the figures on this machine, and what to expect of
// another.
func (r *Report) notes() []string {
	cores := r.Host.Cores
	var out []string
	if cores < engineThreads {
		out = append(out, fmt.Sprintf("Limit here: %s for everything. The client, the server and the send and receive threads of two engines "+
			"want up to %d at once, so throughput measures the CPU all of them use together, not how fast one engine can go. "+
			"Between two hosts each engine has only one program beside it.", plural(cores, "core"), engineThreads))
	} else {
		out = append(out, fmt.Sprintf("Limit here: one thread. %d cores are enough for the client, the server and the send and receive threads "+
			"of both engines, but all of them share caches and memory bandwidth.", cores))
	}
	if slices.Contains(r.Settings.Links, linkMachine) {
		out = append(out, rootlessNotes...)
	} else {
		out = append(out, linkNotes...)
	}
	if r.Host.Virtual {
		out = append(out, "This is a virtual machine: waking up a halted core and switching threads costs more than on hardware.")
	}
	if r.Host.Load > noisyLoad*float64(cores) {
		out = append(out, fmt.Sprintf("NOT QUIET: the load average was %s when the run began. Repeat it on an idle machine.", number(r.Host.Load)))
	}
	if r.Steal > noisySteal {
		out = append(out, fmt.Sprintf("NOT QUIET: the hypervisor gave %s %% of this machine to others during the run.", number(r.Steal)))
	}
	if r.Settings.Rounds < 3 || r.Settings.Seconds < 3 {
		out = append(out, "TOO SHORT for a verdict: use at least --rounds 3 --seconds 3, better 5 and 4.")
	}
	return out
}

// linkNotes are about two hosts on the links virtual and wire.
var linkNotes = []string{
	"Link virtual: super-packets of up to 64 KB cross the veth pair whole, so the kernel's vxlan never cuts a byte to frames. " +
		"That is its best case, and only the case between containers or virtual machines of one host.",
	"Link wire: every frame has the size of a real one, but cutting, merging and checksums are software on the same cores. " +
		"A real network card does them in hardware for raw and mostly for the kernel's vxlan, and spreads flows over queues and cores; " +
		"it adds interrupts, its own latency and a line rate. For bulk TCP the ratios on a real card should lie between the two links, " +
		"for small packets near link wire; this is reasoning, only a run between two hosts can tell.",
	"UDP is sent without pacing, so what counts is what arrives. Where cores are short a subject that drops early, before it has " +
		"paid for a packet, shows more than one that drops late.",
	"engines: CPU of both engine processes, the kernel's work for them included. machine: all busy CPU, the programs at both ends " +
		"included; the only cost that can be compared with the kernel's vxlan, which has no process.",
	"ping: from the sender's clock to the kernel's time stamp on the reply. Most of it is waking up threads on idle cores, " +
		"which differs a lot between machines and power settings.",
}

// rootlessNotes are about two containers of one machine.
var rootlessNotes = []string{
	"Link machine: two containers of one machine, each in a user and a network namespace of its own, with an MTU of 1500 bytes; iperf3 runs inside, " +
		"except for tweed-netstack, whose containers are programs of the machine behind tweed proxy -L and -R.",
	"pasta and slirp4netns connect containers to their machine, not to each other: the first container connects to the gateway's address, and the second one's " +
		"program forwards the port from the machine's loopback (-t, add_hostfwd). pasta-splice is pasta's shortcut for single ports of the loopback (-T): " +
		"connections are copied between sockets, no address of the other container is involved, and no packet has a size; it is shown for comparison, not judged.",
	"engines: CPU of the programs between the containers, the kernel's work for them included. machine: all busy CPU, iperf3 included.",
}
