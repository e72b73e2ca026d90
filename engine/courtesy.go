package engine

import (
	"golang.org/x/sys/unix"
)

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
}

const (
	lowNice = 19
	// floodRounds full rounds of small packets are a flood, calmRounds others
	// end it.
	floodRounds = 4
	calmRounds  = 16
)

// newCourtesy must be called on the thread it is for. Without the privilege to
// raise the priority again it is never lowered.
func newCourtesy() courtesy {
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NICE, &lim) == nil && lim.Cur >= 20 {
		return courtesy{able: true}
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&hdr, &data[0]) != nil {
		return courtesy{}
	}
	return courtesy{able: data[0].Effective&(1<<unix.CAP_SYS_NICE) != 0}
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
	nice := 0
	if flood {
		nice = lowNice
	}
	// The calling thread only: Linux takes the thread id 0 for it.
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, nice)
}
