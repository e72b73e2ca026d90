package impair

import (
	"math"
	"strings"
	"testing"
	"time"
)

func TestParseReadsWhatStringWrites(t *testing.T) {
	for text, want := range map[string]Spec{
		"":                     {},
		"loss=5%":              {Loss: 0.05},
		"loss=0.05,seed=9":     {Loss: 0.05, Seed: 9},
		"delay=20ms, loss=1%":  {Loss: 0.01, Delay: 20 * time.Millisecond},
		"reorder=100%,seed=18": {Reorder: 1, Seed: 18},
		"loss=0%,delay=0s":     {},
	} {
		got, err := Parse(text)
		if err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", text, got, err, want)
		}
		if !want.Active() {
			if got.String() != "none" {
				t.Errorf("%q is written %q", text, got)
			}
			continue
		}
		if again, err := Parse(got.String()); err != nil || again != want {
			t.Errorf("%q is written %q, which reads %+v, %v", text, got, again, err)
		}
	}
}

func TestParseSaysWhatIsWrong(t *testing.T) {
	for text, want := range map[string]string{
		"loss":            "expected a share",
		"loss=-1%":        "expected a share",
		"loss=101%":       "expected a share",
		"loss=NaN":        "expected a share",
		"reorder=2":       "expected a share",
		"delay=20":        "expected a time",
		"delay=-1ms":      "expected a time",
		"delay=11s":       "expected a time",
		"seed=-1":         "expected a number",
		"jitter=1":        "expected some of",
		"loss=1%,loss=2%": "given twice",
	} {
		if _, err := Parse(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want %q in it", text, err, want)
		}
	}
}

func TestOneSeedTreatsPacketsAlike(t *testing.T) {
	type fate struct {
		hold time.Duration
		lost bool
	}
	draw := func(s Spec, stream uint64) (all []fate, lost, late int) {
		d := NewDice(s, stream)
		for range 20000 {
			hold, l := d.Next()
			all = append(all, fate{hold, l})
			if l {
				lost++
			} else if hold > s.Delay {
				late++
			}
		}
		return
	}
	s := Spec{Loss: 0.1, Reorder: 0.25, Delay: time.Millisecond, Seed: 7}
	a, lost, late := draw(s, 0)
	b, _, _ := draw(s, 0)
	c, _, _ := draw(s, 1)
	s.Seed++
	e, _, _ := draw(s, 0)
	same := func(x, y []fate) bool {
		for i := range x {
			if x[i] != y[i] {
				return false
			}
		}
		return true
	}
	if !same(a, b) || same(a, c) || same(a, e) {
		t.Error("the fates of packets follow something else than seed and stream")
	}
	if math.Abs(float64(lost)-2000) > 300 || math.Abs(float64(late)-18000*0.25) > 500 {
		t.Errorf("of 20000 packets %d were lost and %d late, want about 2000 and 4500", lost, late)
	}
	// Another setting leaves the choice of the lost ones as it is.
	s.Seed, s.Reorder, s.Delay = 7, 0, 0
	f, _, _ := draw(s, 0)
	for i := range a {
		if a[i].lost != f[i].lost {
			t.Fatalf("packet %d is lost with one setting of delay and not with another", i)
		}
	}
}
