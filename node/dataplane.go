package node

import (
	"net/netip"
	"sync"

	"tweed/engine"
	"tweed/engine/table"
)

// dataPlane guards the engine against readers on the API while it is replaced,
// and carries its counters across: a device that was deleted and made again
// must not make a counter go back.
type dataPlane struct {
	mu   sync.RWMutex
	eng  *engine.Engine
	past engine.Stats // sums of the engines before this one
}

// replace puts eng, which may be nil, in place and returns the one before,
// which no reader uses any more.
func (d *dataPlane) replace(eng *engine.Engine) *engine.Engine {
	d.mu.Lock()
	defer d.mu.Unlock()
	old := d.eng
	if old != nil {
		d.past = sumStats(d.past, old.Stats())
	}
	d.eng = eng
	return old
}

// stats are the counters since the node started.
func (d *dataPlane) stats() engine.Stats {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.eng == nil {
		return d.past
	}
	return sumStats(d.past, d.eng.Stats())
}

func (d *dataPlane) lookup(ip netip.Addr) (table.Peer, bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.eng == nil {
		return table.Peer{}, false
	}
	return d.eng.Lookup(ip)
}

// sumStats adds the counters of past to now, whose other fields stay.
func sumStats(past, now engine.Stats) engine.Stats {
	addDirection(&now.Tx, &past.Tx)
	addDirection(&now.Rx, &past.Rx)
	addDirection(&now.BypassTx, &past.BypassTx)
	addDirection(&now.BypassRx, &past.BypassRx)
	now.ICMPSent += past.ICMPSent
	now.ICMPLimited += past.ICMPLimited
	now.TxBatches += past.TxBatches
	now.RxBatches += past.RxBatches
	now.SocketDropped += past.SocketDropped
	return now
}

func addDirection(to, from *engine.Direction) {
	to.Packets += from.Packets
	to.Bytes += from.Bytes
	to.Delivered += from.Delivered
	to.DeliveredBytes += from.DeliveredBytes
	for r := range from.Drops {
		to.Drops[r] += from.Drops[r]
	}
}
