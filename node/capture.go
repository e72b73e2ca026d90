package node

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tweed/capture"
	"tweed/capture/filter"
	"tweed/encap"
	"tweed/engine"
	"tweed/engine/tap"
)

// CaptureRequest says what a capture is to show. The zero value is the inner
// packets in both directions, whole.
type CaptureRequest struct {
	// Points are tap points by name: tun-in, wire-out, wire-in, tun-out, drop.
	// None means tun-in and tun-out.
	Points []string `json:"points,omitempty"`
	// Snap is how many bytes of a packet to keep, from 1; 0 means all.
	Snap int `json:"snap,omitempty"`
	// SuperPackets shows super-packets in one piece, not segment by segment.
	SuperPackets bool `json:"super_packets,omitempty"`
	// Filters are expressions of package filter; a packet has to match all.
	Filters []string `json:"filters,omitempty"`
	// Peers are node names, node ids, underlay addresses or subnets; a packet
	// has to go to or come from one of them.
	Peers []string `json:"peers,omitempty"`
	// Recorder asks for what the flight recorder holds; nothing else is asked
	// for then.
	Recorder bool `json:"recorder,omitempty"`
	// Until is an expression: packets are kept until one matches it, and sent
	// then, the newest Before of them (0 means 1000), preceded by what the flight
	// recorder holds. Points none means all then.
	Until  string `json:"until,omitempty"`
	Before int    `json:"before,omitempty"`
	// Reasons are drop reasons by name: only packets dropped for one of them.
	Reasons []string `json:"reasons,omitempty"`
}

// captureAnswer is what a refused capture, and the end of one, are answered
// with. Filter is there when an expression is wrong.
type captureAnswer struct {
	Schema int           `json:"schema"`
	Error  string        `json:"error,omitempty"`
	Filter *filter.Error `json:"filter,omitempty"`
}

const (
	// maxCaptureRequest bounds the body of a request, in bytes.
	maxCaptureRequest = 256 << 10
	// captureFarewell is how long a node that stops lets the streams end.
	captureFarewell = time.Second
	// captureReport is how often a stream tells its statistics, at the most.
	captureReport = time.Second
)

// captures are the running captures by id. The zero value is ready for use.
type captures struct {
	hub  capture.Hub
	mu   sync.Mutex
	byID map[string]*capture.Session
	// streams are the handlers at work.
	streams sync.WaitGroup
}

func (c *captures) add(s *capture.Session) string {
	id := strings.ToLower(rand.Text()[:8])
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byID == nil {
		c.byID = make(map[string]*capture.Session)
	}
	c.byID[id] = s
	c.streams.Add(1)
	return id
}

func (c *captures) remove(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.byID, id)
	c.streams.Done()
}

func (c *captures) find(id string) *capture.Session {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byID[id]
}

// end closes all captures and waits a moment for their streams to be read.
func (c *captures) end() {
	c.mu.Lock()
	all := slices.Collect(maps.Values(c.byID))
	c.mu.Unlock()
	for _, s := range all {
		s.Close()
	}
	done := make(chan struct{})
	go func() {
		c.streams.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(captureFarewell):
	}
}

func (n *Node) captureHandlers(mux *http.ServeMux) {
	mux.HandleFunc("POST /v1/capture", requireAdmin(n.capture))
	mux.HandleFunc("DELETE /v1/capture/{id}", requireAdmin(func(w http.ResponseWriter, r *http.Request) {
		s := n.captures.find(r.PathValue("id"))
		if s == nil {
			refuse(w, http.StatusNotFound, fmt.Sprintf("capture %s: not running", r.PathValue("id")))
			return
		}
		s.Close()
		answer(w, captureAnswer{Schema: Schema})
	}))
}

// capture runs one capture as long as its client reads.
func (n *Node) capture(w http.ResponseWriter, r *http.Request) {
	var req CaptureRequest
	d := json.NewDecoder(io.LimitReader(r.Body, maxCaptureRequest))
	d.DisallowUnknownFields()
	if err := d.Decode(&req); err != nil {
		refuse(w, http.StatusBadRequest, "capture: "+err.Error())
		return
	}
	if req.Recorder {
		n.dumpRecorder(w)
		return
	}
	cfg, err := n.captureConfig(&req)
	if err != nil {
		a := captureAnswer{Schema: Schema, Error: err.Error()}
		errors.As(err, &a.Filter)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusBadRequest)
		_ = json.NewEncoder(w).Encode(a)
		return
	}
	s, err := n.captures.hub.Start(cfg)
	if err != nil {
		refuse(w, http.StatusServiceUnavailable, err.Error())
		return
	}
	defer s.Close()
	id := n.captures.add(s)
	defer n.captures.remove(id)
	hello := n.captureHello(&req, cfg.Snap)
	hello.ID = id
	log := n.log.With("capture", id)
	if cred, ok := r.Context().Value(credKey{}).(*unix.Ucred); ok {
		log = log.With("uid", cred.Uid, "pid", cred.Pid)
	}
	log.Info("capture started", "points", hello.Points, "filter", hello.Filter)
	streamed := make(chan error)
	go func() {
		// The thread ends with the goroutine: copying to the client must not
		// take time from forwarding.
		runtime.LockOSThread()
		_ = unix.Setpriority(unix.PRIO_PROCESS, 0, capture.Nice)
		streamed <- streamCapture(r.Context(), w, s, hello)
	}()
	err = <-streamed
	s.Close()
	st := s.Stats()
	log.Info("capture ended", "matched", st.Matched.Total(), "lost", st.Lost.Total()+st.Overrun.Total(), "cause", causeOf(err))
}

// recorderSnap is how much the flight recorder keeps of a packet, in bytes: the
// headers inside and outside the tunnel.
const recorderSnap = 128

// startRecorder starts the flight recorder, if it is asked for.
func (n *Node) startRecorder() (stop func(), err error) {
	if n.cfg.FlightRecorder == 0 {
		return func() {}, nil
	}
	s, err := n.captures.hub.Start(capture.Config{Points: tap.AllPoints, Snap: recorderSnap, Keep: n.cfg.FlightRecorder})
	if err != nil {
		return nil, fmt.Errorf("--flight-recorder: %w", err)
	}
	n.recorder.Store(s)
	return s.Close, nil
}

// errNoRecorder is what to do without a flight recorder.
var errNoRecorder = errors.New("no flight recorder runs: start the engine with --flight-recorder N")

// Recorded returns what the flight recorder holds, as a stream for
// capture.NewReader, and the state directory.
func (n *Node) Recorded() (stream []byte, stateDir string, err error) {
	s := n.recorder.Load()
	if s == nil {
		return nil, "", errNoRecorder
	}
	all := CaptureRequest{Points: capture.PointNames()}
	b, err := capture.AppendHello(nil, n.captureHello(&all, recorderSnap))
	if err != nil {
		return nil, "", err
	}
	frames, stats := s.Dump()
	b, err = capture.AppendStats(append(b, frames...), stats, true)
	return b, n.view.Load().stateDir, err
}

// dumpRecorder answers with what the flight recorder holds.
func (n *Node) dumpRecorder(w http.ResponseWriter) {
	b, _, err := n.Recorded()
	if err != nil {
		refuse(w, http.StatusConflict, err.Error())
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	_, _ = w.Write(b) // the client went away
}

func causeOf(err error) string {
	if err == nil {
		return "finished"
	}
	return "the client went away"
}

// streamCapture writes the stream of s until it is closed or nobody reads on.
func streamCapture(ctx context.Context, w http.ResponseWriter, s *capture.Session, hello capture.Hello) error {
	rc := http.NewResponseController(w)
	// A capture lasts as long as it lasts. Without deadlines these do nothing.
	_ = rc.SetWriteDeadline(time.Time{})
	_ = rc.SetReadDeadline(time.Time{})
	w.Header().Set("Content-Type", "application/octet-stream")
	b, err := capture.AppendHello(nil, hello)
	var report []byte
	for reported := time.Now(); err == nil && b != nil; {
		if _, err = w.Write(b); err != nil {
			return err
		}
		if now := time.Now(); now.Sub(reported) > captureReport {
			reported = now
			if report, err = capture.AppendStats(report[:0], s.Stats(), false); err == nil {
				_, err = w.Write(report)
			}
		}
		if err == nil {
			err = rc.Flush()
		}
		if err == nil {
			b, err = s.Next(ctx)
		}
	}
	if err != nil {
		return err
	}
	if b, err = capture.AppendStats(nil, s.Stats(), true); err == nil {
		_, err = w.Write(b)
	}
	return err
}

// captureConfig checks a request. Errors in its expressions are *filter.Error.
func (n *Node) captureConfig(r *CaptureRequest) (capture.Config, error) {
	c := capture.Config{Snap: r.Snap, Supers: r.SuperPackets}
	if r.Snap < 0 || r.Snap > capture.MaxSnap {
		return c, fmt.Errorf("snap length %d: expected 1 to %d bytes, or 0 for all", r.Snap, capture.MaxSnap)
	}
	if c.Snap == 0 {
		c.Snap = capture.MaxSnap
	}
	for _, name := range r.Points {
		p, err := tap.ParsePoint(name)
		if err != nil {
			return c, err
		}
		c.Points |= tap.Of(p)
	}
	if c.Points == 0 && r.Until != "" {
		c.Points = tap.AllPoints
	}
	if c.Points == 0 {
		c.Points = tap.Of(tap.TunIn, tap.TunOut)
	}
	peers := n.view.Load().peersByWord
	opt := filter.Options{
		Points: capture.PointNames(), Reasons: capture.ReasonNames(),
		Peers: func(word string) ([]netip.Addr, error) { return peers(word), nil },
	}
	texts := slices.Clone(r.Filters)
	if len(r.Peers) > 0 {
		text, err := peersText(r.Peers, peers)
		if err != nil {
			return c, fmt.Errorf("%w (have: %s)", err, n.view.Load().peerNames())
		}
		texts = append(texts, text)
	}
	for _, name := range r.Reasons {
		if _, err := engine.ParseReason(name); err != nil {
			return c, fmt.Errorf("%w (one of %s)", err, strings.Join(capture.ReasonNames(), ", "))
		}
	}
	if len(r.Reasons) > 0 {
		c.Points |= tap.Of(tap.Drop)
		texts = append(texts, "reason "+strings.Join(r.Reasons, " or reason "))
	}
	for _, text := range texts {
		p, err := filter.Compile(text, opt)
		if err != nil {
			return c, err
		}
		c.Filters = append(c.Filters, p)
	}
	return c, n.captureUntil(r, &c, opt)
}

// maxBefore bounds CaptureRequest.Before; the bytes are bounded as well.
const maxBefore = 100_000

// captureUntil fills in what a capture waits for.
func (n *Node) captureUntil(r *CaptureRequest, c *capture.Config, opt filter.Options) (err error) {
	if r.Until == "" {
		return nil
	}
	if r.Before < 0 || r.Before > maxBefore {
		return fmt.Errorf("%d packets before the one waited for: expected 1 to %d", r.Before, maxBefore)
	}
	if c.Keep = r.Before; c.Keep == 0 {
		c.Keep = 1000
	}
	c.Before = n.recorder.Load()
	c.Until, err = filter.Compile(r.Until, opt)
	return err
}

// peersText is the filter for packets of any of the peers.
func peersText(words []string, find func(string) []netip.Addr) (string, error) {
	var parts []string
	for _, word := range words {
		addrs := find(word)
		if len(addrs) == 0 {
			return "", fmt.Errorf("peer %q: no such node", word)
		}
		for _, a := range addrs {
			parts = append(parts, "peer "+a.String())
		}
	}
	return strings.Join(parts, " or "), nil
}

// peersByWord finds the underlay addresses of the nodes a word may mean.
func (v *view) peersByWord(word string) []netip.Addr {
	var out []netip.Addr
	if v.table == nil {
		return nil
	}
	for _, p := range v.table.peers {
		if a := p.Endpoint.Addr(); slices.Contains([]string{p.NodeName, p.NodeID, a.String(), p.Subnet.String()}, word) && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

// peerNames lists some names of peers for an error.
func (v *view) peerNames() string {
	const most = 8
	names := slices.Sorted(maps.Values(v.namesByAddr()))
	names = slices.Compact(names)
	switch {
	case len(names) == 0:
		return "no peer"
	case len(names) > most:
		return strings.Join(names[:most], ", ") + ", ..."
	}
	return strings.Join(names, ", ")
}

// namesByAddr are the peers' names by underlay address, the address where there
// is no name.
func (v *view) namesByAddr() map[string]string {
	m := map[string]string{}
	if v.table == nil {
		return m
	}
	for _, p := range v.table.peers {
		a := p.Endpoint.Addr().String()
		if m[a] = p.NodeName; p.NodeName == "" {
			m[a] = a
		}
	}
	return m
}

// captureHello describes this node for the head of a stream.
func (n *Node) captureHello(r *CaptureRequest, snap int) capture.Hello {
	v := n.view.Load()
	h := capture.Hello{
		Version: n.cfg.Version, Node: v.node.Name, NodeID: v.node.ID, Device: v.device.Name, MTU: v.device.MTU,
		Snap: snap, SuperPackets: r.SuperPackets, Points: r.Points, Peers: v.namesByAddr(), Ports: map[uint16]string{},
	}
	if v.node.PublicIP.IsValid() {
		h.Address = v.node.PublicIP.String()
	}
	if len(h.Points) == 0 && r.Until != "" {
		h.Points = capture.PointNames()
	}
	if len(h.Points) == 0 {
		h.Points = []string{tap.TunIn.String(), tap.TunOut.String()}
	}
	var words []string
	words = append(words, r.Filters...)
	for _, p := range r.Peers {
		words = append(words, "peer "+p)
	}
	for _, x := range r.Reasons {
		words = append(words, "reason "+x)
	}
	h.Filter = strings.Join(words, " and ")
	for i, l := range v.listen {
		if i == 0 {
			h.Framing = l.Framing.String()
		}
		h.Ports[l.Addr.Port()] = l.Framing.String()
	}
	if v.table != nil {
		for _, p := range v.table.peers {
			h.Ports[p.Endpoint.Port()] = p.Framing.String()
		}
	}
	if v.lease != nil {
		h.Subnet = v.lease.Subnet.String()
	}
	if v.network != nil && h.Framing == encap.FramingVXLAN.String() {
		h.VNI = v.network.VNI
	}
	return h
}
