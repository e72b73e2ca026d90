package main

import (
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// programs puts empty programs of these names on an otherwise empty PATH.
func programs(t *testing.T, names ...string) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
}

func TestRootlessTakesEveryTierAndTheNATsThereAre(t *testing.T) {
	for _, c := range []struct {
		have []string
		want string
	}{
		{nil, "tweed-tun tweed-veth tweed-netstack"},
		{[]string{"slirp4netns"}, "tweed-tun tweed-veth tweed-netstack slirp4netns"},
		{[]string{"pasta", "slirp4netns"}, "tweed-tun tweed-veth tweed-netstack pasta pasta-splice slirp4netns"},
	} {
		programs(t, c.have...)
		o, err := parseOptions([]string{"--rootless"}, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, s := range o.subjects {
			names = append(names, s.name)
		}
		if got := strings.Join(names, " "); got != c.want {
			t.Errorf("with %q on PATH: %s, want %s", c.have, got, c.want)
		}
		if !slices.Equal(o.links, []string{linkMachine}) || o.loadList != rootlessLoads || !o.usesEtcd() {
			t.Errorf("links %q, loads %s", o.links, o.loadList)
		}
	}
}

func TestRootlessComparesTwoBinaries(t *testing.T) {
	programs(t, "old")
	o, err := parseOptions([]string{"--rootless", "--against", "old", "--subjects", "tweed-netstack"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if len(o.subjects) != 2 || twin(o.subjects[1].name) != o.subjects[0].name {
		t.Errorf("subjects %+v", o.subjects)
	}
}

func TestRootlessRefusesWhatItCannotMeasure(t *testing.T) {
	programs(t)
	for want, args := range map[string][]string{
		"--link":                {"--link", "wire"},
		"proxies carry no more": {"--loads", "udp64"},
		"not on PATH":           {"--subjects", "pasta"},
		"expected some of":      {"--subjects", "tweed-udp"},
		"looked for on PATH":    {"--peer", "pasta=/x"},
	} {
		if _, err := parseOptions(append([]string{"--rootless"}, args...), io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want %q in it", args, err, want)
		}
	}
	if _, err := parseOptions([]string{"--link", "machine"}, io.Discard); err == nil || !strings.Contains(err.Error(), "--rootless") {
		t.Errorf("--link machine: %v", err)
	}
}

func TestTweedIsComparedWithTheBetterNATOfEachRound(t *testing.T) {
	l, err := parseLoad("tcp1")
	if err != nil {
		t.Fatal(err)
	}
	r := &Report{Settings: Settings{Links: []string{linkMachine}}}
	for name, figures := range map[string][]float64{
		"tweed-tun": {10, 18}, subjectPasta: {1, 3}, subjectSlirp: {2, 1}, subjectSplice: {100, 100},
	} {
		r.Subjects = append(r.Subjects, SubjectInfo{Name: name})
		for i, v := range figures {
			r.Samples = append(r.Samples, Sample{Round: i + 1, Link: linkMachine, Subject: name, Load: l.name,
				Values: map[string]float64{metricGbit: v, metricEngineGB: v}})
		}
	}
	r.summarise([]load{l})
	ratio := func(metric string) *Spread { return r.Tables[0].row(l.name, metric).Cells["tweed-tun"].ToNAT }
	if s := ratio(metricGbit); s == nil || s.Min != 5 || s.Max != 6 {
		t.Errorf("throughput: %+v, want 10/2 and 18/3", s)
	}
	if s := ratio(metricEngineGB); s == nil || s.Min != 10 || s.Max != 18 {
		t.Errorf("cost: %+v, want 10/1 and 18/1", s)
	}
	if c := r.Tables[0].row(l.name, metricGbit).Cells[subjectPasta]; c.ToNAT != nil {
		t.Errorf("pasta is compared with itself: %+v", c)
	}
	var verdicts []string
	for _, j := range r.judgements() {
		verdicts = append(verdicts, j.title+": "+j.verdict)
	}
	want := []string{"TCP 1 flow, Gbit/s: " + verdictGoal, "TCP 1 flow / better NAT: " + verdictFloor}
	slices.Sort(verdicts)
	slices.Sort(want)
	if !slices.Equal(verdicts, want) {
		t.Errorf("verdicts %q, want %q", verdicts, want)
	}
}
