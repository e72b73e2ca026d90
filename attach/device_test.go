package attach

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestEveryWayToBeKeptFromTheDeviceIsTold: why tier tun is passed over, and what
// to type.
func TestEveryWayToBeKeptFromTheDeviceIsTold(t *testing.T) {
	closed := filepath.Join(t.TempDir(), "tun")
	if err := os.WriteFile(closed, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		path     string
		err      error
		why, fix string
	}{
		"mode 0600":     {closed, unix.EACCES, "may not be opened (its mode is 0600)", "sudo chmod 0666 " + closed},
		"mode unknown":  {"/no/such/tun", unix.EACCES, "may not be opened (its mode)", "sudo chmod 0666"},
		"no node":       {closed, unix.ENOENT, "there is no " + closed, "sudo modprobe tun"},
		"no driver":     {closed, unix.ENODEV, "there is no " + closed, "--device " + closed},
		"no driver yet": {closed, unix.ENXIO, "there is no " + closed, "sudo modprobe tun"},
		"device cgroup": {closed, unix.EPERM, "a container's device rule", "run the container with --device " + closed},
		"other":         {closed, unix.EMFILE, "too many open files", ""},
	} {
		var no *tierError
		if err := explainDevice(c.path, c.err); !errors.As(err, &no) {
			t.Errorf("%s: %v does not let another tier be tried", name, err)
			continue
		}
		if !strings.Contains(no.Error(), c.why) || !strings.Contains(no.fix, c.fix) || (c.fix == "") != (no.fix == "") {
			t.Errorf("%s: %q, type %q; want %q, type %q", name, no, no.fix, c.why, c.fix)
		}
	}
}
