package engine

import "golang.org/x/sys/unix"

// courtesy lowers the priority of the transmit thread while it drains a flood
// of small packets.
//
// A sender that is not paced fills the TUN faster than the node can carry the
// packets. Every one read here then takes processor time from the receiver at
// the far end of the pipeline when both share the processors, and is lost there
// after all the work; dropped at the TUN it costs nothing. Late stages should
// win. Where there are processors to spare, the priority decides nothing.
type courtesy struct {
	able bool
	low  bool
	run  int // consecutive rounds that speak for a change
	base int // nice value of the thread otherwise
}

const (
	// lowNice is a third of the default share. The lowest priority would hand
	// the whole node's traffic to any program that is busy beside us.
	lowNice = 5
	// floodRounds full rounds of small packets are a flood, calmRounds others
	// end it.
	floodRounds = 4
	calmRounds  = 16
)

// newCourtesy must be called on the thread it is for. A thread that could not
// take its priority back is never lowered.
func newCourtesy() courtesy {
	p, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		return courtesy{}
	}
	c := courtesy{base: 20 - p} // the system call counts from 40 down to 1
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NICE, &lim) == nil && lim.Cur >= uint64(p) {
		c.able = true
		return c
	}
	// Having CAP_SYS_NICE is not enough, it may be a user namespace's: try.
	c.able = unix.Setpriority(unix.PRIO_PROCESS, 0, c.base-1) == nil && unix.Setpriority(unix.PRIO_PROCESS, 0, c.base) == nil
	return c
}

// round takes note of a round.
func (c *courtesy) round(flood bool) {
	if !c.able {
		return
	}
	if flood == c.low {
		c.run = 0
		return
	}
	c.run++
	if c.run < floodRounds || c.low && c.run < calmRounds {
		return
	}
	c.run, c.low = 0, flood
	nice := c.base
	if flood {
		nice = max(lowNice, c.base)
	}
	// The calling thread only: Linux takes the thread id 0 for it.
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, nice)
}
