package main

import "slices"

// Goal is what is asked of a tweed subject for one figure: the floor has to be
// reached, the goal is what the work is for.
type Goal struct {
	link, load, metric string
	// toKernel means the figure's ratio to the kernel's vxlan is judged, not
	// the figure.
	toKernel bool
	// toNAT means the ratio to the better of pasta and slirp4netns.
	toNAT bool
	// but are subjects that are not judged.
	but         []string
	floor, goal float64
	// lower means the figure has to be at most floor or goal.
	lower bool
}

// goals are those this harness can measure; the cost of a table look-up and
// allocations per packet belong to `go test -bench`.
var goals = []Goal{
	{link: linkVirtual, load: "tcp1", metric: metricGbit, toKernel: true, floor: 0.33, goal: 0.50},
	{link: linkVirtual, load: "tcp4", metric: metricGbit, toKernel: true, floor: 0.33, goal: 0.50},
	{link: linkVirtual, load: "udp64", metric: metricDelivered, toKernel: true, floor: 1.25, goal: 2},
	{link: linkVirtual, load: "udp1300", metric: metricDelivered, toKernel: true, floor: 1, goal: 1.5},
	{link: linkWire, load: "tcp1", metric: metricGbit, toKernel: true, floor: 0.60, goal: 0.90},
	{link: linkWire, load: "tcp4", metric: metricGbit, toKernel: true, floor: 0.60, goal: 0.90},
	{link: linkWire, load: "udp64", metric: metricDelivered, toKernel: true, floor: 1.2, goal: 2},
	{link: linkWire, load: "udp1300", metric: metricDelivered, toKernel: true, floor: 1, goal: 1.5},
	{link: linkVirtual, load: "tcp1-captured", metric: metricCaptured, floor: 0.7, goal: 0.9},
	{link: linkVirtual, load: "ping", metric: metricPingAdded, floor: 120, goal: 30, lower: true},
	{link: linkVirtual, load: "idle", metric: metricRSS, floor: 64, goal: 32, lower: true},
	{link: linkVirtual, load: "idle", metric: metricIdle, floor: 0.5, goal: 0.1, lower: true},
	{link: linkMachine, load: "tcp1", metric: metricGbit, floor: 4, goal: 8, but: inProgram},
	{link: linkMachine, load: "tcp4", metric: metricGbit, floor: 4, goal: 8, but: inProgram},
	{link: linkMachine, load: "tcp1", metric: metricGbit, toNAT: true, floor: 5, goal: 10},
	{link: linkMachine, load: "tcp4", metric: metricGbit, toNAT: true, floor: 5, goal: 10},
}

// Verdicts of a Goal.
const (
	verdictGoal  = "goal met"
	verdictFloor = "floor met"
	verdictBelow = "BELOW FLOOR"
)

// judge compares a median with the goal.
func (g Goal) judge(v float64) string {
	reached := func(mark float64) bool {
		if g.lower {
			return v <= mark
		}
		return v >= mark
	}
	switch {
	case reached(g.goal):
		return verdictGoal
	case reached(g.floor):
		return verdictFloor
	}
	return verdictBelow
}

// judgement is a Goal applied to one subject.
type judgement struct {
	Goal
	subject, title string
	result         Spread
	verdict        string
}

// judgements apply every goal to every tweed subject that has the figure.
func (r *Report) judgements() []judgement {
	var out []judgement
	for _, g := range goals {
		for i := range r.Tables {
			row := r.Tables[i].row(g.load, g.metric)
			if r.Tables[i].Link != g.link || row == nil {
				continue
			}
			for _, s := range r.Subjects {
				cell, ok := row.Cells[s.Name]
				if !ok || !isTweed(s.Name) || (g.toKernel && cell.ToKernel == nil) || (g.toNAT && cell.ToNAT == nil) || slices.Contains(g.but, s.Name) {
					continue
				}
				j := judgement{Goal: g, subject: s.Name, title: row.Title + ", " + row.Unit, result: cell.Spread}
				if g.toKernel {
					j.title, j.result = row.Title+" / kernel vxlan", *cell.ToKernel
				}
				if g.toNAT {
					j.title, j.result = row.Title+" / better NAT", *cell.ToNAT
				}
				j.verdict = g.judge(j.result.Median)
				out = append(out, j)
			}
		}
	}
	return out
}
