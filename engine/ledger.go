package engine

import "sync/atomic"

// Direction is the ledger of one direction, in inner packets at their size on
// the underlay: a super-packet counts as the segments it stands for. At every
// moment
//
//	Packets == Delivered + the sum of Drops
type Direction struct {
	// Packets and Bytes were received: read from the TUN (transmit) or taken
	// from the socket (receive).
	Packets, Bytes uint64
	// Delivered and DeliveredBytes were handed to the socket or to the TUN.
	Delivered, DeliveredBytes uint64
	// Drops counts packets by reason.
	Drops [NumReasons]uint64
}

// Dropped returns the sum of Drops.
func (d *Direction) Dropped() uint64 {
	var n uint64
	for _, v := range d.Drops {
		n += v
	}
	return n
}

func (d *Direction) add(x *Direction) {
	d.Packets += x.Packets
	d.Bytes += x.Bytes
	d.Delivered += x.Delivered
	d.DeliveredBytes += x.DeliveredBytes
	for r, n := range x.Drops {
		d.Drops[r] += n
	}
}

// sub takes the counts of x, an earlier state of d, away.
func (d *Direction) sub(x *Direction) {
	d.Packets -= x.Packets
	d.Bytes -= x.Bytes
	d.Delivered -= x.Delivered
	d.DeliveredBytes -= x.DeliveredBytes
	for r, n := range x.Drops {
		d.Drops[r] -= n
	}
}

// tally is what a worker counts during one batch, and what it publishes after
// it, so that nobody ever sees a packet that is neither delivered nor dropped.
type tally struct {
	Direction
	dropped bool
}

func (t *tally) drop(r Reason, n uint64) {
	t.Drops[r] += n
	t.dropped = true
}

// ledger is the published sum of a worker's tallies. One worker writes it;
// anybody may read it.
type ledger struct {
	// seq is odd while a batch is being entered; a reader that sees it odd or
	// changed reads again.
	seq                       atomic.Uint64
	packets, bytes            atomic.Uint64
	delivered, deliveredBytes atomic.Uint64
	drops                     [NumReasons]atomic.Uint64
}

// publish enters the tally and empties it.
func (l *ledger) publish(t *tally) {
	l.seq.Add(1)
	l.packets.Store(l.packets.Load() + t.Packets)
	l.bytes.Store(l.bytes.Load() + t.Bytes)
	l.delivered.Store(l.delivered.Load() + t.Delivered)
	l.deliveredBytes.Store(l.deliveredBytes.Load() + t.DeliveredBytes)
	if t.dropped {
		for r, n := range t.Drops {
			if n > 0 {
				l.drops[r].Store(l.drops[r].Load() + n)
			}
		}
	}
	l.seq.Add(1)
	t.Packets, t.Bytes, t.Delivered, t.DeliveredBytes = 0, 0, 0, 0
	if t.dropped {
		clear(t.Drops[:])
		t.dropped = false
	}
}

func (l *ledger) read() Direction {
	for {
		s := l.seq.Load()
		d := Direction{
			Packets: l.packets.Load(), Bytes: l.bytes.Load(),
			Delivered: l.delivered.Load(), DeliveredBytes: l.deliveredBytes.Load(),
		}
		for r := range l.drops {
			d.Drops[r] = l.drops[r].Load()
		}
		if s&1 == 0 && l.seq.Load() == s {
			return d
		}
	}
}
