package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files anew")

// example is a report with round figures that no machine ever gave.
func example(t *testing.T) *Report {
	t.Helper()
	loads, err := parseLoads("tcp1,udp64,ping,idle")
	if err != nil {
		t.Fatal(err)
	}
	r := &Report{
		Schema: reportSchema, Started: time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC), Elapsed: 60,
		Host:     Host{Kernel: "9.9.9-test", Arch: "amd64", CPU: "Imaginary(R) CPU <A&B>", Cores: 2, MemoryMiB: 1024, Virtual: true, Congestion: "cubic", Load: 2},
		Settings: Settings{Rounds: 3, Seconds: 4, Pings: 100, Links: []string{linkVirtual, linkWire}, Loads: []string{"tcp1", "udp64", "ping", "idle"}},
		Tools:    map[string]string{"iperf3": "iperf 0.0"},
		Subjects: []SubjectInfo{
			{subjectRaw, "veth, no overlay", 1500}, {subjectKernel, "the kernel's own", 1450},
			{"tweed-vxlan", "test, commit 0", 1450}, {"tweed-b-vxlan", "test|other", 1450}, {peerNebula, "gone", 0},
		},
		Failures: []Failure{{1, linkVirtual, peerNebula, "nebula ended:\n      level=error"}},
		Steal:    5,
	}
	speed := map[string]float64{subjectRaw: 40, subjectKernel: 20, "tweed-vxlan": 10, "tweed-b-vxlan": 12}
	for round := 1; round <= 3; round++ {
		for _, s := range r.Subjects[:4] {
			v := speed[s.Name] * float64(round)
			add := func(load string, values map[string]float64) {
				r.Samples = append(r.Samples, Sample{Round: round, Link: linkVirtual, Subject: s.Name, Load: load, Values: values})
			}
			add("tcp1", map[string]float64{metricGbit: v, metricMachineGB: 8 / v, metricEngineGB: 4 / v})
			add("udp64", map[string]float64{metricDelivered: 10 * v, metricMachineMpkt: 80 / v, metricEngineMpkt: 40 / v})
			add("ping", map[string]float64{metricPingAvg: 400 / v, metricPingP99: 900 / v})
			if isTweed(s.Name) {
				add("idle", map[string]float64{metricRSS: 30 + v/100, metricRSSBoth: 60, metricIdle: 0.2})
			}
		}
	}
	r.Samples = append(r.Samples,
		Sample{Round: 1, Link: linkWire, Subject: subjectRaw, Load: "tcp1", Values: map[string]float64{metricGbit: 7}},
		Sample{Round: 1, Link: linkWire, Subject: "tweed-vxlan", Load: "tcp1", Discarded: "the traffic did not cross tweed0"})
	r.summarise(loads)
	return r
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; look at it with `go test ./perf -update && git diff perf/testdata`\ngot:\n%s", name, got)
	}
}

func TestGoldenText(t *testing.T) {
	var b bytes.Buffer
	example(t).writeText(&b)
	golden(t, "report.txt", b.Bytes())
}

func TestGoldenMarkdown(t *testing.T) {
	var b bytes.Buffer
	example(t).writeMarkdown(&b, resultChart)
	golden(t, "report.md", b.Bytes())
}

func TestGoldenChart(t *testing.T) {
	var b bytes.Buffer
	example(t).writeChart(&b)
	golden(t, "chart.svg", b.Bytes())
	d := xml.NewDecoder(bytes.NewReader(b.Bytes()))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("not well-formed: %v", err)
		}
	}
}

func TestSaveWritesAllThree(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	r := example(t)
	if got, err := r.save(dir); err != nil || got != dir {
		t.Fatal(got, err)
	}
	for _, name := range []string{resultPage, resultChart} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, resultJSON))
	if err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(text, &back); err != nil || len(back.Samples) != len(r.Samples) || len(back.Tables) != 2 {
		t.Errorf("%d samples, %d tables, %v", len(back.Samples), len(back.Tables), err)
	}
	if want := "2001-02-03-0405-9.9.9-test-imaginary-cpu-a-b"; r.folder() != want {
		t.Errorf("folder %s, want %s", r.folder(), want)
	}
}

func TestVerdicts(t *testing.T) {
	higher, lower := Goal{floor: 1, goal: 2}, Goal{floor: 120, goal: 30, lower: true}
	for _, c := range []struct {
		g    Goal
		v    float64
		want string
	}{
		{higher, 2, verdictGoal}, {higher, 1.99, verdictFloor}, {higher, 0.99, verdictBelow},
		{lower, 30, verdictGoal}, {lower, 31, verdictFloor}, {lower, 121, verdictBelow},
	} {
		if got := c.g.judge(c.v); got != c.want {
			t.Errorf("%+v of %v: %s, want %s", c.g, c.v, got, c.want)
		}
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0", 0.0005: "0.001", 0.25: "0.250", 0.99951: "1.00", 9.994: "9.99", 9.996: "10.0", 99.94: "99.9", 99.96: "100", 12345.6: "12346", -3.14159: "-3.14",
	} {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %s, want %s", v, got, want)
		}
	}
}
