package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"sync"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

const (
	// etcdQuota bounds the database, in bytes: leases are about 200 bytes each.
	etcdQuota = 256 << 20
	// etcdStartTimeout bounds the election of the only member.
	etcdStartTimeout = 60 * time.Second
	// etcdName is the member's name; etcd warns about its default.
	etcdName = "tweed"
)

// etcdOptions describe an embedded etcd.
type etcdOptions struct {
	// dataDir is kept; empty means a temporary directory that is removed.
	dataDir string
	// listen is the client URL; port 0 picks a free one.
	listen string
	// certFile and keyFile serve TLS; with caFile, clients need a certificate.
	certFile, keyFile, caFile string
	// logLevel is etcd's own: debug, info, warn or error.
	logLevel string
}

// etcdServer is a running single-member etcd.
type etcdServer struct {
	// Endpoint is the URL clients use, with the port that was picked.
	Endpoint string
	// DataDir is where the data is.
	DataDir string

	etcd *embed.Etcd
	log  zap.AtomicLevel
	lock *os.File
	temp bool

	mu   sync.Mutex
	grpc []*grpc.Server // what etcd serves clients with
}

// startEtcd starts a single-member etcd and waits until it answers. The caller
// has to Close it.
func startEtcd(ctx context.Context, o etcdOptions) (*etcdServer, error) {
	listen, err := parseListenURL(o)
	if err != nil {
		return nil, err
	}
	level, err := zap.ParseAtomicLevel(o.logLevel)
	if err != nil {
		return nil, fmt.Errorf("--log-level %q: expected debug, info, warn or error", o.logLevel)
	}
	s := &etcdServer{DataDir: o.dataDir, log: level}
	if err := s.openDataDir(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.etcd, err = embed.StartEtcd(s.config(o, listen))
	if err != nil {
		return nil, errors.Join(explainEtcdStart(o, err), s.Close())
	}
	ctx, cancel := context.WithTimeout(ctx, etcdStartTimeout)
	defer cancel()
	select {
	case <-s.etcd.Server.ReadyNotify():
	case err = <-s.etcd.Err():
	case <-s.etcd.Server.StopNotify():
		err = errors.New("etcd stopped while starting")
	case <-ctx.Done():
		err = fmt.Errorf("etcd did not start: %w", context.Cause(ctx))
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	endpoint := url.URL{Scheme: listen.Scheme, Host: s.etcd.Clients[0].Addr().String()}
	s.Endpoint = endpoint.String()
	return s, nil
}

// Wait blocks until ctx ends, which is no error, or the server fails.
func (s *etcdServer) Wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case err := <-s.etcd.Err():
		return fmt.Errorf("etcd failed: %w", err)
	case <-s.etcd.Server.StopNotify():
		return errors.New("etcd stopped by itself; run it again with --log-level info to see why")
	}
}

// Close stops the server and removes a temporary data directory.
func (s *etcdServer) Close() error {
	if s.etcd != nil {
		// etcd reports its own listeners' closing as errors.
		s.log.SetLevel(zapcore.FatalLevel)
		// Cut the connections first: etcd would wait 7 seconds for the watches
		// of the nodes to end by themselves.
		s.mu.Lock()
		for _, g := range s.grpc {
			g.Stop()
		}
		s.mu.Unlock()
		s.etcd.Close()
	}
	if s.lock != nil {
		s.lock.Close()
	}
	if s.temp {
		return os.RemoveAll(s.DataDir)
	}
	return nil
}

// openDataDir makes sure that the data directory exists, is private and is
// ours alone: etcd itself waits for ever for a database another process has open.
func (s *etcdServer) openDataDir() error {
	if s.DataDir == "" {
		dir, err := os.MkdirTemp("", "tweed-etcd-")
		if err != nil {
			return fmt.Errorf("temporary data directory: %w", err)
		}
		s.DataDir, s.temp = dir, true
	}
	if err := os.MkdirAll(s.DataDir, 0o700); err != nil {
		return fmt.Errorf("--data-dir %s: %w", s.DataDir, err)
	}
	dir, err := os.Open(s.DataDir)
	if err != nil {
		return fmt.Errorf("--data-dir %s: %w", s.DataDir, err)
	}
	info, err := dir.Stat()
	switch {
	case err != nil:
	case !info.IsDir():
		err = errors.New("expected a directory")
	case info.Mode().Perm()&0o077 != 0:
		err = fmt.Errorf("mode %#o lets others in, expected 0700; type: chmod 700 %s", info.Mode().Perm(), s.DataDir)
	default:
		err = unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errors.New("in use by another tweed etcd")
		}
	}
	if err != nil {
		dir.Close()
		return fmt.Errorf("--data-dir %s: %w", s.DataDir, err)
	}
	s.lock = dir
	return nil
}

// config is etcd's own configuration with the defaults changed that are meant
// for a cluster of servers: everybody's Host header and origin, no compaction,
// 2 GiB of quota, JSON logs.
func (s *etcdServer) config(o etcdOptions, listen *url.URL) *embed.Config {
	cfg := embed.NewConfig()
	cfg.Name = etcdName
	cfg.Dir = s.DataDir
	cfg.ListenClientUrls = []url.URL{*listen}
	cfg.AdvertiseClientUrls = []url.URL{*listen}
	// A single member has no peers to listen for; the URL only names it.
	peer := url.URL{Scheme: "http", Host: "127.0.0.1:2380"}
	cfg.ListenPeerUrls = nil
	cfg.AdvertisePeerUrls = []url.URL{peer}
	cfg.InitialCluster = etcdName + "=" + peer.String()
	cfg.ClientTLSInfo.CertFile, cfg.ClientTLSInfo.KeyFile = o.certFile, o.keyFile
	cfg.ClientTLSInfo.TrustedCAFile = o.caFile
	cfg.ClientTLSInfo.ClientCertAuth = o.caFile != ""
	cfg.AutoCompactionMode = embed.CompactorModePeriodic
	cfg.AutoCompactionRetention = "1h"
	cfg.QuotaBackendBytes = etcdQuota
	cfg.EnableGRPCGateway = false
	cfg.CORS = map[string]struct{}{}
	cfg.HostWhitelist = map[string]struct{}{"localhost": {}, "127.0.0.1": {}, "::1": {}, listen.Hostname(): {}}
	cfg.LogLevel = o.logLevel
	cfg.ServiceRegister = func(g *grpc.Server) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.grpc = append(s.grpc, g)
	}
	encoder := zap.NewProductionEncoderConfig()
	encoder.EncodeTime = zapcore.ISO8601TimeEncoder
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(
		zapcore.NewCore(zapcore.NewConsoleEncoder(encoder), zapcore.Lock(os.Stderr), s.log)))
	return cfg
}

func parseListenURL(o etcdOptions) (*url.URL, error) {
	u, err := url.Parse(o.listen)
	if err != nil || u.Port() == "" || (u.Scheme != "http" && u.Scheme != "https") || (u.Path != "" && u.Path != "/") {
		return nil, fmt.Errorf("--listen-client %q: expected a URL such as http://127.0.0.1:2379", o.listen)
	}
	u.Path = ""
	if u.Hostname() == "localhost" {
		u.Host = net.JoinHostPort("127.0.0.1", u.Port())
	}
	if net.ParseIP(u.Hostname()) == nil {
		return nil, fmt.Errorf("--listen-client %q: expected an IP address of this machine instead of %q", o.listen, u.Hostname())
	}
	if (o.certFile == "") != (o.keyFile == "") {
		return nil, fmt.Errorf("--certfile %q and --keyfile %q: expected both or neither", o.certFile, o.keyFile)
	}
	if (u.Scheme == "https") != (o.certFile != "") {
		return nil, fmt.Errorf("--listen-client %q: expected https with --certfile and --keyfile, http without", o.listen)
	}
	if o.caFile != "" && o.certFile == "" {
		return nil, fmt.Errorf("--cafile %q: expected --certfile and --keyfile with it", o.caFile)
	}
	return u, nil
}

// explainEtcdStart says what to do about the usual reasons.
func explainEtcdStart(o etcdOptions, err error) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("--listen-client %s: port in use; stop the other process or choose another port", o.listen)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("--listen-client %s: this machine does not have the address", o.listen)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("--listen-client %s: permission denied; choose a port above 1023", o.listen)
	}
	return fmt.Errorf("etcd did not start: %w", err)
}
