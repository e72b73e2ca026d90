package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tweed/capture"
	"tweed/capture/filter"
	"tweed/encap"
	"tweed/engine/tap"
)

// taps is an engine with one worker.
type taps struct{ set chan *tap.Set }

func (taps) TapWorkers() int     { return 1 }
func (t taps) SetTap(s *tap.Set) { t.set <- s }

func withPeers(n *Node) {
	v := *n.view.Load()
	v.node = NodeStatus{Name: "n1", ID: "id1", PublicIP: netip.MustParseAddr("192.0.2.1")}
	v.listen = []ListenStatus{{Framing: encap.FramingVXLAN, Addr: netip.MustParseAddrPort("192.0.2.1:8472")}}
	v.table = &tableView{peers: []PeerStatus{
		{NodeName: "n2", NodeID: "id2", Subnet: netip.MustParsePrefix("10.1.2.0/24"), Endpoint: netip.MustParseAddrPort("192.0.2.2:8472"), Framing: encap.FramingVXLAN},
		{Subnet: netip.MustParsePrefix("10.1.3.0/24"), Endpoint: netip.MustParseAddrPort("192.0.2.3:8285")},
	}}
	n.view.Store(&v)
}

func TestCaptureStreamsUntilItIsEnded(t *testing.T) {
	path := filepath.Join(t.TempDir(), socketName)
	n := serveTestAPI(t, path)
	withPeers(n)
	src := taps{make(chan *tap.Set, 4)}
	n.captures.hub.SetSource(src)
	defer n.captures.hub.SetSource(nil)
	c := Dial(path)
	defer c.Close()
	s, err := c.Capture(t.Context(), CaptureRequest{Points: []string{"tun-in", "drop"}, Snap: 64, Filters: []string{"len > 10"}, Peers: []string{"n2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	h := s.Hello
	if h.Node != "n1" || h.Framing != "vxlan" || h.Ports[8285] != "udp" || h.Ports[8472] != "vxlan" || h.Peers["192.0.2.2"] != "n2" || h.Snap != 64 || h.Filter != "len > 10 and peer n2" {
		t.Errorf("%+v", h)
	}
	r := (<-src.set).Ring(0)
	for id := range uint64(5) {
		r.Put(&tap.Header{ID: id + 1, Points: tap.Of(tap.TunIn, tap.WireOut), Peer: 0xc0000202, Segments: 1}, make([]byte, 30), nil)
		r.Put(&tap.Header{ID: id + 1, Points: tap.Of(tap.TunIn, tap.WireOut), Peer: 0xc0000203, Segments: 1}, make([]byte, 30), nil)
	}
	r.Commit()
	var p capture.Packet
	if err := s.Next(&p); err != nil || p.Point != tap.TunIn || p.Peer.Addr() != netip.MustParseAddr("192.0.2.2") {
		t.Fatal(p, err)
	}
	if err := s.End(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		if err := s.Next(&p); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Next(&p); err != io.EOF || !s.Complete || s.Stats.Seen[tap.TunIn] != 10 || s.Stats.Matched[tap.TunIn] != 5 {
		t.Errorf("%v, complete %v, %+v", err, s.Complete, s.Stats)
	}
	if err := s.End(t.Context()); err == nil || !strings.Contains(err.Error(), "not running") {
		t.Errorf("end again: %v", err)
	}
	if set := <-src.set; set != nil {
		t.Error("the engine still captures")
	}
}

func TestCaptureEndsWithItsClientAndWithTheNode(t *testing.T) {
	path := filepath.Join(t.TempDir(), socketName)
	n := serveTestAPI(t, path)
	c := Dial(path)
	defer c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := c.Capture(ctx, CaptureRequest{}); err != nil {
		t.Fatal(err)
	}
	s, err := c.Capture(t.Context(), CaptureRequest{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	cancel()
	for n.captures.hub.Sessions() != 1 {
		time.Sleep(time.Millisecond)
	}
	read := make(chan error, 1)
	go func() {
		var p capture.Packet
		read <- s.Next(&p)
	}()
	n.captures.end()
	if err := <-read; err != io.EOF || !s.Complete {
		t.Errorf("%v, complete %v", err, s.Complete)
	}
}

func TestCaptureRefusesWhatIsWrong(t *testing.T) {
	path := filepath.Join(t.TempDir(), socketName)
	n := serveTestAPI(t, path)
	withPeers(n)
	c := Dial(path)
	defer c.Close()
	for _, k := range []struct {
		req  CaptureRequest
		want string
	}{
		{CaptureRequest{Points: []string{"tun"}}, "one of tun-in, wire-out"},
		{CaptureRequest{Snap: -1}, "snap length -1"},
		{CaptureRequest{Peers: []string{"n9"}}, `peer "n9": no such node (have: 192.0.2.3, n2)`},
		{CaptureRequest{Reasons: []string{"bad-luck"}}, "one of impaired, not-ipv4"},
	} {
		if _, err := c.Capture(t.Context(), k.req); err == nil || !strings.Contains(err.Error(), k.want) {
			t.Errorf("%+v: %v, expected %q", k.req, err, k.want)
		}
	}
	_, err := c.Capture(t.Context(), CaptureRequest{Filters: []string{"tcp prot 80"}})
	var bad *filter.Error
	if !errors.As(err, &bad) || bad.Column() != 5 || !strings.Contains(bad.Caret(), "\n    ^~~~") {
		t.Errorf("filter: %v", err)
	}
	if n.captures.hub.Sessions() != 0 {
		t.Error("a refused capture runs")
	}
}

func TestCaptureIsForAdminsOnly(t *testing.T) {
	n, err := New(Config{Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	for _, method := range []string{"POST /v1/capture", "DELETE /v1/capture/x"} {
		verb, path, _ := strings.Cut(method, " ")
		for _, cred := range []*unix.Ucred{nil, {Uid: 4711, Pid: 1}} {
			r := httptest.NewRequest(verb, path, strings.NewReader("{}"))
			if cred != nil {
				r = r.WithContext(context.WithValue(r.Context(), credKey{}, cred))
			}
			w := httptest.NewRecorder()
			n.apiHandler().ServeHTTP(w, r)
			var e apiError
			if w.Code != http.StatusForbidden || json.Unmarshal(w.Body.Bytes(), &e) != nil || !strings.Contains(e.Error, "only root and uid") {
				t.Errorf("%s as %v: %d %s", method, cred, w.Code, w.Body)
			}
		}
	}
	refused := &http.Response{StatusCode: 403, Body: io.NopCloser(strings.NewReader(`{"error":"/v1/capture: only root and uid 5 may do this"}`))}
	if err := Dial("/s").captureRefused(refused); fmt.Sprint(err) != "/s: permission denied: a capture shows what people send, so only root and uid 5 may do this" {
		t.Error(err)
	}
}
