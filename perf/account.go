package main

import (
	"errors"
	"fmt"
	"time"
)

const (
	// crossedShare of the payload, or of the packets, has to show in a counter.
	// It is below 1 because the sums of iperf3 and the counters are not read at
	// one instant.
	crossedShare = 0.95
	// frameLimit is the largest Ethernet frame of the underlay, in bytes.
	frameLimit = underlayMTU + 14
)

// reading is the state of one subject's counters at one moment.
type reading struct {
	machine machineCPU
	engines []cpuReading
	// dev are the counters of the subject's devices, link those of the underlay.
	dev, link [2]counters
}

// read reads all counters that concern the overlay.
func (o *overlay) read() (reading, error) {
	var r reading
	if err := o.running(); err != nil {
		return r, err
	}
	for side := range o.dev {
		var err error
		if o.dev[side] != "" {
			if r.dev[side], err = o.pair.deviceCounters(side, o.dev[side]); err != nil {
				return r, err
			}
		}
		if o.past != nil {
			c, err := o.past(side)
			if err != nil {
				return r, err
			}
			r.dev[side] = r.dev[side].plus(c)
		}
		if o.pair.link == linkMachine {
			continue
		}
		if r.link[side], err = o.pair.deviceCounters(side, underlayDev); err != nil {
			return r, err
		}
	}
	for _, e := range o.engines {
		c, err := readCPU(e.pid())
		if err != nil {
			return r, fmt.Errorf("%s: %w", e.name, err)
		}
		r.engines = append(r.engines, c)
	}
	var err error
	r.machine, err = readMachineCPU()
	return r, err
}

// spent is what happened between two readings.
type spent struct {
	engines   time.Duration
	machine   machineCPU
	dev, link [2]counters
}

func (r reading) since(earlier reading) spent {
	u := spent{machine: machineCPU{
		busy:   r.machine.busy - earlier.machine.busy,
		stolen: r.machine.stolen - earlier.machine.stolen,
		all:    r.machine.all - earlier.machine.all,
	}}
	for i := range r.engines {
		u.engines += r.engines[i].since(earlier.engines[i])
	}
	for side := range r.dev {
		u.dev[side] = r.dev[side].since(earlier.dev[side])
		u.link[side] = r.link[side].since(earlier.link[side])
	}
	return u
}

func (c counters) plus(d counters) counters {
	return counters{
		txPackets: c.txPackets + d.txPackets, txBytes: c.txBytes + d.txBytes,
		rxPackets: c.rxPackets + d.rxPackets, rxBytes: c.rxBytes + d.rxBytes,
	}
}

func (c counters) since(earlier counters) counters {
	return counters{
		txPackets: c.txPackets - earlier.txPackets, txBytes: c.txBytes - earlier.txBytes,
		rxPackets: c.rxPackets - earlier.rxPackets, rxBytes: c.rxBytes - earlier.rxBytes,
	}
}

// crossed returns an error unless the traffic really took the way it was meant
// to take: into the subject's device on the sending side, over the underlay,
// and out of the device on the receiving side. On a wire link it also checks
// that nothing larger than a frame crossed.
func (o *overlay) crossed(l load, t traffic, u spent) error {
	from, to := 0, 1
	if l.direction == reverse {
		from, to = 1, 0
	}
	got := counters{
		txPackets: u.dev[from].txPackets, txBytes: u.dev[from].txBytes,
		rxPackets: u.dev[to].rxPackets, rxBytes: u.dev[to].rxBytes,
	}
	wire := u.link[from].txBytes
	if l.direction == both {
		got.txBytes += u.dev[1].txBytes
		got.rxBytes += u.dev[0].rxBytes
		wire += u.link[1].txBytes
	}
	need, count := t.bytes, "bytes"
	if l.kind == loadPing {
		need, count = t.packets, "packets"
		got.txBytes, got.rxBytes, wire = got.txPackets, got.rxPackets, u.link[from].txPackets
	}
	for _, c := range []struct {
		skip bool
		what string
		n    float64
	}{
		{o.dev[from] == "", o.dev[from] + " of the sending side", got.txBytes},
		{o.pair.link == linkMachine, underlayDev + " of the sending side", wire},
		{o.dev[to] == "", o.dev[to] + " of the receiving side", got.rxBytes},
	} {
		if !c.skip && c.n < crossedShare*need {
			return fmt.Errorf("the traffic did not cross %s: %.0f %s there, %.0f arrived", c.what, c.n, count, need)
		}
	}
	if o.pair.link == linkWire {
		for side := range u.link {
			if c := u.link[side]; c.txPackets > 0 && c.txBytes/c.txPackets > frameLimit {
				return errors.New("super-packets crossed the wire link whole")
			}
		}
	}
	return nil
}

// costs adds what the traffic cost to its values.
func (u spent) costs(l load, t traffic, engines bool) {
	if u.machine.all > 0 {
		t.values[metricSteal] = 100 * float64(u.machine.stolen) / float64(u.machine.all)
	}
	var engine, machine string
	var amount float64
	switch l.kind {
	case loadTCP:
		engine, machine, amount = metricEngineGB, metricMachineGB, t.bytes/1e9
	case loadUDP:
		engine, machine, amount = metricEngineMpkt, metricMachineMpkt, t.packets/1e6
	default:
		return
	}
	t.values[machine] = u.machine.busy.Seconds() / amount
	if engines {
		t.values[engine] = u.engines.Seconds() / amount
	}
}

// idleValues are the memory of the engines and the CPU they used since before,
// of the larger and of the busier one. A subject without engines has none.
func (o *overlay) idleValues(before reading, elapsed time.Duration) (map[string]float64, error) {
	if len(o.engines) == 0 {
		return nil, nil
	}
	after, err := o.read()
	if err != nil {
		return nil, err
	}
	values := map[string]float64{}
	for i, e := range o.engines {
		rss, peak, err := readMemory(e.pid())
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e.name, err)
		}
		const mib = 1 << 20
		values[metricRSS] = max(values[metricRSS], rss/mib)
		values[metricPeakRSS] = max(values[metricPeakRSS], peak/mib)
		values[metricRSSBoth] += rss / mib
		busy := after.engines[i].since(before.engines[i])
		values[metricIdle] = max(values[metricIdle], 100*busy.Seconds()/elapsed.Seconds())
	}
	return values, nil
}
