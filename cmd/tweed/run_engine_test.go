package main

import (
	"testing"
	"time"
)

func TestEngineOfRunEndsWhenNobodyIsLeft(t *testing.T) {
	type look struct {
		after    time.Duration // since the start
		joined   bool
		attached int
		used     bool // something was attached before
		orphan   bool // the command that started it has gone
		over     bool
	}
	for name, looks := range map[string][]look{
		"waits for the overlay":                 {{after: idleTime}},
		"never joined":                          {{after: idleTime + 1, over: true}},
		"never joined, starter killed":          {{after: 1}, {after: 2, orphan: true, over: true}},
		"joined late, the time begins anew":     {{after: idleTime, joined: true}, {after: 2 * idleTime}, {after: 2*idleTime + 1, over: true}},
		"used by others than the starter":       {{after: 1, joined: true, attached: 2}, {after: 2, attached: 1, orphan: true}, {after: 3, orphan: true, over: true}},
		"used, the last one detached":           {{after: 1, joined: true, attached: 1}, {after: 10 * idleTime, attached: 1}, {after: 10*idleTime + 1, over: true}},
		"used for a moment only":                {{after: 1, joined: true}, {after: 2, used: true, over: true}},
		"containers taken back, no overlay yet": {{after: 1, attached: 1}, {after: 10 * idleTime, attached: 1, orphan: true}},
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			e := idleEngine{since: start}
			for _, l := range looks {
				now := start.Add(l.after)
				if l.joined {
					e.joins(now)
				}
				if over := e.over(now, l.attached, l.used, !l.orphan); over != l.over {
					t.Errorf("%+v: over %t", l, over)
				}
			}
		})
	}
}
