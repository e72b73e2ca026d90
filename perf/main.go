// Command perf measures tweed beside raw veth, the kernel's vxlan and other
// userspace overlays on one machine, and writes down what it found together
// with the machine. It needs root and iperf3; see --help.
//
// Words, used without exception: a subject is one way to carry packets (a
// column of the tables); a side is one of the two network namespaces, 0 and 1;
// a pair is two sides and the veth between them, one pair for each subject; a
// link is how the veth treats super-packets (virtual or wire); a load is one
// kind of traffic; a round runs every load on every subject; a sample is what
// one load on one subject gave in one round; an engine is a process of a subject
// that carries packets.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"tweed/netns"
)

// Exit statuses, as those of tweed; 130 is the shell's for Ctrl-C.
const (
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130
)

func main() {
	os.Exit(mainStatus(os.Args[1:], os.Stdout, os.Stderr))
}

// mainStatus is the program without the process around it. The status is 0 only
// when every subject came up and no sample was discarded.
func mainStatus(args []string, stdout, stderr io.Writer) int {
	opt, err := parseOptions(args, stderr)
	if errors.Is(err, errHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintln(stderr, "perf:", err)
		return exitUsage
	}
	if opt.rootless {
		done, status, err := netns.EnterUserNamespace()
		if err != nil {
			fmt.Fprintln(stderr, "perf:", err)
			return exitFailed
		}
		if done {
			return status
		}
	}
	if err := netns.CheckPrivileges(); err != nil {
		fmt.Fprintf(stderr, "perf: needs root to make network namespaces and devices (%v); type: sudo go run ./perf\n", err)
		return exitFailed
	}
	// SIGPIPE stands for a reader of the progress that has gone.
	signals, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGPIPE)
	defer stop()
	ctx, cancel := context.WithCancelCause(context.Background())
	context.AfterFunc(signals, func() {
		stop() // a second signal ends the program at once
		cancel(errInterrupted)
	})
	report, err := perf(ctx, opt, stdout, stderr)
	switch {
	case errors.Is(err, errInterrupted):
		fmt.Fprintln(stderr, "perf: interrupted; everything is taken down, nothing is written")
		return exitInterrupted
	case err != nil:
		fmt.Fprintln(stderr, "perf:", err)
		return exitFailed
	case len(report.Failures) > 0 || report.discarded() > 0:
		return exitFailed
	}
	return 0
}

// perf runs everything, prints the tables and writes the files.
func perf(ctx context.Context, opt *options, stdout, stderr io.Writer) (*Report, error) {
	b, err := prepare(ctx, opt, stderr)
	if err != nil {
		return nil, err
	}
	machine, err := readMachineCPU()
	if err == nil {
		err = b.run(ctx)
	}
	b.close()
	r := b.report
	r.Elapsed = time.Since(r.Started).Round(time.Second).Seconds()
	r.summarise(opt.loads)
	if err != nil {
		if len(r.Samples) > 0 {
			r.writeText(stdout)
		}
		return nil, err
	}
	if end, err := readMachineCPU(); err == nil && end.all > machine.all {
		r.Steal = 100 * float64(end.stolen-machine.stolen) / float64(end.all-machine.all)
	}
	r.writeText(stdout)
	if opt.out == outNone {
		return r, nil
	}
	dir, err := r.save(opt.out)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(stdout, "\nwritten to %s\n", dir)
	return r, nil
}

// prepare finds and builds the programs, and starts etcd.
func prepare(ctx context.Context, opt *options, progress io.Writer) (_ *bench, err error) {
	b := &bench{opt: opt, progress: progress, report: &Report{
		Schema: reportSchema, Started: time.Now(), Host: readHost(), Tools: map[string]string{},
		Settings: Settings{Rounds: opt.rounds, Seconds: opt.seconds, Pings: opt.pings, Links: opt.links},
	}}
	for _, l := range opt.loads {
		b.report.Settings.Loads = append(b.report.Settings.Loads, l.name)
	}
	if opt.usesIperf3() {
		var version string
		if b.iperf3, version, err = findIperf3(); err != nil {
			return nil, err
		}
		b.report.Tools["iperf3"] = version
	}
	if b.dir, err = os.MkdirTemp("", "tweed-perf-"); err != nil {
		return nil, err
	}
	b.launcher = netns.NewLauncher()
	defer func() {
		if err != nil {
			b.close()
		}
	}()
	if opt.usesEtcd() {
		if err := b.findTweed(ctx); err != nil {
			return nil, err
		}
		if err := b.startEtcd(ctx); err != nil {
			return nil, err
		}
	}
	for _, s := range opt.subjects {
		b.report.Subjects = append(b.report.Subjects, SubjectInfo{Name: s.name, Version: s.version(ctx, b)})
	}
	return b, nil
}

// findTweed takes the binary of --tweed or builds one from the module perf is
// in.
func (b *bench) findTweed(ctx context.Context) error {
	if b.opt.tweed != "" {
		b.tweed = b.opt.tweed
		return nil
	}
	root, err := moduleRoot()
	if err != nil {
		return fmt.Errorf("%w; or give a binary with --tweed PATH", err)
	}
	b.tweed = filepath.Join(b.dir, "tweed")
	fmt.Fprintln(b.progress, "building tweed")
	build := exec.CommandContext(ctx, "go", "build", "-o", b.tweed, "./cmd/tweed")
	build.Dir = root
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as the README says: one static file
	if out, err := build.CombinedOutput(); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("go build ./cmd/tweed: %w%s", err, lastLines(string(out), 10))
	}
	b.commit = gitCommit(root)
	return nil
}

// moduleRoot is the folder of the go.mod of module tweed, at or above the
// working folder.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		text, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && firstLine(string(text)) == "module tweed" {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("not inside the source of tweed: expected a go.mod with `module tweed` here or above")
		}
		dir = up
	}
}

// gitCommit is the short revision of a working tree, with +dirty when Go files
// differ from it; empty outside of git.
func gitCommit(root string) string {
	git := func(args ...string) string {
		out, err := exec.Command("git", append([]string{"-C", root}, args...)...).Output()
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(out))
	}
	commit := git("rev-parse", "--short=12", "HEAD")
	if commit != "" && git("status", "--porcelain", "--", "*.go", "go.mod") != "" {
		commit += "+dirty"
	}
	return commit
}
