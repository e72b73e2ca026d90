package lease

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

const (
	// DefaultPrefix is flannel's etcd prefix.
	DefaultPrefix = "/coreos.com/network"

	// Every call to etcd has its own deadline: the client waits for a connection
	// otherwise, for as long as the outage lasts.
	readTimeout  = 2 * time.Second
	writeTimeout = 3 * time.Second

	// pingAfter is the second line behind the watch's own deadline; grpc-go raises
	// anything below 10 s, and etcd refuses pings of idle connections.
	pingAfter = 10 * time.Second

	// pageSize is the number of keys asked for at once.
	pageSize = 1000

	// reconnectMax caps the delay between connection attempts, so that the table
	// is exact again soon after etcd is back.
	reconnectMax = 500 * time.Millisecond
	// connectTimeout is how long one connection attempt may take, TLS included.
	connectTimeout = 3 * time.Second
)

// EtcdConfig says how to reach etcd.
type EtcdConfig struct {
	// Endpoints are URLs with the scheme http or https; host:port means http, or
	// https if CAFile or CertFile is set. Blanks around them are ignored.
	Endpoints []string
	// Prefix is the key prefix; empty means DefaultPrefix.
	Prefix string
	// CertFile and KeyFile are the client certificate and its key, PEM; both or
	// neither. CAFile holds the certificates the server's is checked against;
	// without it the system's are used. Any of them may be set alone as far as
	// that makes sense; the files are read again at every new connection.
	CertFile, KeyFile, CAFile string
	// Username and Password authenticate to etcd; both or neither.
	Username, Password string
	// DialTimeout bounds fetching an authentication token; 0 means 2 s.
	DialTimeout time.Duration
	// Log receives what is worth reading; nil means slog.Default.
	Log *slog.Logger
}

// Registry reads and writes network configuration and leases in etcd. It is safe
// for concurrent use. No call waits longer than its deadline, a few seconds; the
// errors say what is wrong with etcd in one line.
type Registry struct {
	cfg    EtcdConfig
	log    *slog.Logger
	probe  prober
	config string // key of the network configuration
	leases string // prefix of the leases, with a trailing slash

	// Deadlines of one call, and the silence after which gRPC pings; tests change
	// them.
	readTimeout, writeTimeout, pingAfter time.Duration

	// dial is held while a client is made, which may take DialTimeout.
	dial chan struct{}

	mu     sync.Mutex
	client *clientv3.Client
	gen    int // counts clients; a stalled user names the one it means
	reset  int // the one that Reset closed last
	closed bool
}

// Open checks the configuration and reads the certificate files. It does not
// connect: etcd may come up later.
func Open(cfg EtcdConfig) (*Registry, error) {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Prefix == "" {
		cfg.Prefix = DefaultPrefix
	}
	if cfg.DialTimeout == 0 {
		cfg.DialTimeout = 2 * time.Second
	}
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	cfg.Endpoints, _ = checkEndpoints(cfg)
	if _, err := cfg.tls(); err != nil {
		return nil, fmt.Errorf("lease: %w", err)
	}
	if !cfg.secure() && (cfg.CAFile != "" || cfg.CertFile != "") {
		cfg.Log.Warn("etcd certificates are not used with http endpoints", "endpoints", strings.Join(cfg.Endpoints, ","))
	}
	return &Registry{
		cfg:    cfg,
		log:    cfg.Log,
		config: configKey(cfg.Prefix),
		leases: subnetsPrefix(cfg.Prefix),
		dial:   make(chan struct{}, 1),

		readTimeout:  readTimeout,
		writeTimeout: writeTimeout,
		pingAfter:    pingAfter,
	}, nil
}

// Close ends every connection. Calls in progress fail.
func (r *Registry) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	if r.client != nil {
		r.client.Close()
		r.client = nil
	}
	return nil
}

// ConfigKey is the etcd key of the network configuration.
func (r *Registry) ConfigKey() string { return r.config }

// connect returns the client and its generation; it makes one if there is none.
func (r *Registry) connect(ctx context.Context) (*clientv3.Client, int, error) {
	if c, gen, err := r.current(); c != nil || err != nil {
		return c, gen, err
	}
	select {
	case r.dial <- struct{}{}:
		defer func() { <-r.dial }()
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	}
	if c, gen, err := r.current(); c != nil || err != nil {
		return c, gen, err
	}
	c, err := r.newClient()
	if err != nil {
		return nil, 0, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		c.Close()
		return nil, 0, errClosed
	}
	r.client = c
	r.gen++
	return c, r.gen, nil
}

func (r *Registry) current() (*clientv3.Client, int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, 0, errClosed
	}
	return r.client, r.gen, nil
}

// drop closes the client of a generation, so that the next call connects anew.
// It is for connections that went silent: closing the stream alone would leave
// the next one on the same dead connection.
func (r *Registry) drop(gen int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.client != nil && r.gen == gen {
		r.client.Close()
		r.client = nil
	}
}

// Reset closes the connection to etcd, whatever it is used for at the moment. The
// next call makes a new one.
func (r *Registry) Reset() {
	_, gen, err := r.current()
	if err == nil {
		r.mu.Lock()
		r.reset = gen
		r.mu.Unlock()
		r.drop(gen)
	}
}

// wasReset reports whether a client was closed on purpose.
func (r *Registry) wasReset(gen int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return gen != 0 && gen == r.reset
}

// newClient makes a client. With a user name it authenticates at once, which
// needs etcd; without one it never waits.
func (r *Registry) newClient() (*clientv3.Client, error) {
	tlsConfig, err := r.cfg.tls()
	if err != nil {
		return nil, err
	}
	return clientv3.New(clientv3.Config{
		Endpoints:            r.cfg.Endpoints,
		TLS:                  tlsConfig,
		Username:             r.cfg.Username,
		Password:             r.cfg.Password,
		DialTimeout:          r.cfg.DialTimeout,
		DialKeepAliveTime:    r.pingAfter,
		DialKeepAliveTimeout: 3 * time.Second,
		Logger:               zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay:  50 * time.Millisecond,
				Multiplier: 1.6,
				Jitter:     0.2,
				MaxDelay:   reconnectMax,
			},
			MinConnectTimeout: connectTimeout,
		})},
	})
}

// call runs one request with its own deadline and explains its failure.
func (r *Registry) call(ctx context.Context, timeout time.Duration, do func(context.Context, *clientv3.Client) error) error {
	cctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	c, gen, err := r.connect(cctx)
	if err == nil {
		err = do(cctx, c)
	}
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	err = r.explain(ctx, err)
	// A connection that is dead while etcd is alive, and certificates that were
	// replaced, are both cured by a new client.
	var etcd *EtcdError
	if c != nil && errors.As(err, &etcd) && unanswered(etcd.Err) && (etcd.healthy || etcd.Access) {
		r.drop(gen)
	}
	return err
}

// ReadNetworkConfig reads and validates the network configuration. The error is
// an *EtcdError if etcd did not answer, ErrNoConfig if the key is missing.
func (r *Registry) ReadNetworkConfig(ctx context.Context) (NetworkConfig, error) {
	var resp *clientv3.GetResponse
	err := r.call(ctx, r.readTimeout, func(ctx context.Context, c *clientv3.Client) (err error) {
		resp, err = c.Get(ctx, r.config)
		return err
	})
	if err != nil {
		return NetworkConfig{}, err
	}
	if len(resp.Kvs) == 0 {
		return NetworkConfig{}, r.missingConfig(ctx)
	}
	cfg, err := ParseNetworkConfig(resp.Kvs[0].Value)
	if err != nil {
		return NetworkConfig{}, fmt.Errorf("%w (etcd key %s)", err, r.config)
	}
	return cfg, nil
}

// WriteNetworkConfig validates the configuration and writes it.
func (r *Registry) WriteNetworkConfig(ctx context.Context, cfg NetworkConfig) error {
	data, err := cfg.Marshal()
	if err != nil {
		return err
	}
	return r.call(ctx, r.writeTimeout, func(ctx context.Context, c *clientv3.Client) error {
		_, err := c.Put(ctx, r.config, string(data))
		return err
	})
}

// ListLeases reads every lease at one revision, sorted by subnet. Keys and values
// that do not parse are left out.
func (r *Registry) ListLeases(ctx context.Context) ([]Lease, int64, error) {
	snap, err := r.list(ctx)
	if err != nil {
		return nil, 0, err
	}
	leases := make([]Lease, 0, len(snap.leases))
	for _, kv := range snap.leases {
		if l, keyErr, valueErr := kv.lease(); keyErr == nil && valueErr == nil {
			leases = append(leases, l)
		}
	}
	slices.SortFunc(leases, func(a, b Lease) int { return compareSubnets(a.Subnet, b.Subnet) })
	return leases, snap.rev, nil
}

// listing is the network configuration and every lease at one revision.
type listing struct {
	rev       int64
	clusterID uint64
	config    []byte // nil if the key is missing
	configRev int64  // revision of config, 0 if it is missing
	leases    []keyValue
}

// list reads page by page, all pages at the revision of the first. It returns
// everything or an error.
func (r *Registry) list(ctx context.Context) (listing, error) {
	var first *clientv3.TxnResponse
	err := r.call(ctx, r.readTimeout, func(ctx context.Context, c *clientv3.Client) (err error) {
		first, err = c.Txn(ctx).Then(clientv3.OpGet(r.config), r.page(r.leases, 0)).Commit()
		return err
	})
	if err != nil {
		return listing{}, err
	}
	snap := listing{rev: first.Header.Revision, clusterID: first.Header.ClusterId}
	if kvs := first.Responses[0].GetResponseRange().Kvs; len(kvs) > 0 {
		snap.config, snap.configRev = kvs[0].Value, kvs[0].ModRevision
	}
	page := first.Responses[1].GetResponseRange()
	for {
		for _, kv := range page.Kvs {
			snap.leases = append(snap.leases, r.keyValue(kv))
		}
		if !page.More || len(page.Kvs) == 0 {
			return snap, nil
		}
		from := string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
		var next *clientv3.TxnResponse
		err := r.call(ctx, r.readTimeout, func(ctx context.Context, c *clientv3.Client) (err error) {
			next, err = c.Txn(ctx).Then(r.page(from, snap.rev)).Commit()
			return err
		})
		if err != nil {
			return listing{}, err
		}
		page = next.Responses[0].GetResponseRange()
	}
}

func (r *Registry) page(from string, rev int64) clientv3.Op {
	return clientv3.OpGet(from, clientv3.WithRange(clientv3.GetPrefixRangeEnd(r.leases)),
		clientv3.WithLimit(pageSize), clientv3.WithRev(rev))
}

func (r *Registry) keyValue(kv *mvccpb.KeyValue) keyValue {
	return keyValue{
		name:    recordName(strings.TrimPrefix(string(kv.Key), r.leases)),
		value:   kv.Value,
		create:  kv.CreateRevision,
		mod:     kv.ModRevision,
		leaseID: kv.Lease,
	}
}

// fence is the condition of a write: what the key must still be.
type fence struct{ cmp clientv3.Cmp }

// outcome is what a fenced write found: done, or the key as it is instead, which
// is nil if the key is gone.
type outcome struct {
	done bool
	rev  int64
	now  *keyValue
}

func (r *Registry) ifAbsent(name string) fence {
	return fence{clientv3.Compare(clientv3.CreateRevision(r.leases+name), "=", 0)}
}

func (r *Registry) ifUnchanged(name string, mod int64) fence {
	return fence{clientv3.Compare(clientv3.ModRevision(r.leases+name), "=", mod)}
}

func (r *Registry) ifAttached(name string, leaseID int64) fence {
	return fence{clientv3.Compare(clientv3.LeaseValue(r.leases+name), "=", leaseID)}
}

// put writes a key under a fence. An error means that it is not known whether the
// write was carried out, not that it was not.
func (r *Registry) put(ctx context.Context, f fence, name string, value []byte, leaseID int64) (outcome, error) {
	return r.txn(ctx, f, name, clientv3.OpPut(r.leases+name, string(value), clientv3.WithLease(clientv3.LeaseID(leaseID))))
}

// remove deletes a key under a fence.
func (r *Registry) remove(ctx context.Context, f fence, name string) (outcome, error) {
	return r.txn(ctx, f, name, clientv3.OpDelete(r.leases+name))
}

func (r *Registry) txn(ctx context.Context, f fence, name string, op clientv3.Op) (outcome, error) {
	var resp *clientv3.TxnResponse
	err := r.call(ctx, r.writeTimeout, func(ctx context.Context, c *clientv3.Client) (err error) {
		resp, err = c.Txn(ctx).If(f.cmp).Then(op).Else(clientv3.OpGet(r.leases + name)).Commit()
		return err
	})
	if err != nil {
		return outcome{}, err
	}
	out := outcome{done: resp.Succeeded, rev: resp.Header.Revision}
	if !out.done {
		out.now = r.only(resp.Responses[0].GetResponseRange().Kvs)
	}
	return out, nil
}

// get reads one key; nil means it does not exist.
func (r *Registry) get(ctx context.Context, name string) (*keyValue, error) {
	var resp *clientv3.GetResponse
	err := r.call(ctx, r.readTimeout, func(ctx context.Context, c *clientv3.Client) (err error) {
		resp, err = c.Get(ctx, r.leases+name)
		return err
	})
	if err != nil {
		return nil, err
	}
	return r.only(resp.Kvs), nil
}

func (r *Registry) only(kvs []*mvccpb.KeyValue) *keyValue {
	if len(kvs) == 0 {
		return nil
	}
	kv := r.keyValue(kvs[0])
	return &kv
}

// recordName bounds what is remembered of a key's name. Names this long are no
// subnet keys; sharing a record costs two of them a log line.
func recordName(name string) string {
	const max = 80
	if len(name) > max {
		return name[:max]
	}
	return name
}
