package engine

import (
	"math"
	"time"

	"tweed/engine/table"
	"tweed/engine/tap"
)

// Bypass carries packets past the workers, inside the kernel. The workers see
// only what it does not take, and nothing while it is off duty. The engine
// calls it when the control plane acts, never for a packet.
type Bypass interface {
	// Retract is called before a snapshot comes into force: when it returns, no
	// packet is carried by an entry that the snapshot contradicts.
	Retract(local table.Local, peers []table.Peer)
	// Follow is called when the snapshot is in force.
	Follow(local table.Local, peers []table.Peer)
	// SetDuty says what may be carried. When it returns, nothing else is.
	SetDuty(Duty)
	// Observe makes it show every packet it carries, with the first snap bytes
	// behind the outer UDP header, until it is called with nil: then it returns
	// after the last packet has been shown or counted as missed. On an error
	// nothing is shown.
	Observe(o Observer, snap int) error
	// Traffic returns what was carried since the beginning. Each direction adds up.
	Traffic() (tx, rx Direction)
}

// Duty is what a Bypass may carry.
type Duty struct {
	Send, Receive bool
	// Why says why one of them is not allowed.
	Why string
}

// SourcePorts are the UDP source ports of what a worker sends.
type SourcePorts struct {
	UDP   uint16
	VXLAN [vxlanSources]uint16
}

// SourcePorts returns those of the first worker.
func (e *Engine) SourcePorts() SourcePorts {
	var p SourcePorts
	for i, o := range e.tx[0].outs {
		if i == 0 {
			p.UDP = o.port
		} else {
			p.VXLAN[i-1] = o.port
		}
	}
	return p
}

// SetBypass puts b, which may be nil, beside the workers. The engine does not
// own it: the caller closes it after Close.
func (e *Engine) SetBypass(b Bypass) {
	e.apply.Lock()
	defer e.apply.Unlock()
	if e.bypass != nil {
		e.watchBypass(nil)
		e.bypass.SetDuty(Duty{Why: "replaced"})
		tx, rx := e.bypass.Traffic()
		e.bypassed[0].add(&tx)
		e.bypassed[1].add(&rx)
	}
	e.bypass = b
	if b == nil {
		return
	}
	v := e.view.Load()
	e.watchBypass(e.tap.Load())
	e.setDuty(v)
	if v.table != nil {
		b.Follow(v.snapshot.Local, v.snapshot.Peers)
	}
}

// watchBypass makes the bypass put what it carries into the last ring of the
// set, or nowhere. One that cannot do that is taken off duty, so that no packet
// escapes a capture.
func (e *Engine) watchBypass(s *tap.Set) {
	if e.bypass == nil {
		return
	}
	e.blind = ""
	if s == nil {
		_ = e.bypass.Observe(nil, 0)
		return
	}
	last := len(s.Rings()) - 1
	ring := s.Ring(last)
	ring.SetHorizon(time.Now().UnixNano())
	if err := e.bypass.Observe(&observer{worker: last, ring: ring}, s.Snap); err != nil {
		ring.SetHorizon(math.MaxInt64)
		e.blind = "a capture needs every packet in the workers: " + err.Error()
		e.setDuty(e.view.Load())
	}
}

// setDuty tells the bypass what it may carry.
func (e *Engine) setDuty(v *view) {
	if e.bypass == nil {
		return
	}
	d := Duty{Send: true, Receive: true}
	switch {
	case e.blind != "":
		d = Duty{Why: e.blind}
	case v.ports != nil:
		// The programs do not know the ports: what is for one must be received here.
		d.Receive, d.Why = false, "containers are attached: what is received passes the workers"
	}
	e.bypass.SetDuty(d)
}
