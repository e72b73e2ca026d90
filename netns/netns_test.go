package netns

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// helperMode makes the test binary act as a child program instead of running
// the tests.
const helperMode = "NETNS_TEST_HELPER"

func TestMain(m *testing.M) {
	if os.Getenv(helperMode) == "sleep" {
		// Until the end of our standard input, or a signal.
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
	done, status, err := Elevate()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		if os.Getenv("CI") != "true" && os.Getenv(helperMode) == "" {
			fmt.Fprintln(os.Stderr, "netns: these tests need root or a user namespace; nothing was tested")
			status = 0
		}
	}
	if done {
		os.Exit(status)
	}
	switch os.Getenv(helperMode) {
	case "inode":
		n, err := Current()
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		id, _ := n.ID()
		uid, inside := OutsideUID()
		fmt.Println(id, uid, inside)
		os.Exit(0)
	case "status":
		os.Exit(42)
	case "launch":
		launchSleeper()
	}
	os.Exit(m.Run())
}

const launched = "launched\n"

func launchSleeper() {
	n, err := New()
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	cmd := helper("sleep")
	cmd.Stdin, cmd.Stdout = os.Stdin, os.Stdout
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := NewLauncher().Start(n, cmd); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Print(launched)
	cmd.Wait()
}

func helper(mode string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helperMode+"="+mode)
	return cmd
}

func mustNew(t *testing.T) *Namespace {
	t.Helper()
	n, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func id(t *testing.T, n *Namespace) uint64 {
	t.Helper()
	v, err := n.ID()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func currentID(t *testing.T) uint64 {
	t.Helper()
	n, err := Current()
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	return id(t, n)
}

func TestDoRunsInsideAndLeavesTheCallerOutside(t *testing.T) {
	home := currentID(t)
	a, b := mustNew(t), mustNew(t)
	if id(t, a) == id(t, b) || id(t, a) == home {
		t.Fatalf("not three different namespaces: %d %d %d", home, id(t, a), id(t, b))
	}
	want := errors.New("from inside")
	err := a.Do(func() error {
		if got := currentID(t); got != id(t, a) {
			t.Errorf("inside Do: namespace %d, want %d", got, id(t, a))
		}
		return want
	})
	if err != want {
		t.Errorf("Do returned %v, want %v", err, want)
	}
	for range 50 {
		if got := currentID(t); got != home {
			t.Fatalf("after Do: namespace %d, want %d", got, home)
		}
		runtime.Gosched()
	}
}

func TestDoSurvivesAFunctionThatEndsItsGoroutine(t *testing.T) {
	if err := mustNew(t).Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("Do returned no error")
	}
}

func TestNewNamespaceHasItsLoopbackUpAndNothingElse(t *testing.T) {
	h, err := mustNew(t).Netlink()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		up := l.Attrs().Flags&net.FlagUp != 0
		// Tunnel drivers built into a kernel put a fallback device, down, in
		// every namespace.
		if up != (l.Attrs().Name == "lo") {
			t.Errorf("%s: up is %v", l.Attrs().Name, up)
		}
	}
}

func TestStartedProcessRunsInside(t *testing.T) {
	n := mustNew(t)
	l := NewLauncher()
	defer l.Close()
	for name, start := range map[string]func(*exec.Cmd) error{
		"Start":    n.Start,
		"Launcher": func(c *exec.Cmd) error { return l.Start(n, c) },
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			cmd := helper("inode")
			cmd.Stdout = &out
			if err := start(cmd); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err != nil {
				t.Fatalf("%v: %s", err, &out)
			}
			if got, want := strings.Fields(out.String())[0], fmt.Sprint(id(t, n)); got != want {
				t.Errorf("child's namespace %s, want %s", got, want)
			}
		})
	}
}

func TestStartRefusesPdeathsig(t *testing.T) {
	cmd := helper("sleep")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := mustNew(t).Start(cmd); err == nil {
		t.Error("no error")
	}
}

// TestLauncherChildrenEndWithTheProgram kills a program that has started
// another one through a Launcher; both hold the pipe, so that it ends when both
// have.
func TestLauncherChildrenEndWithTheProgram(t *testing.T) {
	cmd := helper("launch")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	r.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := io.ReadFull(r, make([]byte, len(launched))); err != nil {
		t.Fatal(err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	if _, err := io.ReadAll(r); err != nil {
		t.Errorf("the started process is still there: %v", err)
	}
}

func TestClosedLauncherStartsNothing(t *testing.T) {
	l := NewLauncher()
	l.Close()
	if err := l.Start(nil, helper("inode")); err == nil {
		t.Error("no error")
	}
}

func TestOpenRefusesWhatIsNoNetworkNamespace(t *testing.T) {
	for _, path := range []string{"/dev/null", "/proc/self/ns/mnt"} {
		if _, err := Open(path); !errors.Is(err, ErrNotNamespace) || !strings.Contains(err.Error(), path) {
			t.Errorf("Open(%s): %v, want ErrNotNamespace naming the path", path, err)
		}
	}
	if _, err := Open(t.TempDir() + "/gone"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Open of a missing path: %v", err)
	}
	n, err := OfProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	n.Close()
}

// TestAHelperThatCannotJoinSaysWhyHoweverFastItEnds: it reports before it has
// read what it was asked, and the kernel tells the reader of that first.
func TestAHelperThatCannotJoinSaysWhyHoweverFastItEnds(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	if err := errors.Join(unix.Send(pair[0], []byte("request"), 0), unix.Send(pair[1], []byte("report"), 0), unix.Close(pair[1])); err != nil {
		t.Fatal(err)
	}
	if b, _, err := receive(pair[0]); string(b) != "report" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if b, _, err := receive(pair[0]); err == nil {
		t.Errorf("after the end: %q", b)
	}
}

func TestPinOutlivesTheHandle(t *testing.T) {
	n, path := mustNew(t), filepath.Join(t.TempDir(), "ns")
	want := id(t, n)
	err := n.Pin(path)
	if _, inside := OutsideUID(); inside {
		if !errors.Is(err, unix.EPERM) {
			t.Errorf("Pin without a mount namespace of our own: %v, want EPERM", err)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Error("a failed Pin left its file behind")
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	n.Close()
	again, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if got := id(t, again); got != want {
		t.Errorf("pinned namespace %d, want %d", got, want)
	}
	if err := again.Pin(path); !errors.Is(err, os.ErrExist) {
		t.Errorf("second Pin at one path: %v, want ErrExist", err)
	}
	for range 2 {
		if err := Unpin(path); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Error("Unpin left the file")
	}
}

func TestLANJoinsItsNodes(t *testing.T) {
	lan, err := NewLAN(LANConfig{Nodes: 3, MTU: 1400})
	if err != nil {
		t.Fatal(err)
	}
	defer lan.Close()
	exchange(t, lan.Nodes[0], lan.Nodes[2], lan.Addr(2))
	exchange(t, lan.Nodes[1], lan.Switch, lan.Gateway)
	for i, n := range lan.Nodes {
		h, err := n.Netlink()
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		link, err := h.LinkByName(LANInterface)
		if err != nil {
			t.Fatal(err)
		}
		if link.Attrs().MTU != 1400 {
			t.Errorf("node %d: MTU %d, want 1400", i, link.Attrs().MTU)
		}
		routes, err := h.RouteList(nil, netlink.FAMILY_V4)
		if err != nil {
			t.Fatal(err)
		}
		if len(routes) != 1 || routes[0].Dst.String() != lan.Network().String() {
			t.Errorf("node %d: routes %v, want only %s", i, routes, lan.Network())
		}
	}
}

func TestLANCloseRemovesEveryLink(t *testing.T) {
	before := linkNames(t, nil)
	lan, err := NewLAN(LANConfig{Nodes: 2})
	if err != nil {
		t.Fatal(err)
	}
	// A second handle keeps the namespaces visible after Close.
	var kept []*Namespace
	for _, n := range append([]*Namespace{lan.Switch}, lan.Nodes...) {
		again, err := Open(fmt.Sprintf("/proc/self/fd/%d", n.File().Fd()))
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		kept = append(kept, again)
	}
	if got := linkNames(t, lan.Switch); !strings.Contains(got, "br0 n1 n2") {
		t.Errorf("links of the switch: %s", got)
	}
	for range 2 {
		if err := lan.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range kept {
		if got := linkNames(t, n); strings.Contains(got, "br0") || strings.Contains(got, "eth0") || strings.Contains(got, "n1") {
			t.Errorf("left behind: %s", got)
		}
	}
	if after := linkNames(t, nil); after != before {
		t.Errorf("links of the host changed from %q to %q", before, after)
	}
}

func TestNewLANRefusesNonsense(t *testing.T) {
	for _, c := range []LANConfig{
		{Nodes: 0}, {Nodes: 201},
		{Nodes: 1, Network: netip.MustParsePrefix("10.0.0.0/16")},
		{Nodes: 1, Network: netip.MustParsePrefix("fd00::/24")},
	} {
		if _, err := NewLAN(c); err == nil {
			t.Errorf("%+v: no error", c)
		}
	}
}

// TestElevateMakesAnOrdinaryUserRootInside runs the test binary as uid 65534.
func TestElevateMakesAnOrdinaryUserRootInside(t *testing.T) {
	if _, inside := OutsideUID(); inside {
		t.Log("this whole test run is the proof")
		return
	}
	dir, err := os.MkdirTemp("", "netns-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "program")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(path, program, 0o755)); err != nil {
		t.Fatal(err)
	}
	run := func(mode string) (string, *os.ProcessState) {
		cmd := helper(mode)
		cmd.Path, cmd.Dir = path, "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, _ := cmd.CombinedOutput()
		return string(out), cmd.ProcessState
	}
	out, state := run("inode")
	if _, closed := os.LookupEnv("CI"); !state.Success() && !closed {
		t.Skipf("user namespaces are closed to ordinary users here: %s", out)
	}
	if f := strings.Fields(out); len(f) != 3 || f[1] != "65534" || f[2] != "true" || f[0] == fmt.Sprint(currentID(t)) {
		t.Errorf("child said %q", out)
	}
	if out, state := run("status"); state.ExitCode() != 42 {
		t.Errorf("exit status %d (%s), want 42 passed through", state.ExitCode(), out)
	}
}

// exchange sends a line over TCP from one namespace to another.
func exchange(t *testing.T, from, to *Namespace, addr netip.Addr) {
	t.Helper()
	var l net.Listener
	err := to.Do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			io.WriteString(c, "hello")
			c.Close()
		}
	}()
	var c net.Conn
	err = from.Do(func() (err error) {
		c, err = net.Dial("tcp", l.Addr().String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, err := io.ReadAll(c); string(got) != "hello" {
		t.Errorf("read %q, %v", got, err)
	}
}

// linkNames lists the links of a namespace, nil for the program's own.
func linkNames(t *testing.T, n *Namespace) string {
	t.Helper()
	var err error
	if n == nil {
		if n, err = Current(); err != nil {
			t.Fatal(err)
		}
		defer n.Close()
	}
	h, err := n.Netlink()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range links {
		names = append(names, l.Attrs().Name)
	}
	return strings.Join(names, " ")
}
