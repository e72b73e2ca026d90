package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Metrics of a captured load.
const (
	// metricCaptured is what is left of the speed: with a capture of all points,
	// 128 bytes of each packet, to a file on the sending side, divided by
	// without, one right after the other.
	metricCaptured = "captured_share"
	// metricCaptureLost is the share of the packets the capture lost and
	// counted, in percent.
	metricCaptureLost = "capture_lost_percent"
)

// runCaptured measures a TCP load with and without a capture. Other subjects
// than tweed have no figure.
func (b *bench) runCaptured(ctx context.Context, l load, o *overlay) (traffic, error) {
	if o.capture == nil {
		return traffic{}, errNoCapture
	}
	b.captures++
	captureFirst := b.captures%2 == 0 // so that neither is always the warm one
	var plain, captured traffic
	var lost float64
	for i := range 2 {
		var err error
		if (i == 0) == captureFirst {
			captured, lost, err = b.withCapture(ctx, l, o)
		} else {
			plain, err = b.runIperf3(ctx, l, o, b.opt.seconds)
		}
		if err != nil {
			return traffic{}, err
		}
		if err := sleep(ctx, settle); err != nil {
			return traffic{}, err
		}
	}
	sum := traffic{bytes: plain.bytes + captured.bytes, packets: plain.packets + captured.packets, values: captured.values}
	sum.values[metricCaptured] = captured.values[metricGbit] / plain.values[metricGbit]
	sum.values[metricCaptureLost] = lost
	return sum, nil
}

// errNoCapture leaves a subject out of a load, without a complaint.
var errNoCapture = errors.New("no capture")

// withCapture runs the load while a capture writes a file.
func (b *bench) withCapture(ctx context.Context, l load, o *overlay) (traffic, float64, error) {
	file := filepath.Join(b.dir, fmt.Sprintf("captured-%d.pcapng", b.captures))
	defer os.Remove(file)
	args := append([]string{"capture", "--point", "all", "-s", "128", "-w", file}, o.capture[1:]...)
	p, err := b.start(o.pair.ns[0], "capture", o.capture[0], args...)
	if err != nil {
		return traffic{}, 0, err
	}
	defer p.stop(stopGrace)
	begun := func() error {
		if err := p.running(); err != nil {
			return &giveUp{err}
		}
		if text, err := os.ReadFile(p.log); err != nil || !strings.Contains(string(text), "capturing on") {
			return errors.New("the capture does not start")
		}
		return nil
	}
	if err := waitFor(ctx, 3*time.Second, begun); err != nil {
		return traffic{}, 0, err
	}
	t, err := b.runIperf3(ctx, l, o, b.opt.seconds)
	if err != nil {
		return t, 0, err
	}
	p.stop(stopGrace)
	text, err := os.ReadFile(p.log)
	if err != nil {
		return t, 0, err
	}
	lost, err := parseCaptureLoss(string(text))
	return t, lost, err
}

var captureLine = regexp.MustCompile(`(?m)^(\d+) packets? (received by filter|dropped by capture)$`)

// parseCaptureLoss returns the share of packets in percent that a capture lost,
// from what it printed.
func parseCaptureLoss(text string) (float64, error) {
	m := captureLine.FindAllStringSubmatch(text, -1)
	if len(m) != 2 {
		return 0, fmt.Errorf("the capture printed no summary: %s", lastLines(text, 4))
	}
	received, _ := strconv.ParseFloat(m[0][1], 64)
	dropped, _ := strconv.ParseFloat(m[1][1], 64)
	if received == 0 {
		return 0, errors.New("the capture saw no packet")
	}
	return 100 * dropped / received, nil
}
