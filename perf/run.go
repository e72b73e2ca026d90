package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"tweed/netns"
)

// settle is the pause before each measurement, in which what the one before
// left in queues and sockets drains.
const settle = 200 * time.Millisecond

// bench is a run: its parameters, the processes and files it needs, and the
// report it fills.
type bench struct {
	opt      *options
	launcher *netns.Launcher
	// dir holds logs, keys and state until the run is over.
	dir string
	// tweed is the binary to measure, iperf3 the path of iperf3, etcd the host
	// and port of etcd, commit the revision tweed was built from.
	tweed, iperf3, etcd, commit string
	// logs and prefixes count what needs names of its own.
	logs, prefixes, captures int
	cleanup                  []func()
	progress                 io.Writer
	report                   *Report
}

// close ends what the run started and removes its files.
func (b *bench) close() {
	for _, f := range slices.Backward(b.cleanup) {
		f()
	}
	b.launcher.Close()
	os.RemoveAll(b.dir)
}

// sliceSeconds is how long a TCP or UDP load runs before it is the next subject's
// turn: machines change their speed within seconds, and so slow all subjects alike.
const sliceSeconds = 1

// slices is in how many turns the seconds of a load are taken.
func (o *options) slices(l load) int {
	if !l.usesIperf3() || l.captured {
		return 1
	}
	return o.seconds / sliceSeconds
}

// perSubject is about what bringing a subject up and down takes, for estimate.
const perSubject = 2 * time.Second

// estimate is about how long the run takes.
func (o *options) estimate() time.Duration {
	var once time.Duration
	for _, l := range o.loads {
		switch l.kind {
		case loadIdle:
			once += time.Duration(o.idle) * time.Second / time.Duration(len(o.subjects))
		case loadPing:
			once += time.Duration(o.pings)*pingInterval + settle
		default:
			once += time.Duration(o.seconds)*time.Second + time.Duration(o.slices(l))*2*settle
			if l.captured {
				once += time.Duration(o.seconds)*time.Second + 2*settle
			}
		}
	}
	all := (once + perSubject) * time.Duration(len(o.subjects)*len(o.links)*o.rounds)
	return all.Round(time.Second)
}

// run does all rounds. On an interrupt it returns the cause; the report then
// holds the rounds so far.
func (b *bench) run(ctx context.Context) error {
	fmt.Fprintf(b.progress, "%s, about %v\n", plural(b.opt.rounds, "round"), b.opt.estimate())
	for round := 1; round <= b.opt.rounds; round++ {
		for _, link := range b.opt.links {
			if err := b.round(ctx, round, link); err != nil {
				return err
			}
		}
	}
	return nil
}

// round brings every subject up on a pair of its own, lets all take turns at
// each load, and takes them down. Neighbours in time are then different
// subjects under one load, and a machine that drifts slows them all alike.
func (b *bench) round(ctx context.Context, round int, link string) error {
	var overlays []*overlay
	defer func() {
		for _, o := range overlays {
			o.down()
		}
	}()
	for _, s := range b.opt.subjects {
		if b.report.failed(s.name, link) {
			continue
		}
		o, err := b.bring(ctx, s, round, link)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			b.report.Failures = append(b.report.Failures, Failure{Round: round, Link: link, Subject: s.name, Error: err.Error()})
			fmt.Fprintf(b.progress, "%s left out on the %s link: %v\n", s.name, link, err)
			continue
		}
		overlays = append(overlays, o)
	}
	for i, l := range b.opt.loads {
		samples := make([]Sample, len(overlays))
		for j, o := range overlays {
			samples[j] = Sample{Round: round, Link: link, Subject: o.subject, Load: l.name}
		}
		var err error
		if l.kind == loadIdle {
			err = b.idle(ctx, l, overlays, samples)
		} else {
			err = b.turns(ctx, l, overlays, samples, round+i)
		}
		if err != nil {
			return err
		}
		b.report.Samples = append(b.report.Samples, samples...)
	}
	return nil
}

// turns measures one load on every subject, a slice at a time. The order is turned
// on by one each time, so that no subject always has the same neighbour.
func (b *bench) turns(ctx context.Context, l load, overlays []*overlay, samples []Sample, first int) error {
	slices := b.opt.slices(l)
	parts := make([][]map[string]float64, len(overlays))
	for turn := range slices {
		for i := range overlays {
			i = (i + first + turn) % len(overlays)
			if samples[i].Discarded != "" {
				continue
			}
			if err := sleep(ctx, settle); err != nil {
				return err
			}
			part := samples[i]
			b.measure(ctx, l, overlays[i], &part)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			samples[i].Discarded = part.Discarded
			parts[i] = append(parts[i], part.Values)
			if turn == slices-1 || part.Discarded != "" {
				samples[i].Values = joinSlices(parts[i], part.Discarded)
				b.say(l, &samples[i])
			}
		}
	}
	return nil
}

// joinSlices makes one sample's values of those of its slices: the mean, or the sum
// of what is counted. A sample that was discarded has none.
func joinSlices(parts []map[string]float64, discarded string) map[string]float64 {
	if discarded != "" || len(parts) == 1 {
		return parts[len(parts)-1]
	}
	all := map[string]float64{}
	for _, part := range parts {
		for metric, v := range part {
			if metric != metricRetransmits {
				v /= float64(len(parts))
			}
			all[metric] += v
		}
	}
	return all
}

// bring brings a subject up and checks that its far side answers.
func (b *bench) bring(ctx context.Context, s chosen, round int, link string) (*overlay, error) {
	p, err := b.newPair(link)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(b.dir, fmt.Sprintf("%s-%d-%s", link, round, s.name))
	if err := os.Mkdir(dir, 0o700); err != nil {
		p.close()
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*startLimit+answerLimit)
	defer cancel()
	o, err := s.up(ctx, b, p, dir)
	if err == nil && o.way == nil {
		err = reachable(ctx, o, answerLimit)
	}
	var mtu int
	if err == nil {
		mtu, err = o.mtu()
	}
	if err != nil {
		err = fmt.Errorf("%w%s", err, o.logs())
		o.down()
		return nil, err
	}
	b.report.setMTU(s.name, mtu)
	return o, nil
}

// measure runs one load on one subject and completes its sample.
func (b *bench) measure(ctx context.Context, l load, o *overlay, s *Sample) {
	values, err := b.tryMeasure(ctx, l, o)
	if errors.Is(err, errNoCapture) {
		return
	}
	if err != nil {
		s.Discarded = err.Error()
		return
	}
	s.Values = values
}

func (b *bench) tryMeasure(ctx context.Context, l load, o *overlay) (map[string]float64, error) {
	before, err := o.read()
	if err != nil {
		return nil, err
	}
	var t traffic
	if l.kind == loadPing {
		t.values, err = b.runPing(ctx, o)
		t.packets = float64(b.opt.pings) * (1 - pingLossLimit)
	} else if l.captured {
		t, err = b.runCaptured(ctx, l, o)
	} else {
		t, err = b.runIperf3(ctx, l, o, b.opt.seconds/b.opt.slices(l))
	}
	if err != nil {
		return nil, err
	}
	after, err := o.read()
	if err != nil {
		return nil, err
	}
	moved := after.since(before)
	if err := o.crossed(l, t, moved); err != nil {
		return nil, err
	}
	moved.costs(l, t, len(o.engines) > 0)
	return t.values, nil
}

// idle watches all engines at once while nothing is sent.
func (b *bench) idle(ctx context.Context, l load, overlays []*overlay, samples []Sample) error {
	if err := sleep(ctx, settle); err != nil {
		return err
	}
	began := time.Now()
	before := make([]reading, len(overlays))
	for i, o := range overlays {
		var err error
		if before[i], err = o.read(); err != nil {
			samples[i].Discarded = err.Error()
		}
	}
	if err := sleep(ctx, time.Duration(b.opt.idle)*time.Second); err != nil {
		return err
	}
	elapsed := time.Since(began)
	for i, o := range overlays {
		var err error
		if samples[i].Discarded == "" {
			samples[i].Values, err = o.idleValues(before[i], elapsed)
		}
		if err != nil {
			samples[i].Discarded = err.Error()
		}
		if len(o.engines) > 0 {
			b.say(l, &samples[i])
		}
	}
	return nil
}

// say prints one line about a sample.
func (b *bench) say(l load, s *Sample) {
	text := "discarded: " + s.Discarded
	if s.Discarded == "" {
		text = ""
		for _, row := range l.rows() {
			if v, ok := s.Values[row.Metric]; ok {
				text += fmt.Sprintf("  %s %s", number(v), row.Unit)
			}
		}
	}
	fmt.Fprintf(b.progress, "%d/%d %-8s %-14s %-16s%s\n", s.Round, b.opt.rounds, s.Link, l.name, s.Subject, text)
}

// failed tells the subjects that are left out on a link.
func (r *Report) failed(subject, link string) bool {
	return slices.ContainsFunc(r.Failures, func(f Failure) bool { return f.Subject == subject && f.Link == link })
}

func (r *Report) setMTU(subject string, mtu int) {
	for i := range r.Subjects {
		if r.Subjects[i].Name == subject {
			r.Subjects[i].MTU = mtu
		}
	}
}

// errInterrupted is the cause of a run that was stopped by a signal.
var errInterrupted = errors.New("interrupted")
