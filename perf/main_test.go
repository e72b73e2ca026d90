package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"tweed/netns"
)

// noNamespaces is why namespaces cannot be made here, nil if they can.
var noNamespaces error

func TestMain(m *testing.M) {
	done, status, err := netns.Elevate()
	noNamespaces = err
	if err == nil && done {
		os.Exit(status)
	}
	if _, inside := netns.OutsideUID(); inside {
		// The namespace of our own that Elevate made has its loopback down.
		if lo, err := netlink.LinkByName("lo"); err != nil || netlink.LinkSetUp(lo) != nil {
			fmt.Fprintln(os.Stderr, "perf: loopback up:", err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// needNamespaces ends a test that cannot run, as a failure under CI=true.
func needNamespaces(t *testing.T) {
	t.Helper()
	switch {
	case noNamespaces == nil:
	case os.Getenv("CI") == "true":
		t.Fatalf("needs root or a user namespace: %v", noNamespaces)
	default:
		t.Skipf("needs root or a user namespace: %v", noNamespaces)
	}
}

func TestUsageErrorsHaveStatusTwo(t *testing.T) {
	var out, errs bytes.Buffer
	if status := mainStatus([]string{"--rounds", "0"}, &out, &errs); status != exitUsage {
		t.Errorf("status %d", status)
	}
	if got := errs.String(); !strings.HasPrefix(got, "perf: --rounds 0: expected") || strings.Count(got, "\n") != 1 {
		t.Errorf("%q", got)
	}
}

func TestModuleRootIsFound(t *testing.T) {
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(fmt.Sprintf("%s/perf/main.go", root)); err != nil {
		t.Error(err)
	}
}
