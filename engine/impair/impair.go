// Package impair decides which packets a deliberately bad network loses, delays
// and lets others overtake. It is for tests of what runs over the overlay: the
// engine applies it to what a node sends, and one seed always treats the n-th
// packet alike. Nothing here is used by an engine without impairments.
package impair

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"
)

// ReorderHold is how much longer than the others a reordered packet is held
// back.
const ReorderHold = 5 * time.Millisecond

// MaxDelay bounds Spec.Delay.
const MaxDelay = 10 * time.Second

// Spec is what to do to packets. The zero value leaves them alone.
type Spec struct {
	// Loss and Reorder are probabilities from 0 to 1.
	Loss, Reorder float64
	// Delay is added to every packet.
	Delay time.Duration
	// Seed chooses the packets.
	Seed uint64
}

// Active reports whether packets are treated at all.
func (s Spec) Active() bool { return s.Loss > 0 || s.Reorder > 0 || s.Delay > 0 }

// Parse reads a comma separated list of loss=P, reorder=P, delay=D and seed=N,
// where P is a percentage (5%) or a fraction (0.05) and D a Go duration. Nothing
// is named twice.
func Parse(text string) (Spec, error) {
	var s Spec
	seen := map[string]bool{}
	for _, part := range strings.Split(text, ",") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		name, value, _ := strings.Cut(part, "=")
		var err error
		switch name {
		case "loss":
			s.Loss, err = ParseProbability(value)
		case "reorder":
			s.Reorder, err = ParseProbability(value)
		case "delay":
			s.Delay, err = time.ParseDuration(value)
			if err == nil && (s.Delay < 0 || s.Delay > MaxDelay) {
				err = errors.New("out of range")
			}
			if err != nil {
				err = fmt.Errorf("%q: expected a time from 0s to %s, such as 20ms", value, MaxDelay)
			}
		case "seed":
			s.Seed, err = strconv.ParseUint(value, 10, 64)
			if err != nil {
				err = fmt.Errorf("%q: expected a number from 0 to 2^64 - 1", value)
			}
		default:
			return Spec{}, fmt.Errorf("%q: expected some of loss=5%%, reorder=2%%, delay=20ms and seed=1, separated by commas", part)
		}
		if err == nil && seen[name] {
			err = errors.New("given twice")
		}
		if err != nil {
			return Spec{}, fmt.Errorf("%s: %w", name, err)
		}
		seen[name] = true
	}
	return s, nil
}

// ParseProbability reads 5%, 0.05 or 0.
func ParseProbability(text string) (float64, error) {
	number, percent := strings.CutSuffix(strings.TrimSpace(text), "%")
	p, err := strconv.ParseFloat(number, 64)
	if percent {
		p /= 100
	}
	if err != nil || !(p >= 0 && p <= 1) {
		return 0, fmt.Errorf("%q: expected a share from 0%% to 100%%, or from 0 to 1", text)
	}
	return p, nil
}

// String is in the form Parse reads.
func (s Spec) String() string {
	percent := func(p float64) string { return strconv.FormatFloat(p*100, 'g', 6, 64) + "%" }
	var parts []string
	if s.Loss > 0 {
		parts = append(parts, "loss="+percent(s.Loss))
	}
	if s.Delay > 0 {
		parts = append(parts, "delay="+s.Delay.String())
	}
	if s.Reorder > 0 {
		parts = append(parts, "reorder="+percent(s.Reorder))
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(append(parts, "seed="+strconv.FormatUint(s.Seed, 10)), ",")
}

// Dice draws the fate of one packet after the other. It belongs to one
// goroutine.
type Dice struct {
	spec Spec
	rng  *rand.Rand
}

// NewDice starts the sequence of a seed; streams that differ in number are
// independent of each other.
func NewDice(s Spec, stream uint64) *Dice {
	return &Dice{spec: s, rng: rand.New(rand.NewPCG(s.Seed, stream))}
}

// Next says whether the next packet is lost, and else how long it is held back.
func (d *Dice) Next() (hold time.Duration, lost bool) {
	// Two numbers for every packet, so that one setting does not move the
	// sequence of the other.
	loss, reorder := d.rng.Float64(), d.rng.Float64()
	hold = d.spec.Delay
	if reorder < d.spec.Reorder {
		hold += ReorderHold
	}
	return hold, loss < d.spec.Loss
}
