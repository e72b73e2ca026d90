package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

const (
	socketMode    = 0o660
	socketDirMode = 0o750
)

type credKey struct{}

// listenAPI opens the API socket. The caller holds the lock of the engine's
// state directory, so a socket that is there already is a dead engine's.
func listenAPI(path string) (*net.UnixListener, error) {
	if len(path) >= len(unix.RawSockaddrUnix{}.Path) {
		return nil, fmt.Errorf("socket path %s is longer than the %d bytes the kernel allows: choose a shorter --state-dir or --socket",
			path, len(unix.RawSockaddrUnix{}.Path)-1)
	}
	if fi, err := os.Lstat(path); err == nil {
		if fi.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("socket path %s exists and is no socket: remove it or choose another --socket", path)
		}
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return nil, fmt.Errorf("socket %s is in use by another engine%s: give each engine its own --state-dir, --socket or --tun-name",
				path, holderOf(&net.UnixAddr{Net: "unix", Name: path}))
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("API socket: %w", err)
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		return nil, fmt.Errorf("API socket %s: %w", path, err)
	}
	if err := os.Chmod(path, socketMode); err != nil {
		l.Close()
		return nil, fmt.Errorf("API socket: %w", err)
	}
	return l, nil
}

// apiServer is the HTTP server on the API socket. It attaches to each request
// who asks.
func (n *Node) apiServer() *http.Server {
	s := newHTTPServer(n.apiHandler())
	s.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		if u, ok := c.(*net.UnixConn); ok {
			if cred, err := peerCred(u); err == nil {
				return context.WithValue(ctx, credKey{}, cred)
			}
		}
		return ctx
	}
	return s
}

func (n *Node) apiHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { answer(w, n.status()) })
	mux.HandleFunc("GET /v1/peers", func(w http.ResponseWriter, _ *http.Request) {
		a := PeersAnswer{Schema: Schema, Peers: []PeerStatus{}}
		if t := n.view.Load().table; t != nil {
			a.Peers = emptyNotNil(t.peers)
		}
		answer(w, a)
	})
	mux.HandleFunc("GET /v1/routes", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, RoutesAnswer{Schema: Schema, Routes: n.view.Load().routes()})
	})
	mux.HandleFunc("GET /v1/leases", func(w http.ResponseWriter, _ *http.Request) {
		a := LeasesAnswer{Schema: Schema, Leases: []LeaseStatus{}}
		v := n.view.Load()
		if v.lease != nil {
			a.Leases = append(a.Leases, v.lease.LeaseStatus)
		}
		if v.table != nil {
			a.Leases = append(a.Leases, v.table.leases...)
		}
		answer(w, a)
	})
	mux.HandleFunc("GET /v1/route", func(w http.ResponseWriter, r *http.Request) {
		ip, err := netip.ParseAddr(r.URL.Query().Get("ip"))
		if err != nil {
			refuse(w, http.StatusBadRequest, fmt.Sprintf("ip %q: expected an IP address", r.URL.Query().Get("ip")))
			return
		}
		answer(w, n.route(ip.Unmap()))
	})
	n.attachHandlers(mux)
	n.captureHandlers(mux)
	mux.HandleFunc("POST /v1/replay", requireAdmin(n.replay))
	mux.HandleFunc("GET /v1/debug", requireAdmin(n.debug))
	mux.Handle("GET /metrics", n.metricsHandler())
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		refuse(w, http.StatusNotFound, fmt.Sprintf("%s %s: this engine (version %s) has no such call", r.Method, r.URL.Path, n.cfg.Version))
	})
	return mux
}

// requireAdmin lets only the engine's own user and root through. Reading is
// open to everybody who may connect to the socket; changing is not.
func requireAdmin(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		cred, ok := r.Context().Value(credKey{}).(*unix.Ucred)
		if !ok || cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
			refuse(w, http.StatusForbidden, r.URL.Path+": only root and uid "+strconv.Itoa(os.Geteuid())+" may do this")
			return
		}
		h(w, r)
	}
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the client went away
}

func refuse(w http.ResponseWriter, code int, msg string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(apiError{Schema: Schema, Error: msg})
}
