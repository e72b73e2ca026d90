package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestDemoUsage(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--nodes", "1"}, "--nodes 1: expected 2 to 16"},
		{[]string{"--nodes", "17"}, "--nodes 17: expected 2 to 16"},
		{[]string{"--nodes", "two"}, "--nodes"},
		{[]string{"--backend", "gre"}, `--backend "gre": expected udp, vxlan or both`},
		{[]string{"--loss", "60%"}, "--loss \"60%\": expected at most 50%"},
		{[]string{"--loss", "x"}, "--loss \"x\": expected a share"},
		{[]string{"--reorder", "2"}, "--reorder \"2\": expected a share"},
		{[]string{"--delay", "1s"}, "--delay 1s: expected 0s to 500ms"},
		{[]string{"--mtu", "100"}, "--mtu 100: expected 626 to 9216 bytes"},
		{[]string{"--mtu", "603", "--backend", "udp"}, "--mtu 603: expected 604 to 9216 bytes"},
		{[]string{"ssh"}, "expected a node such as n1"},
		{[]string{"ssh", "n1", "ls"}, "a command after --"},
		{[]string{"break", "n1"}, "expected one of --kill and --partition"},
		{[]string{"break", "n1", "--kill", "--partition"}, "expected one of --kill and --partition"},
		{[]string{"break", "n1", "--partition", "--backend", "udp"}, "the link is the same"},
		{[]string{"up"}, `unknown command "up"`},
		{[]string{"dwon"}, "did you mean: tweed demo down"},
		{[]string{"down", "now"}, `"now": expected no argument`},
	} {
		oneErrorLine(t, inProcess(append([]string{"demo"}, c.args...)...), exitUsage, c.want)
	}
}

func TestDemoDownWithNothingRunning(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	o := inProcess("demo", "down", "--run-dir", dir)
	if o.status != exitGood || !strings.Contains(o.stdout, "no demo is running") {
		t.Errorf("%+v", o)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("the run directory was made")
	}
}

func TestCommandsForAKeptDemoSayHowToKeepOne(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	for _, args := range [][]string{{"ssh", "n1"}, {"bench"}, {"break", "n1", "--kill"}, {"heal", "n1"}} {
		o := inProcess(append(append([]string{"demo"}, args...), "--run-dir", dir)...)
		oneErrorLine(t, o, exitFailed, "demo --keep --run-dir "+dir)
	}
}

func TestDemoRunDirectoryMustBeOurs(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	oneErrorLine(t, inProcess("demo", "down", "--run-dir", dir), exitFailed, "others cannot write")
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	oneErrorLine(t, inProcess("demo", "down", "--run-dir", link), exitFailed, link)
}

func TestDemoFolderLivesAsLongAsItsLock(t *testing.T) {
	base := filepath.Join(t.TempDir(), "run")
	running, err := newDemoDir(base, false)
	if err != nil {
		t.Fatal(err)
	}
	left, err := newDemoDir(base, false)
	if err != nil {
		t.Fatal(err)
	}
	left.lock.Close() // as a kill does
	third, err := newDemoDir(base, true)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{running.path: true, left.path: false, third.path: true} {
		if _, err := os.Stat(path); (err == nil) != want {
			t.Errorf("%s: there is %t, want %t", path, err == nil, want)
		}
	}
	var out bytes.Buffer
	if err := demoDown(context.Background(), base, &out); err != nil || strings.Count(out.String(), "left alone") != 2 {
		t.Errorf("down: %v, %s", err, &out)
	}
	for _, d := range []*demoDir{running, third} {
		if err := d.remove(); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(base); err == nil {
		t.Error("the run directory is still there")
	}
}

func TestDemoDownEndsWhatWasRecordedAndNothingElse(t *testing.T) {
	base := filepath.Join(t.TempDir(), "run")
	d, err := newDemoDir(base, true)
	if err != nil {
		t.Fatal(err)
	}
	sleeper := func() (*exec.Cmd, chan struct{}) {
		cmd := exec.Command("sleep", "600")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { cmd.Wait(); close(ended) }()
		t.Cleanup(func() { cmd.Process.Kill(); <-ended })
		return cmd, ended
	}
	recorded, ended := sleeper()
	other, otherEnded := sleeper()
	k, err := keep(&demoProcess{Name: "n1", cmd: recorded})
	if err != nil {
		t.Fatal(err)
	}
	// The pid of a process that has gone and was given to another one.
	reused := kept{Name: "n2", PID: other.Process.Pid, Start: 1}
	gone := kept{Name: "n3", PID: 1 << 22, Start: 1}
	if err := d.writeRecord(record{Processes: []kept{k, reused, gone}}); err != nil {
		t.Fatal(err)
	}
	if _, err := newDemoDir(base, true); err == nil || !strings.Contains(err.Error(), "demo down --run-dir "+base) {
		t.Errorf("a second kept demo: %v", err)
	}
	var out bytes.Buffer
	if err := demoDown(context.Background(), base, &out); err != nil || !strings.Contains(out.String(), "processes ended: 1") {
		t.Errorf("down: %v, %s", err, &out)
	}
	<-ended
	select {
	case <-otherEnded:
		t.Error("a process that only has the pid of a recorded one was ended")
	default:
	}
	d.lock.Close()
	if _, err := os.Stat(base); err == nil {
		t.Error("the run directory is still there")
	}
}

func TestDemoEnvironmentIsNotInherited(t *testing.T) {
	got := demoEnvironment([]string{"PATH=/bin", "TWEED_MTU=576", "NOTIFY_SOCKET=/run/x", "HOME=/root"})
	if strings.Join(got, " ") != "PATH=/bin HOME=/root" {
		t.Errorf("got %q", got)
	}
}

func TestDemoAdviceIsAligned(t *testing.T) {
	var out bytes.Buffer
	printer{&out}.next([][2]string{{"a", "one"}, {"longer", "two"}})
	if got, want := out.String(), "Next: a       # one\n      longer  # two\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
