package node

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"tweed/engine"
	"tweed/engine/tap"
	"tweed/netns"
)

// A replay changes the connection's protocol. The engine sends a line of JSON,
// ReplayHello; the client frames: length of the packet and payload of each of
// its segments (0 for a packet that is none), 32 bits each in little-endian
// order, and the packet; a length of 0 is the end. The engine then sends
// another line, ReplayResult, which can come early when it has gone.
const (
	replayProtocol = "tweed-replay/1"
	replayHead     = 8
	// maxReplayed is the longest packet, in bytes: what IPv4 can say.
	maxReplayed = 1<<16 - 1
)

// ReplayHello says where packets are put in.
type ReplayHello struct {
	Schema int    `json:"schema"`
	Node   string `json:"node"`
	Point  string `json:"point"`
	// Ports are the framings by the UDP port the engine listens on.
	Ports map[uint16]string `json:"ports"`
}

// ReplayResult says what became of the packets.
type ReplayResult struct {
	Schema int `json:"schema"`
	// Packets entered the ledger of the engine: a super-packet as its segments.
	Packets   uint64 `json:"packets"`
	Delivered uint64 `json:"delivered"`
	// Dropped are the others, by reason.
	Dropped map[string]uint64 `json:"dropped"`
	// Answered would have got an ICMP error, had they been sent by the host.
	Answered uint64 `json:"answered"`
	// Foreign were no datagrams for the engine and are in no ledger.
	Foreign uint64 `json:"foreign"`
	// Error is why the replay ended early.
	Error string `json:"error,omitempty"`
}

// replays are the replays of a node. The zero value is ready for use.
type replays struct {
	// home is the namespace the engine's sockets belong to.
	home    atomic.Pointer[netns.Namespace]
	mu      sync.Mutex
	conns   map[net.Conn]struct{}
	closed  bool
	running sync.WaitGroup
}

// add takes note of a connection. It fails when the node is stopping.
func (r *replays) add(c net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	if r.conns == nil {
		r.conns = make(map[net.Conn]struct{})
	}
	r.conns[c] = struct{}{}
	r.running.Add(1)
	return true
}

func (r *replays) remove(c net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns, c)
	r.running.Done()
}

// end breaks off all replays.
func (r *replays) end() {
	r.mu.Lock()
	r.closed = true
	for c := range r.conns {
		c.Close()
	}
	r.mu.Unlock()
	r.running.Wait()
}

// start begins a replay in the engine in force.
func (n *Node) startReplay(point tap.Point) (*engine.Replay, error) {
	n.data.mu.RLock()
	eng := n.data.eng
	n.data.mu.RUnlock()
	home := n.replays.home.Load()
	if eng == nil || home == nil {
		return nil, errors.New("the node has no subnet yet, so its engine takes no packets: see tweed status")
	}
	type result struct {
		r   *engine.Replay
		err error
	}
	started := make(chan result, 1)
	// The engine opens sockets for it.
	goIn(home, func(err error) {
		var r *engine.Replay
		if err == nil {
			r, err = eng.StartReplay(point)
		}
		started <- result{r, err}
	})
	got := <-started
	return got.r, got.err
}

// replay handles one replay: it puts the packets its client sends into the engine.
func (n *Node) replay(w http.ResponseWriter, r *http.Request) {
	point, err := tap.ParsePoint(r.URL.Query().Get("point"))
	if err != nil || point != tap.TunIn && point != tap.WireIn {
		refuse(w, http.StatusBadRequest, fmt.Sprintf("replay: point %q: expected tun-in or wire-in", r.URL.Query().Get("point")))
		return
	}
	if r.Header.Get("Upgrade") != replayProtocol {
		refuse(w, http.StatusUpgradeRequired, fmt.Sprintf("replay: this engine (version %s) speaks %s: use the same version of tweed", n.cfg.Version, replayProtocol))
		return
	}
	rep, err := n.startReplay(point)
	switch {
	case errors.Is(err, engine.ErrReplaying):
		refuse(w, http.StatusConflict, "another replay is running: wait for its end")
		return
	case err != nil:
		refuse(w, http.StatusServiceUnavailable, err.Error())
		return
	}
	end := sync.OnceValue(rep.Close)
	defer end()
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		refuse(w, http.StatusInternalServerError, "replay: "+err.Error())
		return
	}
	defer conn.Close()
	if !n.replays.add(conn) {
		return
	}
	defer n.replays.remove(conn)
	_ = conn.SetDeadline(time.Time{}) // a replay takes as long as it takes
	log := n.log.With("point", point.String())
	if cred, ok := r.Context().Value(credKey{}).(*unix.Ucred); ok {
		log = log.With("uid", cred.Uid, "pid", cred.Pid)
	}
	log.Info("replay started")
	hello := ReplayHello{Schema: Schema, Node: n.view.Load().node.Name, Point: point.String(), Ports: n.listening()}
	fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", replayProtocol)
	out := json.NewEncoder(conn)
	if err = out.Encode(hello); err == nil {
		err = takeReplay(buffered.Reader, rep)
	}
	done := end()
	res := ReplayResult{
		Schema: Schema, Packets: done.Ledger.Packets, Delivered: done.Ledger.Delivered, Dropped: map[string]uint64{},
		Answered: done.Answered, Foreign: done.Foreign,
	}
	for reason, count := range done.Ledger.Drops {
		if count > 0 {
			res.Dropped[engine.Reason(reason).String()] = count
		}
	}
	if err != nil {
		res.Error = err.Error()
	}
	_ = out.Encode(res) // the client went away
	log.Info("replay ended", "packets", res.Packets, "delivered", res.Delivered, "err", err)
}

// listening are the framings by port.
func (n *Node) listening() map[uint16]string {
	ports := map[uint16]string{}
	for _, l := range n.view.Load().listen {
		ports[l.Addr.Port()] = l.Framing.String()
	}
	return ports
}

// takeReplay puts packets in until the client's end mark.
func takeReplay(in *bufio.Reader, rep *engine.Replay) error {
	pkt := make([]byte, maxReplayed)
	for {
		var head [replayHead]byte
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return fmt.Errorf("the client went away: %w", err)
		}
		length, payload := binary.LittleEndian.Uint32(head[:]), binary.LittleEndian.Uint32(head[4:])
		if length == 0 {
			return nil
		}
		if length > maxReplayed || payload > length {
			return fmt.Errorf("a packet of %d bytes in segments of %d: expected up to %d", length, payload, maxReplayed)
		}
		if _, err := io.ReadFull(in, pkt[:length]); err != nil {
			return fmt.Errorf("the client went away: %w", err)
		}
		if err := rep.Put(pkt[:length], int(payload)); err != nil {
			return errors.New("the engine has been stopped or made anew")
		}
	}
}
