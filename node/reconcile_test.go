package node

import (
	"testing"
	"time"
)

func TestRetriesBecomeRareAndFollowChanges(t *testing.T) {
	var p retryPacer
	now := time.Unix(1e9, 0)
	tries := func(d time.Duration, changed bool) (n int) {
		for end := now.Add(d); now.Before(end); now = now.Add(10 * time.Second) {
			if p.due(now, changed) {
				n++
			}
		}
		return n
	}
	if n := tries(30*time.Second, false); n != 1 {
		t.Errorf("%d tries at the start", n)
	}
	if n := tries(24*time.Hour, false); n < 23 || n > 31 {
		t.Errorf("%d tries in a day", n)
	}
	if !p.due(now, true) {
		t.Error("a change is no reason")
	}
	if p.due(now.Add(time.Second), true) {
		t.Error("tried all the time")
	}
	if !p.due(now.Add(gsoRetryChange), true) {
		t.Error("a later change is no reason")
	}
}
