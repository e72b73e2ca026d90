package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"tweed/cmd/internal/daemon"
	"tweed/node"
	"tweed/tun"
)

const doctorLong = `doctor looks at this host, and at the engine if one runs, and says one line for
each thing that overlays fail by: ok, warn or fail, and what to type next.

With an engine it asks that one about etcd, and sends an echo request to each peer
through the overlay. Without one it tries what tweed up would need: it reads the
network config from etcd, chooses the underlay interface and looks whether the
UDP ports are free. It changes nothing.

Exit status: 0 when nothing failed (warnings included), 1 when something did.`

// checkState is the result of one check.
type checkState string

const (
	checkOK   checkState = "ok"
	checkWarn checkState = "warn" // works, but not for everything or not as well
	checkFail checkState = "fail" // the overlay does not work
)

// check is one line of doctor.
type check struct {
	Name  string     `json:"name"`
	State checkState `json:"state"`
	Text  string     `json:"text"`
	// Next is what to type; a hint in words where there is no one command.
	Next string `json:"next,omitempty"`
}

// doctorAnswer is what -o json prints. State is the worst of the checks.
type doctorAnswer struct {
	Schema int        `json:"schema"`
	State  checkState `json:"state"`
	Checks []check    `json:"checks"`
}

func newDoctorCommand() *cobra.Command {
	var c client
	d := doctor{}
	cmd := &cobra.Command{
		Use: "doctor", Short: "Check this host and its engine, and say what to type next",
		Long: doctorLong, GroupID: groupLook, Args: noArgs,
		Example: `  tweed doctor
  tweed doctor --etcd-endpoints http://10.0.0.5:2379 --iface eth1
  tweed doctor -o json`,
	}
	c.registerEngine(cmd)
	d.etcd.register(cmd) // with -o
	cmd.Flags().StringArrayVar(&d.iface, "iface", nil, "without an engine: look at this underlay interface, a `name` or an address")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		f, err := d.gather(cmd, &c)
		if err != nil {
			return err
		}
		a := diagnose(f)
		if err := d.etcd.print(cmd.OutOrStdout(), a, a.table); err != nil {
			return err
		}
		if a.State == checkFail {
			return exitStatus(exitFailed)
		}
		return nil
	}
	return cmd
}

// table prints one line per check.
func (a doctorAnswer) table(w io.Writer) {
	for _, c := range a.Checks {
		line := fmt.Sprintf("%-4s  %-15s  %s", c.State, c.Name, c.Text)
		if c.Next != "" {
			line += "; type: " + c.Next
		}
		fmt.Fprintln(w, line)
	}
}

// findings are the checks so far.
type findings []check

func (l *findings) ok(name, format string, args ...any) { l.add(checkOK, name, "", format, args...) }

func (l *findings) add(s checkState, name, next, format string, args ...any) {
	text := strings.Join(strings.Fields(fmt.Sprintf(format, args...)), " ")
	*l = append(*l, check{Name: name, State: s, Text: hideURLs(text), Next: hideURLs(next)})
}

// diagnose judges what was found. It reads nothing but its argument.
func diagnose(f facts) doctorAnswer {
	var l findings
	f.checkEngine(&l)
	f.checkClock(&l)
	f.checkTUN(&l)
	f.checkNamespaces(&l)
	f.checkEtcd(&l)
	f.checkUnderlay(&l)
	f.checkPorts(&l)
	f.checkForwarding(&l)
	f.checkDevice(&l)
	f.checkPeers(&l)
	a := doctorAnswer{Schema: node.Schema, State: checkOK, Checks: l}
	for _, c := range l {
		if c.State == checkFail || c.State == checkWarn && a.State == checkOK {
			a.State = c.State
		}
	}
	return a
}

// hostIsNode says that the host itself is, or would be, part of the overlay.
func (f *facts) hostIsNode() bool {
	if f.status != nil {
		return !f.status.Device.AttachOnly
	}
	return f.privileged
}

func (f *facts) checkEngine(l *findings) {
	s := f.status
	if s == nil {
		next := "tweed up"
		if !f.privileged {
			next = "tweed up --attach-only"
		}
		if f.named {
			l.add(checkFail, "engine", next, "%s", daemon.ErrorLine(f.noEngine))
		} else {
			l.add(checkWarn, "engine", next, "none runs; what one would need is looked at")
		}
		return
	}
	if !s.Ready {
		l.add(checkFail, "engine", "tweed status", "pid %d, %s, does not forward", s.PID, s.Phase)
	} else {
		l.ok("engine", "pid %d, %s, forwards", s.PID, s.Phase)
	}
	if f.elsewhere {
		l.add(checkWarn, "namespace", fmt.Sprintf("nsenter -t %d -n tweed doctor", s.PID),
			"the engine is in another network namespace than this command, which looks at its own")
	}
	for _, p := range s.Problems {
		l.add(checkWarn, "problem", "", "%s", p)
	}
}

func (f *facts) checkClock(l *findings) {
	switch {
	case f.clockErr != nil:
		l.add(checkWarn, "clock", "", "not known: %v", f.clockErr)
	case !f.clockSynced:
		l.add(checkWarn, "clock", "timedatectl set-ntp true", "not synchronised, as the kernel says: the overlay does not mind, but captures and logs of several nodes cannot be compared")
	default:
		l.ok("clock", "synchronised")
	}
}

func (f *facts) checkTUN(l *findings) {
	v := f.tun
	switch {
	case v == nil:
		l.ok("tun", "/dev/net/tun opens")
	case f.status != nil && f.hostIsNode() && f.status.Device.Name != "":
		l.ok("tun", "the engine has its device; for others: %s", v.Why)
	case f.hostIsNode():
		l.add(checkFail, "tun", v.Fix, "%s: tweed up needs it", v.Why)
	default:
		l.add(checkWarn, "tun", v.Fix, "%s: containers get tier veth instead of tun", v.Why)
	}
}

func (f *facts) checkNamespaces(l *findings) {
	if f.usernsErr != nil {
		l.add(checkWarn, "user namespaces", "tweed run --tier netstack -- COMMAND, which needs none", "%s", daemon.ErrorLine(f.usernsErr))
		return
	}
	l.ok("user namespaces", "can be made: tweed run and tweed demo work")
}

func (f *facts) checkEtcd(l *findings) {
	switch s := f.status; {
	case s != nil && s.Etcd.Connected:
		l.ok("etcd", "connected, %s, revision %d", strings.Join(s.Etcd.Endpoints, ","), s.Etcd.Revision)
	case s != nil:
		state := checkFail
		if s.Ready {
			state = checkWarn // the last good state goes on
		}
		why := s.Etcd.LastError
		if why == "" {
			why = "no answer yet"
		}
		l.add(state, "etcd", "etcdctl --endpoints "+strings.Join(s.Etcd.Endpoints, ",")+" endpoint health", "not connected: %s", why)
	case f.etcdErr != nil:
		l.add(checkFail, "etcd", f.etcdNext, "%s", daemon.ErrorLine(f.etcdErr))
	default:
		l.ok("etcd", "%s answers, network %s, backend %s", f.endpoints, f.network.Network, f.network.Backend.Type)
	}
}

func (f *facts) checkUnderlay(l *findings) {
	u := f.underlay
	switch {
	case f.underlayErr != nil:
		l.add(checkFail, "underlay", "ip -4 address", "%s", daemon.ErrorLine(f.underlayErr))
	case f.status != nil && f.status.Device.MTU > u.MTU:
		l.add(checkWarn, "underlay", "tweed up --mtu", "%s %s, MTU %d, less than the overlay's %d", u.Interface, addrText(u.Address), u.MTU, f.status.Device.MTU)
	default:
		l.ok("underlay", "%s %s, MTU %d (%s)", u.Interface, addrText(u.Address), u.MTU, u.Chosen)
	}
}

func (f *facts) checkPorts(l *findings) {
	if f.status != nil {
		var on []string
		for _, p := range f.status.Listen {
			on = append(on, p.Framing.String()+" "+p.Addr.String())
		}
		if on != nil {
			l.ok("ports", "the engine listens on UDP %s", strings.Join(on, ", "))
		} else {
			l.add(checkWarn, "ports", "tweed status", "the engine does not listen yet")
		}
		return
	}
	for _, p := range f.ports {
		if p.err != nil {
			l.add(checkFail, "ports", fmt.Sprintf("ss -uanp 'sport = %d'", p.port), "UDP port %d (%s) is not free: %v; a flannel or a kernel vxlan device may have it", p.port, p.framing, p.err)
		} else {
			l.ok("ports", "UDP port %d (%s) is free", p.port, p.framing)
		}
	}
}

func (f *facts) checkForwarding(l *findings) {
	if !f.hostIsNode() {
		l.ok("forwarding", "not needed: containers are attached to the engine itself")
		return
	}
	switch f.ipForward {
	case "1":
		l.ok("forwarding", "net.ipv4.ip_forward is 1")
	case "":
		l.add(checkWarn, "forwarding", "sysctl net.ipv4.ip_forward", "net.ipv4.ip_forward cannot be read")
	default:
		l.add(checkWarn, "forwarding", "sudo sysctl -w net.ipv4.ip_forward=1", "net.ipv4.ip_forward is %s: this host reaches the overlay, containers behind a bridge of it do not", f.ipForward)
	}
	rules := f.status != nil && f.status.Rules.Forward
	switch {
	case f.forwardErr != nil:
		l.add(checkWarn, "forward policy", "sudo tweed doctor", "not known: %v", f.forwardErr)
	case f.forwardPolicy == "ACCEPT":
		l.ok("forward policy", "ACCEPT")
	case rules:
		l.ok("forward policy", "%s, and the engine's rules accept the overlay", f.forwardPolicy)
	case f.status == nil:
		l.ok("forward policy", "%s; tweed up adds rules that accept the overlay", f.forwardPolicy)
	default:
		l.add(checkWarn, "forward policy", "tweed up --iptables-forward-rules=true", "%s, and the engine adds no rules: containers behind a bridge do not reach the overlay", f.forwardPolicy)
	}
}

func (f *facts) checkDevice(l *findings) {
	if f.status == nil || !f.status.Ready {
		return
	}
	d := f.status.Device
	switch {
	case d.AttachOnly:
		l.ok("offload", "of each container: tweed ps")
	case d.Offload == tun.OffloadFull.String():
		l.ok("offload", "%s: super-packets are kept whole", d.Offload)
	default:
		l.add(checkWarn, "offload", "tweed status", "%s: %s", d.Offload, orDash(d.OffloadReason))
	}
	if d.Accelerator != "" {
		text := d.Accelerator
		if d.AcceleratorReason != "" {
			text += ": " + d.AcceleratorReason
		}
		l.ok("accelerator", "%s", text)
	}
}

// maxSilent is how many peers are named that do not answer.
const maxSilent = 5

func (f *facts) checkPeers(l *findings) {
	if f.status == nil || !f.status.Ready {
		return
	}
	for _, p := range f.peers {
		if p.MTU > 0 && p.MTU < f.status.Device.MTU {
			l.add(checkWarn, "path", fmt.Sprintf("tweed up --mtu %d", p.MTU), "to %s: packets of %d bytes at most, the overlay's MTU is %d", peerName(p), p.MTU, f.status.Device.MTU)
		}
	}
	switch {
	case len(f.peers) == 0:
		l.add(checkWarn, "peers", "tweed leases", "none: no other node has a usable lease")
	case f.pingSkipped != "":
		l.ok("peers", "%s; not asked for an echo: %s", count(uint64(len(f.peers)), "peer"), f.pingSkipped)
	case len(f.silent) == 0:
		l.ok("peers", "all answer an echo through the overlay (%d)", len(f.peers))
	default:
		var names []string
		for _, p := range f.silent[:min(len(f.silent), maxSilent)] {
			names = append(names, peerName(p))
		}
		if more := len(f.silent) - len(names); more > 0 {
			names = append(names, fmt.Sprintf("%d more", more))
		}
		state := checkWarn
		if len(f.silent) == len(f.peers) {
			state = checkFail
		}
		first := f.silent[0].Subnet.Addr()
		l.add(state, "peers", fmt.Sprintf("tweed capture --outer host %s", first),
			"%d of %d do not answer an echo: %s (a node of tweed up --attach-only has no address that could)", len(f.silent), len(f.peers), strings.Join(names, ", "))
	}
}

func peerName(p node.PeerStatus) string {
	return strings.TrimSpace(p.Subnet.Addr().String() + " " + p.NodeName)
}
