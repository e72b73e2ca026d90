package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestEveryClosedGateIsNamedWithWhatOpensIt goes through the hosts that keep
// ordinary users from user namespaces; most of them cannot be had in a test.
func TestEveryClosedGateIsNamedWithWhatOpensIt(t *testing.T) {
	for name, c := range map[string]struct {
		sysctls map[string]string
		err     error
		want    []string
		never   []string
	}{
		"hardened": {
			map[string]string{sysctlMaxUserNS: "0"}, unix.ENOSPC,
			[]string{"user.max_user_namespaces is 0", "sysctl -w user.max_user_namespaces=16384"}, nil,
		},
		"used up": {
			map[string]string{sysctlMaxUserNS: "15000"}, unix.ENOSPC,
			[]string{"is used up", "sysctl -w user.max_user_namespaces=16384"}, []string{"is 0"},
		},
		"nested too deeply": {nil, unix.EUSERS, []string{"nested too deeply"}, nil},
		"Debian's switch": {
			map[string]string{sysctlClone: "0"}, unix.EPERM,
			[]string{"kernel.unprivileged_userns_clone is 0", "sysctl -w kernel.unprivileged_userns_clone=1"}, []string{"seccomp", "AppArmor"},
		},
		"Debian's switch is on, in a container": {
			map[string]string{sysctlClone: "1"}, unix.EPERM, []string{"seccomp"}, []string{"sysctl", "AppArmor"},
		},
		"a container without that switch": {nil, unix.EPERM, []string{"--security-opt seccomp=unconfined"}, []string{"sysctl", "AppArmor"}},
		"Ubuntu refuses": {
			map[string]string{sysctlAppArmor: "1"}, unix.EACCES,
			[]string{"AppArmor", "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0", "/opt/tweed flags=(unconfined) { userns, }"}, []string{"seccomp"},
		},
		"Ubuntu lets it be made and withholds": {
			map[string]string{sysctlAppArmor: "1"}, os.ErrPermission, []string{"AppArmor restricts"}, []string{"seccomp"},
		},
		"another security module": {
			map[string]string{sysctlAppArmor: "0"}, unix.EACCES, []string{"SELinux", "/opt/tweed"}, []string{"sysctl"},
		},
		"no user namespaces at all": {nil, unix.EINVAL, []string{"CONFIG_USER_NS"}, []string{"sysctl"}},
		"an old kernel":             {nil, unix.ENOSYS, []string{"CONFIG_USER_NS"}, []string{"sysctl"}},
		"something else":            {nil, unix.ENOMEM, []string{"run as root"}, []string{"sysctl"}},
	} {
		t.Run(name, func(t *testing.T) {
			g := gates{t.TempDir(), "/opt/tweed"}
			for s, v := range c.sysctls {
				path := filepath.Join(g.sysctls, strings.ReplaceAll(s, ".", "/"))
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(v+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			err := g.explain(fmt.Errorf("fork/exec: %w", c.err))
			if !errors.Is(err, c.err) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%q: expected one line around %v", err, c.err)
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not say %q", err, w)
				}
			}
			for _, w := range c.never {
				if strings.Contains(err.Error(), w) {
					t.Errorf("%q says %q", err, w)
				}
			}
		})
	}
}
