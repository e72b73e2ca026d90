package lease

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// probeTimeout bounds the look at one endpoint; askTimeout the part of it that
	// is spent on the scheme the endpoint names.
	probeTimeout = 1500 * time.Millisecond
	askTimeout   = 900 * time.Millisecond
	// probeValid is how long a result is reused, so that an outage costs etcd
	// and us one probe per interval, whatever is waiting.
	probeValid = time.Second
	// v2Valid is the same for the look for keys of the v2 API.
	v2Valid = 30 * time.Second
)

// tls reads the certificate files; nil means plain connections. The client
// certificate is read again at each handshake, so that it can be renewed.
func (c EtcdConfig) tls() (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CAFile != "" {
		pem, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, fmt.Errorf("--etcd-cafile: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--etcd-cafile %s: no certificate in it (expected PEM)", c.CAFile)
		}
	}
	if c.CertFile != "" {
		load := func() (*tls.Certificate, error) {
			cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
			if err != nil {
				return nil, fmt.Errorf("--etcd-certfile %s with --etcd-keyfile %s: %w", c.CertFile, c.KeyFile, err)
			}
			return &cert, nil
		}
		if _, err := load(); err != nil {
			return nil, err
		}
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	}
	if !c.secure() {
		return nil, nil
	}
	return config, nil
}

// prober finds out why etcd does not answer, by connecting step by step the way a
// person would: TCP, then TLS, then a plain HTTP question.
type prober struct {
	mu   sync.Mutex
	at   time.Time
	last verdict

	v2At time.Time
	v2   bool
}

// verdict is what a probe found.
type verdict struct {
	problem string
	// access tells problems that need somebody to act.
	access bool
	// healthy says that an etcd v3 answered, so that only our own connection to
	// it is at fault.
	healthy bool
	// silent says that a connection was made but no answer came on it.
	silent bool
}

// why looks at every endpoint, or returns what was found a moment ago.
func (p *prober) why(ctx context.Context, cfg EtcdConfig) verdict {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.at) < probeValid && !p.at.IsZero() {
		return p.last
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	found := make([]verdict, len(cfg.Endpoints))
	var wg sync.WaitGroup
	for i, ep := range cfg.Endpoints {
		wg.Go(func() { found[i] = probeEndpoint(ctx, ep, cfg) })
	}
	wg.Wait()

	var v verdict
	problems := make([]string, len(found))
	for i, f := range found {
		problems[i] = cfg.Endpoints[i] + ": " + f.problem
		v.access = v.access || f.access
		v.healthy = v.healthy || f.healthy
	}
	v.problem = strings.Join(problems, "; ")
	v.access = v.access && !v.healthy
	if ctx.Err() != context.Canceled {
		p.at, p.last = time.Now(), v
	}
	return v
}

func probeEndpoint(ctx context.Context, endpoint string, cfg EtcdConfig) verdict {
	first, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	status, body, bad := ask(first, endpoint, "/version", cfg)
	switch {
	case bad == nil:
		return versionProblem(status, body)
	case bad.silent:
		// etcd says nothing to a client that speaks TLS to its plain port, or
		// plain HTTP to its TLS port.
		if v := wrongScheme(ctx, endpoint); v != nil {
			return *v
		}
	}
	return *bad
}

// wrongScheme reports whether the endpoint answers to the other scheme.
func wrongScheme(ctx context.Context, endpoint string) *verdict {
	if host, ok := strings.CutPrefix(endpoint, "https://"); ok {
		status, _, bad := ask(ctx, "http://"+host, "/version", EtcdConfig{})
		if bad != nil || status != http.StatusOK {
			return nil
		}
		return &verdict{problem: "it does not speak TLS: write http:// instead of https://", access: true}
	}
	// Whether it speaks TLS is all that is asked; nothing is sent to it.
	dialer := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}}
	conn, err := dialer.DialContext(ctx, "tcp", strings.TrimPrefix(endpoint, "http://"))
	if err != nil {
		return nil
	}
	conn.Close()
	return &verdict{problem: "it wants TLS: write https:// instead of http://, and give its CA with --etcd-cafile", access: true}
}

// ask puts one HTTP question to an endpoint on a connection of its own. bad says
// how far it came if there was no answer.
func ask(ctx context.Context, endpoint, path string, cfg EtcdConfig) (status int, body []byte, bad *verdict) {
	u, err := url.Parse(endpoint)
	if err != nil {
		return 0, nil, &verdict{problem: err.Error()}
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", u.Host)
	if err != nil {
		return 0, nil, &verdict{problem: dialProblem(err)}
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	if u.Scheme == "https" {
		config, err := cfg.tls()
		if err != nil {
			return 0, nil, &verdict{problem: err.Error(), access: true}
		}
		config.ServerName = u.Hostname()
		secured := tls.Client(conn, config)
		if err := secured.HandshakeContext(ctx); err != nil {
			return 0, nil, tlsProblem(err)
		}
		conn = secured
	}
	status, body, err = httpGet(ctx, conn, endpoint+path)
	if err != nil {
		return 0, nil, answerProblem(err)
	}
	return status, body, nil
}

// dialProblem is a connection error without the parts that differ from try to try.
func dialProblem(err error) string {
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns):
		return fmt.Sprintf("no address for host %q", dns.Name)
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connection refused (is etcd running there? check --etcd-endpoints)"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return "no answer (is it reachable from here? check --etcd-endpoints)"
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno.Error()
	}
	return err.Error()
}

func tlsProblem(err error) *verdict {
	var (
		record    tls.RecordHeaderError
		authority x509.UnknownAuthorityError
		host      x509.HostnameError
		invalid   x509.CertificateInvalidError
	)
	switch {
	case errors.As(err, &record):
		return &verdict{problem: "it does not speak TLS: write http:// instead of https://", access: true}
	case errors.As(err, &authority):
		return &verdict{problem: "its certificate is signed by an authority that is not trusted here: give its CA with --etcd-cafile", access: true}
	case errors.As(err, &host), errors.As(err, &invalid):
		return &verdict{problem: "its certificate is not valid: " + strings.TrimPrefix(err.Error(), "tls: failed to verify certificate: "), access: true}
	}
	return answerProblem(err)
}

// answerProblem is an error on a connection that was established.
func answerProblem(err error) *verdict {
	if s := err.Error(); strings.Contains(s, "remote error: tls") {
		if strings.Contains(s, "certificate required") || strings.Contains(s, "bad certificate") {
			return &verdict{problem: "it wants a client certificate it trusts: give --etcd-certfile and --etcd-keyfile", access: true}
		}
		return &verdict{problem: "it refuses our certificate (" + s[strings.Index(s, "tls"):] + "): check --etcd-certfile", access: true}
	}
	// A port that speaks gRPC only ends a plain HTTP request without an answer,
	// which looks the same as an etcd that is starting or hanging.
	return &verdict{problem: "connected, but etcd did not answer in time", silent: true}
}

func versionProblem(status int, body []byte) verdict {
	var v struct {
		Server string `json:"etcdserver"`
	}
	switch {
	case status == http.StatusBadRequest && strings.Contains(string(body), "HTTPS"):
		return verdict{problem: "it wants TLS: write https:// instead of http://, and give its CA with --etcd-cafile", access: true}
	case status != http.StatusOK || json.Unmarshal(body, &v) != nil || v.Server == "" || !printable(v.Server):
		return verdict{problem: fmt.Sprintf("something answers there that is not etcd (HTTP status %d for /version)", status)}
	case strings.HasPrefix(v.Server, "2.") || strings.HasPrefix(v.Server, "0."):
		return verdict{problem: "etcd " + v.Server + " has the v2 API only: version 3.4 or newer is needed", access: true}
	}
	return verdict{problem: "etcd " + v.Server + " is there, but did not answer in time", healthy: true}
}

// hasV2Key asks the endpoints for a key of etcd's v2 API, which old flannel wrote
// and which is invisible to the v3 API.
func (p *prober) hasV2Key(ctx context.Context, cfg EtcdConfig, key string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.v2At) < v2Valid && !p.v2At.IsZero() {
		return p.v2
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	p.v2At, p.v2 = time.Now(), false
	for _, ep := range cfg.Endpoints {
		p.v2 = p.v2 || endpointHasV2Key(ctx, ep, cfg, key)
	}
	return p.v2
}

func endpointHasV2Key(ctx context.Context, endpoint string, cfg EtcdConfig, key string) bool {
	status, body, bad := ask(ctx, endpoint, "/v2/keys/"+strings.TrimPrefix(key, "/"), cfg)
	var answer struct {
		Node *struct{ Value string }
	}
	return bad == nil && status == http.StatusOK && json.Unmarshal(body, &answer) == nil && answer.Node != nil
}

// httpGet asks one question on a connection that is ours alone.
func httpGet(ctx context.Context, conn net.Conn, target string) (status int, body []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return 0, nil, err
	}
	req.Close = true
	if err := req.Write(conn); err != nil {
		return 0, nil, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, maxConfigSize))
	return resp.StatusCode, body, err
}
