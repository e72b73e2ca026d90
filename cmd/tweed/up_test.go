package main

import (
	"os"
	"path/filepath"
	"testing"
)

// What is wrong with the machine rather than with the command line ends the
// start with status 1, and nothing was written.
func TestUpThatCannotStartLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	state, env := filepath.Join(dir, "state"), filepath.Join(dir, "run", "subnet.env")
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--iface", "no-such-if"}, "--iface no-such-if"},
		{[]string{"--iface-regex", "^no-such-if$"}, "--iface-regex ^no-such-if$"},
		{[]string{"--public-ip", "198.51.100.77"}, "--public-ip 198.51.100.77"},
	} {
		o := execute(t, nil, append([]string{"up", "--state-dir", state, "--subnet-file", env}, c.args...)...)
		oneErrorLine(t, o, exitFailed, c.want)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}
