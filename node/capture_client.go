package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"tweed/capture"
)

// Capture is a running capture as its client sees it. One goroutine may read
// while another calls End or Close.
type Capture struct {
	*capture.Reader
	// Hello describes the node.
	Hello capture.Hello

	client *Client
	body   io.Closer
}

// Capture starts a capture. A wrong expression is reported as *filter.Error.
// The stream goes on until End, Close, the end of ctx, or that of the engine.
func (c *Client) Capture(ctx context.Context, r CaptureRequest) (*Capture, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://tweed/v1/capture", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	// A connection of its own, without the time limit of calls.
	dialer := &net.Dialer{Timeout: clientTimeout}
	h := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", c.path)
		},
		DisableKeepAlives: true, ResponseHeaderTimeout: clientTimeout, ReadBufferSize: 256 << 10,
	}}
	resp, err := h.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		return nil, c.captureRefused(resp)
	}
	reader, hello, err := capture.NewReader(resp.Body)
	if err != nil {
		resp.Body.Close()
		return nil, fmt.Errorf("%s: %w", c.path, err)
	}
	return &Capture{Reader: reader, Hello: hello, client: c, body: resp.Body}, nil
}

func (c *Client) captureRefused(resp *http.Response) error {
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxCaptureRequest))
	if err != nil {
		return fmt.Errorf("%s: %w", c.path, err)
	}
	var a captureAnswer
	switch {
	case json.Unmarshal(b, &a) != nil || a.Error == "":
		return fmt.Errorf("%s: /v1/capture answered %s", c.path, resp.Status)
	case resp.StatusCode == http.StatusForbidden:
		return fmt.Errorf("%s: permission denied: a capture shows what people send, so %s", c.path, strings.TrimPrefix(a.Error, "/v1/capture: "))
	case a.Filter != nil:
		return a.Filter
	}
	return errors.New(a.Error)
}

// End asks the engine to end the capture; the reader then gets what is on its
// way, the final statistics and io.EOF.
func (s *Capture) End(ctx context.Context) error {
	var a captureAnswer
	return s.client.change(ctx, http.MethodDelete, "/v1/capture/"+url.PathEscape(s.Hello.ID), nil, &a)
}

// Close breaks the stream off.
func (s *Capture) Close() error { return s.body.Close() }

// FindSockets lists the API sockets of all engines that answer this user on
// this host, and the one the environment names.
func FindSockets() []string {
	var out []string
	try := func(path string) {
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil && !slices.Contains(out, path) {
			c.Close()
			out = append(out, path)
		}
	}
	if s := os.Getenv(EnvSocket); s != "" {
		try(s)
	}
	if d := os.Getenv(EnvStateDir); d != "" {
		try(filepath.Join(d, socketName))
	}
	for _, root := range []string{defaultDirs(os.Geteuid(), os.Getenv).runtime, "/run/tweed"} {
		found, err := filepath.Glob(filepath.Join(root, "*", socketName))
		if err != nil {
			continue // the pattern is a constant: a root with odd characters
		}
		slices.Sort(found)
		for _, path := range found {
			try(path)
		}
	}
	return out
}
