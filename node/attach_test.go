package node

import (
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tweed/attach"
)

func testAttachments(t *testing.T) *attachments {
	t.Helper()
	a := newAttachments(t.TempDir(), slog.New(slog.NewTextHandler(io.Discard, nil)))
	t.Cleanup(a.close)
	return a
}

// hold puts an attachment into the list, which run reads beside the test.
func hold(a *attachments, t *attachment) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all[t.Name] = t
}

// letGo takes it out again.
func letGo(a *attachments, name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.all, name)
}

func TestAddressesAreGivenInTurnAndRestWhenReleased(t *testing.T) {
	a := testAttachments(t)
	subnet := netip.MustParsePrefix("10.1.2.0/29") // 2 to 6 are given away
	give := func(name string) netip.Addr {
		t.Helper()
		ip, err := a.pick(subnet, netip.Addr{})
		if err != nil {
			t.Fatal(err)
		}
		hold(a, &attachment{savedAttachment: savedAttachment{Name: name, Addr: ip}})
		return ip
	}
	for i, want := range []string{"10.1.2.2", "10.1.2.3", "10.1.2.4"} {
		if got := give(string(rune('a' + i))); got.String() != want {
			t.Errorf("address %d is %s, want %s", i, got, want)
		}
	}
	letGo(a, "b") // .3 was released and comes last
	for i, want := range []string{"10.1.2.5", "10.1.2.6", "10.1.2.3"} {
		if got := give(string(rune('d' + i))); got.String() != want {
			t.Errorf("after the release, address %d is %s, want %s", i, got, want)
		}
	}
	if ip, err := a.pick(subnet, netip.Addr{}); err == nil || !strings.Contains(err.Error(), "10.1.2.0/29") {
		t.Errorf("a full subnet gave %s, %v", ip, err)
	}
}

func TestAnAddressAskedForMustBeFreeAndOurs(t *testing.T) {
	a := testAttachments(t)
	subnet := netip.MustParsePrefix("10.1.2.0/24")
	hold(a, &attachment{savedAttachment: savedAttachment{Name: "x", Addr: netip.MustParseAddr("10.1.2.9")}})
	for _, c := range []struct {
		addr string
		want error
	}{
		{"10.1.2.0", errBadRequest}, {"10.1.2.1", errBadRequest}, {"10.1.2.255", errBadRequest}, {"10.1.3.7", errBadRequest},
		{"10.1.2.9", ErrAttached}, {"10.1.2.2", nil}, {"10.1.2.254", nil},
	} {
		if _, err := a.pick(subnet, netip.MustParseAddr(c.addr)); !errors.Is(err, c.want) {
			t.Errorf("%s: error %v, want %v", c.addr, err, c.want)
		}
	}
}

func TestRequestsThatCannotBeMeantAreRefused(t *testing.T) {
	for name, r := range map[string]AttachRequest{
		"expected exactly one": {},
		"exactly one of":       {PID: 1, Path: "x"},
		"name":                 {PID: 1, Name: "a/b"},
		"interface name":       {PID: 1, IfName: "tw%d"},
		"tier":                 {PID: 1, Tier: "tap"},
		"tweed proxy":          {PID: 1, Tier: "netstack"},
		"absolute path":        {Socket: "here"},
		"no interface":         {Socket: "/here", Tier: "veth"},
		"with a socket only":   {PID: 1, SuperPackets: true},
	} {
		if _, err := r.check(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%+v: error %v, want %q in it", r, err, name)
		}
	}
	r := AttachRequest{PID: 7}
	if tier, err := r.check(); err != nil || tier != attach.TierAuto || r.IfName != DefaultIfName {
		t.Errorf("a plain request: tier %s, interface %q, %v", tier, r.IfName, err)
	}
}

func TestAttachmentsAreReadBackAndDamageIsReported(t *testing.T) {
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	dir := t.TempDir()
	a := newAttachments(dir, log)
	web := savedAttachment{Name: "web", Addr: netip.MustParseAddr("10.1.2.3"), IfName: "eth1", Tier: attach.TierVeth, PID: 4711, Start: 12, Netns: 34}
	hold(a, &attachment{savedAttachment: web})
	hold(a, &attachment{savedAttachment: savedAttachment{Name: "proxy", Addr: netip.MustParseAddr("10.1.2.4"), Socket: "/s"}})
	a.save()
	a.close()

	b := newAttachments(dir, log)
	// The only one: a program attaches anew.
	if got := b.list(); len(got) != 1 || got[0].savedAttachment != web {
		t.Errorf("read back %+v, want %+v alone", got, web)
	}
	b.close()

	if err := os.WriteFile(filepath.Join(dir, attachmentsFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := newAttachments(dir, log)
	defer c.close()
	if _, problems := c.snapshot(); len(problems) != 1 || !strings.Contains(problems[0], attachmentsFile) {
		t.Errorf("problems after damage: %q", problems)
	}
}
