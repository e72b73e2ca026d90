package node

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// Replay is a running replay as its client sees it. Put, Flush and End belong
// to one goroutine.
type Replay struct {
	// Hello describes the engine.
	Hello ReplayHello
	// Ended is closed when the engine has told the result, which may be before
	// End when it had to.
	Ended chan struct{}

	conn   io.ReadWriteCloser
	out    *bufio.Writer
	result ReplayResult
	err    error // of reading the result
}

// Replay starts to put packets into the engine, at tun-in or wire-in.
func (c *Client) Replay(ctx context.Context, point string) (*Replay, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://tweed/v1/replay?point="+point, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", replayProtocol)
	dialer := &net.Dialer{Timeout: clientTimeout}
	h := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", c.path)
		},
		ResponseHeaderTimeout: clientTimeout,
	}}
	resp, err := h.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	conn, ok := resp.Body.(io.ReadWriteCloser)
	if resp.StatusCode != http.StatusSwitchingProtocols || !ok {
		defer resp.Body.Close()
		b, _ := io.ReadAll(io.LimitReader(resp.Body, maxCaptureRequest))
		var e apiError
		switch {
		case json.Unmarshal(b, &e) != nil || e.Error == "":
			return nil, fmt.Errorf("%s: /v1/replay answered %s", c.path, resp.Status)
		case resp.StatusCode == http.StatusForbidden:
			return nil, fmt.Errorf("%s: permission denied: a replay sends packets in the name of others, so %s", c.path, strings.TrimPrefix(e.Error, "/v1/replay: "))
		}
		return nil, errors.New(e.Error)
	}
	r := &Replay{conn: conn, out: bufio.NewWriterSize(conn, 64<<10), Ended: make(chan struct{})}
	in := json.NewDecoder(conn)
	if err := in.Decode(&r.Hello); err != nil {
		conn.Close()
		return nil, fmt.Errorf("%s: replay: %w", c.path, err)
	}
	go func() {
		defer close(r.Ended)
		r.err = in.Decode(&r.result)
	}()
	return r, nil
}

// Put sends a packet: at tun-in an inner one, at wire-in a whole datagram with
// its IPv4 header, up to 65535 bytes. payload is 0, or the payload of each
// segment of a super-packet. It waits while the engine is behind.
func (r *Replay) Put(pkt []byte, payload int) error {
	if len(pkt) == 0 || len(pkt) > maxReplayed || payload < 0 || payload > len(pkt) {
		return fmt.Errorf("replay: a packet of %d bytes in segments of %d: expected 1 to %d bytes", len(pkt), payload, maxReplayed)
	}
	var head [replayHead]byte
	binary.LittleEndian.PutUint32(head[:], uint32(len(pkt)))
	binary.LittleEndian.PutUint32(head[4:], uint32(payload))
	if _, err := r.out.Write(head[:]); err != nil {
		return err
	}
	_, err := r.out.Write(pkt)
	return err
}

// Flush sends what Put has collected.
func (r *Replay) Flush() error { return r.out.Flush() }

// End ends the replay and returns what became of its packets, once all of them
// have been handled. An error of an earlier Put is explained here.
func (r *Replay) End() (ReplayResult, error) {
	defer r.conn.Close()
	_, werr := r.out.Write(make([]byte, replayHead))
	if werr == nil {
		werr = r.out.Flush()
	}
	select {
	case <-r.Ended:
	case <-time.After(clientTimeout):
		return r.result, errors.New("replay: the engine does not answer")
	}
	switch {
	case r.err != nil:
		return r.result, errors.New("replay: the engine has gone")
	case r.result.Error != "":
		return r.result, fmt.Errorf("replay: %s", r.result.Error)
	}
	return r.result, werr
}
