package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"tweed/netns"
)

// The built commands.
var tweedBin, flanneldBin string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	done, status, err := netns.Elevate()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return cannotRun("needs root or a user namespace")
	}
	if done {
		return status
	}
	dir, err := os.MkdirTemp("", "tweed-e2e-")
	if err != nil {
		return cannotRun(err.Error())
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/", "tweed/cmd/tweed", "tweed/cmd/flanneld")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "e2e: go build: %v\n%s", err, out)
		return 1
	}
	tweedBin, flanneldBin = filepath.Join(dir, "tweed"), filepath.Join(dir, "flanneld")
	return m.Run()
}

// cannotRun ends the package: with an error where everything must run, else
// with a line that says what was not tested.
func cannotRun(why string) int {
	fmt.Fprintln(os.Stderr, "e2e: nothing was tested:", why)
	if os.Getenv("CI") == "true" {
		return 1
	}
	return 0
}

// tunUsable reports whether tests can make TUN devices: root of a user namespace
// may be kept from the device node.
func tunUsable() bool {
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	f.Close()
	return true
}

// needTUN skips the test where no TUN device can be made, and fails it under
// CI=true.
func needTUN(t *testing.T) {
	t.Helper()
	if tunUsable() {
		return
	}
	const why = "needs /dev/net/tun, which may not be opened (as an ordinary user: sudo chmod 0666 /dev/net/tun)"
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// needTool skips the test when a program of the distribution is missing, and
// fails it under CI=true.
func needTool(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err == nil {
			continue
		}
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed", name)
		}
		t.Skipf("%s is not installed", name)
	}
}

func envInt(name string, otherwise int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return otherwise
}

func transferBytes() int { return envInt("TWEED_E2E_BYTES", 20<<20) }

func outage() time.Duration {
	if d, err := time.ParseDuration(os.Getenv("TWEED_E2E_OUTAGE")); err == nil {
		return d
	}
	return 6 * time.Second
}

// datagramSizes are the sizes around every boundary that matters and an even
// spread of the rest.
func datagramSizes() []int {
	count := envInt("TWEED_E2E_DATAGRAMS", 300)
	sizes := []int{1, 2, 3, 7, 8, 9, 60000}
	for _, mtu := range []int{576, 1280, 1426, 1450, 1472, 1500, 2 * 1426, 2 * 1450, 32768, 40000} {
		for d := -30; d <= 2; d += 2 {
			sizes = append(sizes, mtu+d)
		}
	}
	if count >= 60000 {
		sizes = nil
	}
	for i := 1; i <= count; i++ {
		sizes = append(sizes, max(1, i*60000/count))
	}
	return sizes
}

// run executes one of the built commands where the test runs and returns its
// exit status, standard output and standard error.
func run(t *testing.T, name string, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}
