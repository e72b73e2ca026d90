package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// reexec makes the test binary behave as the command, so that a test sees what
// a shell sees: the exit status, both streams, signals.
const reexec = "TWEED_TEST_REEXEC"

func TestMain(m *testing.M) {
	if os.Getenv(reexec) != "" {
		os.Unsetenv(reexec)
		main()
	}
	os.Exit(m.Run())
}

// command prepares the command in its own process, with a private place for
// what it might write and nothing of the tester's environment.
func command(t *testing.T, env []string, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, args...)
	dir := t.TempDir()
	cmd.Env = append([]string{
		reexec + "=1", "PATH=" + os.Getenv("PATH"), "HOME=" + dir, "TMPDIR=" + dir,
		"XDG_RUNTIME_DIR=" + dir, "XDG_STATE_HOME=" + dir,
	}, env...)
	return cmd
}

// outcome is what a shell sees of a finished command.
type outcome struct {
	status         int
	stdout, stderr string
}

func execute(t *testing.T, env []string, args ...string) outcome {
	t.Helper()
	cmd := command(t, env, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// inProcess runs a command line without a process of its own.
func inProcess(args ...string) outcome {
	var stdout, stderr bytes.Buffer
	status := run(context.Background(), args, &stdout, &stderr)
	return outcome{status, stdout.String(), stderr.String()}
}

// oneErrorLine checks the form every error has.
func oneErrorLine(t *testing.T, o outcome, status int, want string) {
	t.Helper()
	if o.status != status {
		t.Errorf("exit status %d, want %d (stderr: %s)", o.status, status, o.stderr)
	}
	if !strings.HasPrefix(o.stderr, "tweed: ") || strings.Count(o.stderr, "\n") != 1 || !strings.HasSuffix(o.stderr, "\n") {
		t.Errorf("stderr is not one line that starts with \"tweed: \": %q", o.stderr)
	}
	if !strings.Contains(o.stderr, want) {
		t.Errorf("stderr %q, want %q in it", o.stderr, want)
	}
	if o.stdout != "" {
		t.Errorf("stdout %q, want none", o.stdout)
	}
}
