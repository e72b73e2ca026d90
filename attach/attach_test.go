package attach

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tweed/netns"
	"tweed/tun"
)

// asUser, set in the environment, is the uid the whole test binary runs again
// as, when it was started by root.
const asUser = "TWEED_TEST_UID"

func TestMain(m *testing.M) {
	if IsHelper() {
		os.Exit(HelperMain())
	}
	os.Exit(m.Run())
}

var testLink = Link{
	Name: "tweed0", Addr: netip.MustParseAddr("10.9.1.2"), Network: netip.MustParsePrefix("10.9.0.0/16"),
	MTU: 1426, GSOMaxSize: 60000, Offload: tun.OffloadAuto,
}

// container is a process in namespaces of its own that waits for its stdin.
type container struct {
	cmd   *exec.Cmd
	stdin *os.File
}

func startContainer(t *testing.T, keepID bool) *container {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c := &container{cmd: exec.Command("cat"), stdin: w}
	c.cmd.Stdin = r
	netns.Contain(c.cmd, keepID, false)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(netns.ExplainUserNamespace(err))
	}
	t.Cleanup(func() { c.end() })
	return c
}

func (c *container) pid() int { return c.cmd.Process.Pid }

func (c *container) end() {
	if c.stdin != nil {
		c.stdin.Close()
		c.stdin = nil
		c.cmd.Wait()
	}
}

func open(t *testing.T, c netns.TargetConfig) *netns.Target {
	t.Helper()
	target, err := netns.OpenTarget(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(target.Close)
	return target
}

// inside runs a shell command in the container and returns its output.
func inside(t *testing.T, c *container, command string) string {
	t.Helper()
	out, err := exec.Command("nsenter", "--preserve-credentials", "-U", "-n", "-t", fmt.Sprint(c.pid()), "sh", "-c", command).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

func TestEveryTierGivesAnInterfaceThatGoesWithItsDescriptor(t *testing.T) {
	for _, tier := range []Tier{TierTUN, TierVeth} {
		for _, keepID := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s keep-id=%t", tier, keepID), func(t *testing.T) {
				if tier == TierTUN && !deviceUsable() {
					t.Log("the tun tier is refused here; the error is what is tested")
				}
				c := startContainer(t, keepID)
				target := open(t, netns.TargetConfig{PID: c.pid()})
				made, err := Make(t.Context(), target, testLink, tier)
				if tier == TierTUN && !deviceUsable() {
					var refused *Error
					if !errors.As(err, &refused) || len(refused.Passed) != 1 || refused.Passed[0].Fix == "" {
						t.Fatalf("error %v: want the reason and the fix of one tier", err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				defer made.File.Close()
				if made.Tier != tier {
					t.Errorf("tier %s, want %s", made.Tier, tier)
				}
				if made.Queue.Offload == tun.OffloadNone {
					t.Errorf("no offload: %s", made.OffloadReason)
				}
				for _, want := range []string{"10.9.1.2/32", "mtu 1426", "LOWER_UP"} {
					if out := inside(t, c, "ip addr show dev tweed0"); !strings.Contains(out, want) {
						t.Errorf("%q is missing in: %s", want, out)
					}
				}
				if out := inside(t, c, "ip route get 10.9.7.7"); !strings.Contains(out, "dev tweed0 src 10.9.1.2") {
					t.Errorf("route: %s", out)
				}
				if out := inside(t, c, "cat /proc/sys/net/ipv4/ping_group_range"); strings.HasPrefix(out, "1\t0") {
					t.Errorf("pings are forbidden: %s", out)
				}
				made.File.Close()
				await(t, "the interface is removed", func() bool {
					return !strings.Contains(inside(t, c, "ip -o link"), "tweed0")
				})
			})
		}
	}
}

func deviceUsable() bool {
	f, err := os.OpenFile(cloneDevice, os.O_RDWR, 0)
	if err == nil {
		f.Close()
	}
	return err == nil
}

func await(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

// TestPacketsCrossTheVeth sends one datagram from inside and reads it on the
// packet socket, with the header in front.
func TestPacketsCrossTheVeth(t *testing.T) {
	c := startContainer(t, false)
	made, err := Make(t.Context(), open(t, netns.TargetConfig{PID: c.pid()}), testLink, TierVeth)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Dup(int(made.File.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	made.File.Close()
	q, err := tun.QueueFromFD(fd, made.Queue)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	b, err := tun.NewReadBatch()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Free()
	inside(t, c, "echo hello > /dev/udp/10.9.4.4/9 || bash -c 'echo hello > /dev/udp/10.9.4.4/9'")
	await(t, "the datagram is read", func() bool {
		if err := q.TryRead(b); err != nil {
			t.Fatal(err)
		}
		for i := range b.Packets() {
			ip := b.Bytes(&b.Packets()[i], 0)
			if ip[0] == 0x45 && netip.AddrFrom4([4]byte(ip[16:20])) == netip.MustParseAddr("10.9.4.4") {
				return true
			}
		}
		return false
	})
}

func TestTheBestTierIsTakenAndTheOthersSayWhy(t *testing.T) {
	c := startContainer(t, false)
	made, err := Make(t.Context(), open(t, netns.TargetConfig{PID: c.pid()}), testLink, TierAuto)
	if err != nil {
		t.Fatal(err)
	}
	defer made.File.Close()
	if deviceUsable() {
		if made.Tier != TierTUN || len(made.Passed) != 0 {
			t.Errorf("tier %s, passed over %v: want tun", made.Tier, made.Passed)
		}
		return
	}
	if made.Tier != TierVeth || len(made.Passed) != 1 || made.Passed[0].Fix == "" {
		t.Errorf("tier %s, passed over %v: want veth and the reason against tun", made.Tier, made.Passed)
	}
}

func TestAnInterfaceInTheWayIsNamed(t *testing.T) {
	c := startContainer(t, false)
	inside(t, c, "ip link add tweed0 type veth peer name other")
	for _, tier := range []Tier{TierTUN, TierVeth} {
		if tier == TierTUN && !deviceUsable() {
			continue
		}
		_, err := Make(t.Context(), open(t, netns.TargetConfig{PID: c.pid()}), testLink, tier)
		if err == nil || !strings.Contains(err.Error(), "--ifname") {
			t.Errorf("%s: error %v, want one that says --ifname", tier, err)
		}
	}
}

func TestARouteInTheWayLeavesNothingBehind(t *testing.T) {
	c := startContainer(t, false)
	inside(t, c, "ip link add d0 type veth peer name other && ip link set d0 up && ip route add 10.9.0.0/16 dev d0")
	_, err := Make(t.Context(), open(t, netns.TargetConfig{PID: c.pid()}), testLink, TierVeth)
	var refused *Error
	if !errors.As(err, &refused) || !strings.HasPrefix(refused.Stage, "route") {
		t.Fatalf("error %v, want stage route", err)
	}
	if out := inside(t, c, "ip -o link"); strings.Contains(out, "tweed0") {
		t.Errorf("left behind: %s", out)
	}
}

func TestTargetsThatCannotBeJoinedSayWhy(t *testing.T) {
	c := startContainer(t, false)
	gone := c.pid()
	c.end()
	plain := exec.Command("cat")
	plain.Stdin, _, _ = os.Pipe()
	if err := plain.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { plain.Process.Kill(); plain.Wait() }()
	for _, k := range []struct {
		name string
		c    netns.TargetConfig
		want string
	}{
		{"gone", netns.TargetConfig{PID: gone}, "no such process"},
		{"nonsense", netns.TargetConfig{PID: -4}, "positive"},
		{"our own namespace", netns.TargetConfig{PID: plain.Process.Pid}, "engine's own network namespace"},
		{"a file", netns.TargetConfig{Path: "/etc/passwd"}, "not a network namespace"},
		{"a missing name", netns.TargetConfig{Path: "no-such-name"}, "/run/netns/no-such-name"},
		{"another namespace", netns.TargetConfig{Path: "/proc/self/ns/mnt"}, "not a network namespace"},
	} {
		_, err := netns.OpenTarget(k.c)
		if err == nil || !strings.Contains(err.Error(), k.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: error %v, want one line with %q", k.name, err, k.want)
		}
	}
	if os.Getuid() != 0 {
		_, err := netns.OpenTarget(netns.TargetConfig{PID: 1})
		if err == nil || !strings.Contains(err.Error(), "belongs to uid 0") {
			t.Errorf("root's process: error %v", err)
		}
	}
}

func TestATargetIsWatched(t *testing.T) {
	c := startContainer(t, false)
	target := open(t, netns.TargetConfig{PID: c.pid()})
	over := make(chan error, 1)
	go func() { over <- target.Wait(t.Context()) }()
	select {
	case err := <-over:
		t.Fatalf("Wait returned %v while the target lives", err)
	case <-time.After(20 * time.Millisecond):
	}
	c.end()
	if err := <-over; err != nil {
		t.Errorf("Wait after the end: %v", err)
	}
	// A join after the end fails and says so; the open handles kept the
	// namespaces alive, so only a target opened anew is refused.
	if _, err := netns.OpenTarget(netns.TargetConfig{PID: c.pid()}); !errors.Is(err, netns.ErrGone) {
		t.Errorf("open after the end: %v", err)
	}
}

func TestClosingEndsWaiting(t *testing.T) {
	c := startContainer(t, false)
	target := open(t, netns.TargetConfig{PID: c.pid()})
	over := make(chan error, 1)
	go func() { over <- target.Wait(t.Context()) }()
	time.Sleep(5 * time.Millisecond)
	target.Close()
	if err := <-over; err == nil {
		t.Error("Wait returned nil although the target lives")
	}
}

// TestAsAnOrdinaryUser runs this package's tests again without root.
func TestAsAnOrdinaryUser(t *testing.T) {
	if os.Getuid() != 0 || os.Getenv(asUser) != "" {
		return // we are the ordinary user
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "tweed-attach-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	const uid = 54321
	copied := dir + "/attach.test"
	b, err := os.ReadFile(exe)
	if err == nil {
		err = errors.Join(os.WriteFile(copied, b, 0o755), os.Chmod(dir, 0o755))
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(copied, "-test.v", "-test.timeout=5m")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), asUser+"=54321", "HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("as uid %d: %v\n%s", uid, err, out)
	}
}

// TestNothingLeaks attaches again and again and compares descriptors and
// namespaces before and after.
func TestNothingLeaks(t *testing.T) {
	c := startContainer(t, false)
	attachOnce := func() {
		target, err := netns.OpenTarget(netns.TargetConfig{PID: c.pid()})
		if err != nil {
			t.Fatal(err)
		}
		defer target.Close()
		made, err := Make(t.Context(), target, testLink, TierVeth)
		if err != nil {
			t.Fatal(err)
		}
		made.File.Close()
	}
	attachOnce()
	before := descriptors(t)
	for range 20 {
		attachOnce()
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}
