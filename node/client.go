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
	"net/netip"
	"net/url"
	"time"

	"golang.org/x/sys/unix"
)

// Client talks to the API socket of one running node. It is safe for use by
// several goroutines.
type Client struct {
	path string
	http *http.Client
}

// clientTimeout bounds one call: the answers come from memory.
const clientTimeout = 10 * time.Second

// Dial returns a client for the API socket at path. It does not connect; the
// first call does.
func Dial(path string) *Client {
	dialer := &net.Dialer{Timeout: clientTimeout}
	return &Client{
		path: path,
		http: &http.Client{
			Timeout: clientTimeout,
			Transport: &http.Transport{
				DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					return dialer.DialContext(ctx, "unix", path)
				},
				MaxIdleConns:    1,
				IdleConnTimeout: clientTimeout,
			},
		},
	}
}

// Path is the socket the client talks to.
func (c *Client) Path() string { return c.path }

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status returns the node's whole state.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	err := c.get(ctx, "/v1/status", &s)
	return s, err
}

// Peers returns the peers in subnet order.
func (c *Client) Peers(ctx context.Context) (PeersAnswer, error) {
	var a PeersAnswer
	err := c.get(ctx, "/v1/peers", &a)
	return a, err
}

// Routes returns the overlay's routing table, our own subnet included.
func (c *Client) Routes(ctx context.Context) (RoutesAnswer, error) {
	var a RoutesAnswer
	err := c.get(ctx, "/v1/routes", &a)
	return a, err
}

// Leases returns all leases, our own included, whether the data plane can use
// them or not.
func (c *Client) Leases(ctx context.Context) (LeasesAnswer, error) {
	var a LeasesAnswer
	err := c.get(ctx, "/v1/leases", &a)
	return a, err
}

// Route explains what happens to a packet for dst.
func (c *Client) Route(ctx context.Context, dst netip.Addr) (RouteAnswer, error) {
	var a RouteAnswer
	err := c.get(ctx, "/v1/route?ip="+url.QueryEscape(dst.String()), &a)
	return a, err
}

// Metrics returns the Prometheus text exposition.
func (c *Client) Metrics(ctx context.Context) (string, error) {
	b, err := c.do(ctx, "/metrics")
	return string(b), err
}

func (c *Client) get(ctx context.Context, path string, into any) error {
	b, err := c.do(ctx, path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%s: answer to %s: %w", c.path, path, err)
	}
	return nil
}

// apiError is the body of every answer that is not a success.
type apiError struct {
	Schema int    `json:"schema"`
	Error  string `json:"error"`
}

// change makes a call that is not a GET, with a JSON body unless it is nil.
func (c *Client) change(ctx context.Context, method, path string, body []byte, into any) error {
	b, err := c.send(ctx, method, path, body)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%s: answer to %s: %w", c.path, path, err)
	}
	return nil
}

func (c *Client) do(ctx context.Context, path string) ([]byte, error) {
	return c.send(ctx, http.MethodGet, path, nil)
}

func (c *Client) send(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://tweed"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.path, err)
	}
	if resp.StatusCode == http.StatusOK {
		return b, nil
	}
	var e apiError
	if json.Unmarshal(b, &e) == nil && e.Error != "" {
		return nil, errors.New(e.Error)
	}
	return nil, fmt.Errorf("%s: %s answered %s", c.path, path, resp.Status)
}

// explain turns a failed connection into a line that says what to do.
func (c *Client) explain(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%s: no such socket: no engine runs there (start one with tweed up)", c.path)
	case errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("%s: nobody answers: the engine has stopped (start it with tweed up)", c.path)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s: permission denied: run as root or as the user that started the engine", c.path)
	}
	return fmt.Errorf("%s: %w", c.path, err)
}
