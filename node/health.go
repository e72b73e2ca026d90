package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of every HTTP server here: the requests are tiny.
const (
	httpReadTimeout  = 5 * time.Second
	httpWriteTimeout = 30 * time.Second
	httpIdleTimeout  = 60 * time.Second
	httpMaxHeader    = 16 << 10
)

func newHTTPServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadTimeout:       httpReadTimeout,
		ReadHeaderTimeout: httpReadTimeout,
		WriteTimeout:      httpWriteTimeout,
		IdleTimeout:       httpIdleTimeout,
		MaxHeaderBytes:    httpMaxHeader,
	}
}

// listenTCP opens a listening socket in the calling thread's namespace; flag
// and address are for the error.
func listenTCP(flag, addr string) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp", addr)
	switch {
	case err == nil:
		return l, nil
	case errors.Is(err, unix.EADDRINUSE):
		return nil, fmt.Errorf("%s: %s is in use by another program: choose another port", flag, addr)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return nil, fmt.Errorf("%s: %s is not an address of this host", flag, addr)
	}
	return nil, fmt.Errorf("%s %s: %w", flag, addr, err)
}

// Bodies of flannel's health endpoints (flannel main.go, mustRunHealthz).
const (
	healthzBody  = "flanneld is running"
	readyzBody   = "flanneld is ready"
	notReadyBody = "flanneld is not ready yet"
)

// healthHandler serves /healthz, which only says that the process runs, and
// /readyz, which says that rules and subnet file are in place.
func (n *Node) healthHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, healthzBody)
	})
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !n.readyz.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = io.WriteString(w, notReadyBody)
			return
		}
		_, _ = io.WriteString(w, readyzBody)
	})
	return mux
}

func (n *Node) healthAddr() string {
	return net.JoinHostPort(n.cfg.HealthzIP, strconv.Itoa(n.cfg.HealthzPort))
}
