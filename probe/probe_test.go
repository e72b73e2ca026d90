package probe

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"tweed/netns"
)

// The probes run in a namespace of their own, on its loopback.
func TestMain(m *testing.M) {
	done, status, err := netns.Elevate()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		if os.Getenv("CI") != "true" {
			fmt.Fprintln(os.Stderr, "probe: these tests need root or a user namespace; nothing was tested")
			status = 0
		}
	}
	if done {
		os.Exit(status)
	}
	os.Exit(m.Run())
}

var loopback, other = netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2")

func place(t *testing.T) *netns.Namespace {
	t.Helper()
	n, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func TestPing(t *testing.T) {
	n := place(t)
	for _, size := range []int{0, 1, 1400, 60000} {
		if _, err := Ping(t.Context(), n, loopback, other, size); err != nil {
			t.Error(err)
		}
	}
	if _, err := Ping(t.Context(), n, loopback, netip.MustParseAddr("192.0.2.1"), 8); err == nil {
		t.Error("an address without a route answered")
	}
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	// A cancelled context wins over, or loses against, an answer on loopback.
	if _, err := Ping(ctx, n, loopback, other, 8); err != nil && !errors.Is(err, cause) {
		t.Errorf("%v, want it to wrap %v", err, cause)
	}
}

func TestTransfer(t *testing.T) {
	n := place(t)
	for _, bytes := range []int{1, 5 << 20} {
		got, err := Transfer(t.Context(), n, n, loopback, other, bytes)
		if err != nil {
			t.Fatal(err)
		}
		if got.Bytes != bytes || got.Elapsed <= 0 || got.BitsPerSecond() <= 0 {
			t.Errorf("result %+v", got)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Transfer(ctx, n, n, loopback, other, 1); err == nil {
		t.Error("no error after cancel")
	}
	// Nobody routes between two namespaces.
	if _, err := Transfer(t.Context(), n, place(t), loopback, other, 1); err == nil {
		t.Error("no error between two separate namespaces")
	}
}

func TestDatagrams(t *testing.T) {
	n := place(t)
	if err := Datagrams(t.Context(), n, n, loopback, other, []int{1, 1500, 65507}); err != nil {
		t.Error(err)
	}
	if err := Datagrams(t.Context(), n, n, loopback, other, []int{65508}); err == nil || !strings.Contains(err.Error(), "size 65508") {
		t.Errorf("a datagram that cannot be: %v", err)
	}
}

func TestStreamOnACleanPathLosesNothing(t *testing.T) {
	n := place(t)
	s, err := StartStream(StreamConfig{From: n, To: n, Src: loopback, Dst: other, Rate: 20000, Size: 24})
	if err != nil {
		t.Fatal(err)
	}
	for s.Received() < 1000 {
		time.Sleep(time.Millisecond)
	}
	l := s.Stop()
	if err := l.Clean(); err != nil {
		t.Error(err)
	}
	if l.Received < 1000 || l.Received != l.Sent {
		t.Error(l)
	}
}

func TestStreamCountsLossOnABrokenPath(t *testing.T) {
	a, b := place(t), place(t)
	s, err := StartStream(StreamConfig{From: a, To: b, Src: loopback, Dst: other})
	if err != nil {
		t.Fatal(err)
	}
	for s.sent.Load() < 10 {
		time.Sleep(time.Millisecond)
	}
	if l := s.Stop(); l.Received != 0 || l.Missing != l.Sent || l.Clean() == nil {
		t.Error(l)
	}
}

func TestStreamBooksEveryKindOfArrival(t *testing.T) {
	n := place(t)
	in, err := listenUDP(n, loopback)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	var packets [][]byte
	s := &Stream{conf: StreamConfig{Size: 40}, seed: maphash.MakeSeed(), in: in, out: in}
	buf := make([]byte, 64)
	for seq := range uint64(4) {
		if err := s.write(make([]byte, 40), seq, kindData); err != nil {
			t.Fatal(err)
		}
		got, _, err := in.ReadFromUDPAddrPort(buf)
		if err != nil {
			t.Fatal(err)
		}
		packets = append(packets, append([]byte(nil), buf[:got]...))
	}
	altered := append([]byte(nil), packets[3]...)
	altered[20] ^= 1
	for _, p := range [][]byte{packets[0], packets[2], packets[1], packets[1], altered, packets[3][:10], nil} {
		s.count(p)
	}
	got := s.tally
	got.LongestGap = 0
	want := Ledger{Received: 3, Duplicated: 1, Reordered: 1, Corrupted: 3}
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestLedgerClean(t *testing.T) {
	for _, bad := range []Ledger{{}, {Sent: 2, Received: 1, Missing: 1}, {Sent: 1, Received: 1, Duplicated: 1}, {Sent: 1, Received: 1, Corrupted: 1}, {Sent: 1, Received: 1, Refused: 1}} {
		if bad.Clean() == nil {
			t.Errorf("%s passed", bad)
		}
	}
	if err := (Ledger{Sent: 1, Received: 1}).Clean(); err != nil {
		t.Error(err)
	}
}
