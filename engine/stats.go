package engine

import "tweed/tun"

// Stats is the sum over all workers.
type Stats struct {
	// Tx is the ledger from the TUN to the underlay, Rx the other way.
	Tx, Rx Direction
	// ICMPSent counts the ICMP errors written to the TUN, ICMPLimited those
	// the rate limit held back. They stand in no ledger.
	ICMPSent, ICMPLimited uint64
	// TxBatches and RxBatches count rounds of a worker; Tx.Packets/TxBatches
	// is the mean batch.
	TxBatches, RxBatches uint64
	// SocketDropped counts datagrams the kernel dropped because a receive
	// buffer was full, before the engine saw them.
	SocketDropped uint64
	// BypassTx and BypassRx are the part of Tx and Rx that a Bypass carried.
	BypassTx, BypassRx Direction
	// Workers is the number of transmit workers.
	Workers int
	// Offload is the rung in use on the TUN device, OffloadReason why.
	Offload       tun.Offload
	OffloadReason string
	// Observed says that a capture, the flight recorder or a replay is active.
	Observed bool
	// SendSegmented and ReceiveMerged say whether the sockets use UDP_SEGMENT
	// and UDP_GRO.
	SendSegmented, ReceiveMerged bool
}

// Stats returns the counters. Each direction's ledger adds up in itself.
func (e *Engine) Stats() Stats {
	e.apply.Lock()
	defer e.apply.Unlock()
	s := Stats{
		Observed:      e.observed.Load(),
		Workers:       len(e.tx),
		Offload:       e.cfg.Offload,
		OffloadReason: "no device of the host's own",
	}
	if d := e.cfg.Device; d != nil {
		s.Offload, s.OffloadReason = d.Offload(), d.OffloadReason()
	}
	for _, w := range e.tx {
		d := w.ledger.read()
		s.Tx.add(&d)
		s.ICMPSent += w.icmp.sent.Load()
		s.ICMPLimited += w.icmp.limited.Load()
		s.TxBatches += w.busy.batches()
		s.SendSegmented = true
		for _, o := range w.outs {
			gso, _ := o.sock.Offloads()
			s.SendSegmented = s.SendSegmented && gso
		}
	}
	for _, w := range e.rx {
		d := w.ledger.read()
		s.Rx.add(&d)
		s.RxBatches += w.busy.batches()
		if w.sock != nil {
			s.SocketDropped += w.sock.Dropped()
			_, s.ReceiveMerged = w.sock.Offloads()
		}
	}
	s.BypassTx, s.BypassRx = e.bypassed[0], e.bypassed[1]
	if e.bypass != nil {
		tx, rx := e.bypass.Traffic()
		s.BypassTx.add(&tx)
		s.BypassRx.add(&rx)
	}
	s.Tx.add(&s.BypassTx)
	s.Rx.add(&s.BypassRx)
	return s
}
