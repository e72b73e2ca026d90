package main

import (
	"maps"
	"testing"

	"pgregory.net/rapid"
)

func TestSpreadTakesTheMiddle(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want Spread
	}{
		{nil, Spread{}},
		{[]float64{7}, Spread{1, 7, 7, 7}},
		{[]float64{9, 1, 4}, Spread{3, 4, 1, 9}},
		{[]float64{8, 2, 4, 1}, Spread{4, 3, 1, 8}},
	} {
		if got := spread(c.in); got != c.want {
			t.Errorf("spread(%v) = %+v, want %+v", c.in, got, c.want)
		}
	}
}

func TestSpreadStaysInRangeAndKeepsItsInput(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := rapid.SliceOfN(rapid.Float64Range(-1e9, 1e9), 1, 20).Draw(t, "values")
		first := in[0]
		s := spread(in)
		if s.N != len(in) || s.Min > s.Median || s.Median > s.Max {
			t.Fatalf("spread(%v) = %+v", in, s)
		}
		if in[0] != first {
			t.Fatal("the input was reordered")
		}
		if q := quantile(in, 1); q != s.Max {
			t.Fatalf("quantile 1 = %v, want the maximum %v", q, s.Max)
		}
	})
}

func TestQuantileIsTheNearestRank(t *testing.T) {
	values := make([]float64, 500)
	for i := range values {
		values[i] = float64(500 - i)
	}
	for q, want := range map[float64]float64{0: 1, 0.5: 250, 0.99: 495, 1: 500} {
		if got := quantile(values, q); got != want {
			t.Errorf("quantile %v = %v, want %v", q, got, want)
		}
	}
	if got := quantile(nil, 0.5); got != 0 {
		t.Errorf("quantile of nothing = %v", got)
	}
}

// A machine that halves its speed between two rounds must not change a ratio.
func TestRatiosAreTakenWithinARound(t *testing.T) {
	subject := byRound{1: 10, 2: 5, 3: 4, 4: 9}
	base := byRound{1: 20, 2: 10, 3: 8, 5: 1}
	got := subject.over(base).spread()
	if want := (Spread{3, 0.5, 0.5, 0.5}); got != want {
		t.Errorf("ratio %+v, want %+v", got, want)
	}
	if got := subject.over(byRound{1: 0}); len(got) != 0 {
		t.Errorf("division by zero gave %v", got)
	}
	if got := subject.minus(base); got[1] != -10 || len(got) != 3 {
		t.Errorf("difference %v", got)
	}
}

func TestSlicesAreJoinedIntoOneSample(t *testing.T) {
	parts := []map[string]float64{
		{metricGbit: 10, metricRetransmits: 3, metricSteal: 1}, {metricGbit: 20, metricRetransmits: 0, metricSteal: 2}, {metricGbit: 30, metricRetransmits: 4, metricSteal: 0},
	}
	got := joinSlices(parts, "")
	if want := (map[string]float64{metricGbit: 20, metricRetransmits: 7, metricSteal: 1}); !maps.Equal(got, want) {
		t.Errorf("joined %v, want %v", got, want)
	}
	if got := joinSlices(parts[:1], ""); !maps.Equal(got, parts[0]) {
		t.Errorf("one slice became %v", got)
	}
	if got := joinSlices(append(parts, nil), "iperf3 said no"); got != nil {
		t.Errorf("a discarded sample has values: %v", got)
	}
}

// Only the loads of iperf3 run in slices, and all of their seconds are run.
func TestSecondsAreRunInSlices(t *testing.T) {
	o := options{seconds: 4}
	for name, want := range map[string]int{"tcp4": 4, "udp64": 4, "tcp1-captured": 1, "ping": 1, "idle": 1} {
		l, err := parseLoad(name)
		if err != nil {
			t.Fatal(err)
		}
		if got := o.slices(l); got != want {
			t.Errorf("%s in %d slices, want %d", name, got, want)
		}
	}
}
