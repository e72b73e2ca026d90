package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"time"
)

// HTTP is an HTTP proxy on one listener.
type HTTP struct {
	server *http.Server
	l      net.Listener
	ctx    context.Context
	end    context.CancelFunc
	done   chan struct{}
}

// ServeHTTP serves an HTTP proxy on l: CONNECT for whatever a client wants to
// reach, and http:// requests, which are passed on.
func ServeHTTP(l net.Listener, dial Dial, log *slog.Logger) *HTTP {
	if log == nil {
		log = slog.Default()
	}
	h := &HTTP{l: l, done: make(chan struct{})}
	h.ctx, h.end = context.WithCancel(context.Background())
	transport := &http.Transport{DialContext: dial, MaxIdleConns: 64, IdleConnTimeout: 30 * time.Second, ResponseHeaderTimeout: 0}
	forward := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.Out.Host = r.In.Host },
		Transport: transport,
		ErrorLog:  slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, "tweed proxy: "+err.Error(), http.StatusBadGateway)
		},
	}
	h.server = &http.Server{
		ReadHeaderTimeout: handshakeTime,
		BaseContext:       func(net.Listener) context.Context { return h.ctx },
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch {
			case r.Method == http.MethodConnect:
				if err := h.connect(w, r, dial); err != nil && h.ctx.Err() == nil {
					log.Debug("proxy connection", "client", r.RemoteAddr, "to", r.Host, "err", err)
				}
			case r.URL.IsAbs() && r.URL.Scheme == "http":
				forward.ServeHTTP(w, r)
			default:
				http.Error(w, "tweed proxy: this is an HTTP proxy: set http_proxy to this address", http.StatusBadRequest)
			}
		}),
	}
	go func() {
		defer close(h.done)
		_ = h.server.Serve(l)
		transport.CloseIdleConnections()
	}()
	return h
}

// Addr is where the proxy listens.
func (h *HTTP) Addr() net.Addr { return h.l.Addr() }

// Close stops the proxy and cuts its connections.
func (h *HTTP) Close() error {
	h.end()
	err := h.server.Close()
	<-h.done
	return err
}

func (h *HTTP) connect(w http.ResponseWriter, r *http.Request, dial Dial) error {
	ctx, cancel := context.WithTimeout(r.Context(), dialTime)
	out, err := dial(ctx, "tcp", r.Host)
	cancel()
	if err != nil {
		http.Error(w, "tweed proxy: "+err.Error(), http.StatusBadGateway)
		return err
	}
	defer out.Close()
	hijacker, ok := w.(http.Hijacker)
	if !ok {
		return errors.New("proxy: CONNECT needs HTTP/1.1")
	}
	c, rw, err := hijacker.Hijack()
	if err != nil {
		return fmt.Errorf("proxy: %w", err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Time{})
	if _, err := io.WriteString(c, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return err
	}
	// What the client sent without waiting for the answer was read already.
	early, err := rw.Reader.Peek(rw.Reader.Buffered())
	if err == nil && len(early) > 0 {
		_, err = out.Write(early)
	}
	if err != nil {
		return fmt.Errorf("proxy: %w", err)
	}
	return joinConns(h.ctx, c, out)
}
