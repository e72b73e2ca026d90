package main

import "slices"

// Spread is what the rounds gave for one figure.
type Spread struct {
	// N is the number of rounds that gave one.
	N      int     `json:"n"`
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// spread is the Spread of values; the zero Spread when there are none. The
// median of an even number of values is the mean of the middle two.
func spread(values []float64) Spread {
	if len(values) == 0 {
		return Spread{}
	}
	v := slices.Clone(values)
	slices.Sort(v)
	n := len(v)
	median := v[n/2]
	if n%2 == 0 {
		median = (v[n/2-1] + v[n/2]) / 2
	}
	return Spread{N: n, Median: median, Min: v[0], Max: v[n-1]}
}

// quantile is the smallest value that at least the share q (0 to 1) of values
// does not exceed (nearest rank); 0 when there are none.
func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return 0
	}
	v := slices.Clone(values)
	slices.Sort(v)
	rank := int(q*float64(len(v)) + 0.999999)
	return v[min(max(rank, 1), len(v))-1]
}

// mean is the arithmetic mean; 0 when there are no values.
func mean(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sum := 0.0
	for _, v := range values {
		sum += v
	}
	return sum / float64(len(values))
}

// byRound holds one figure for each round that gave one.
type byRound map[int]float64

func (b byRound) spread() Spread {
	values := make([]float64, 0, len(b))
	for _, v := range b {
		values = append(values, v)
	}
	return spread(values)
}

// over is b divided by base, round by round. The speed of a shared machine
// drifts from minute to minute, so only figures of one round are compared; the
// spread of the result then says how firm the ratio is.
func (b byRound) over(base byRound) byRound {
	out := byRound{}
	for round, v := range b {
		if d, ok := base[round]; ok && d != 0 {
			out[round] = v / d
		}
	}
	return out
}

// minus is b less base, round by round.
func (b byRound) minus(base byRound) byRound {
	out := byRound{}
	for round, v := range b {
		if d, ok := base[round]; ok {
			out[round] = v - d
		}
	}
	return out
}
