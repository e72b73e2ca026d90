package node

import (
	"fmt"
	"os"
	"testing"

	"github.com/vishvananda/netlink"

	"tweed/netns"
)

// TestMain runs the tests as root of a user namespace when they are not
// started with the privileges that namespaces and routes need.
func TestMain(m *testing.M) {
	done, status, err := netns.Elevate()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		if os.Getenv("CI") != "true" {
			fmt.Fprintln(os.Stderr, "node: these tests need root or a user namespace; nothing was tested")
			status = 0
		}
	}
	if done {
		os.Exit(status)
	}
	if _, inside := netns.OutsideUID(); inside {
		// The test's etcd listens on the loopback of a new namespace.
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "loopback:", err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}
