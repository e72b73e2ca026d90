package lease

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

var (
	// ErrNoConfig says that etcd answers but holds no network configuration.
	ErrNoConfig = errors.New("no network configuration")
	// ErrV2Keys says that the configuration exists under etcd's v2 API only. It
	// comes together with ErrNoConfig.
	ErrV2Keys = errors.New("configuration exists under etcd's v2 API only")
	// ErrAccess says that etcd refuses us, or that we refuse etcd: wrong password,
	// missing permission, a certificate that does not verify, a server that is no
	// etcd v3. Trying again does not help until somebody changes something.
	ErrAccess = errors.New("no access to etcd")

	errClosed    = errors.New("registry is closed")
	errLeaseGone = errors.New("etcd lease does not exist")
	errCompacted = errors.New("revision was compacted")
)

// EtcdError says what is wrong between us and etcd, in one line that is the same
// at every try. It unwraps to ErrAccess if trying again is of no use.
type EtcdError struct {
	// Problem names the endpoint or the user, what is wrong and what to do.
	Problem string
	// Access tells problems that need somebody to act from an etcd that is only
	// not there at the moment.
	Access bool
	// Err is the error of the client.
	Err error

	// healthy says that etcd answers others: our connection is at fault.
	healthy bool
}

func (e *EtcdError) Error() string { return "lease: etcd: " + e.Problem }

// Unwrap returns the client's error and, if it applies, ErrAccess.
func (e *EtcdError) Unwrap() []error {
	if e.Access {
		return []error{ErrAccess, e.Err}
	}
	return []error{e.Err}
}

// missingConfig is the error for a config key that does not exist.
func (r *Registry) missingConfig(ctx context.Context) error {
	if r.probe.hasV2Key(ctx, r.cfg, r.config) {
		return fmt.Errorf("lease: %w (%w): %s is there for the v2 API, which etcd v3 clients cannot see; "+
			"copy it with: ETCDCTL_API=3 etcdctl put %s \"$(ETCDCTL_API=2 etcdctl get %s)\"",
			ErrNoConfig, ErrV2Keys, r.config, r.config, r.config)
	}
	elsewhere, hint := "", ""
	if r.cfg.Prefix != DefaultPrefix {
		elsewhere = " --etcd-prefix " + r.cfg.Prefix
	}
	if !strings.HasPrefix(r.config, "/") {
		hint = fmt.Sprintf("; note that the prefix %q does not begin with a slash", r.cfg.Prefix)
	}
	return fmt.Errorf("lease: %w at etcd key %s: write one, for example: tweed network set 10.244.0.0/16%s%s", ErrNoConfig, r.config, elsewhere, hint)
}

// explain turns an error of the client into one that tells the operator what is
// wrong. Where etcd did not answer at all it looks for the reason itself, because
// the client knows only that the deadline passed.
func (r *Registry) explain(ctx context.Context, err error) error {
	if errors.Is(err, errClosed) || errors.Is(err, errLeaseGone) {
		return err
	}
	access := func(format string, args ...any) error {
		return &EtcdError{Problem: fmt.Sprintf(format, args...), Access: true, Err: err}
	}
	where := strings.Join(r.cfg.Endpoints, ",")
	switch cause := rpctypes.Error(err); {
	case errors.Is(cause, rpctypes.ErrLeaseNotFound):
		return errLeaseGone
	case errors.Is(cause, rpctypes.ErrCompacted):
		return errCompacted
	case errors.Is(cause, rpctypes.ErrAuthFailed):
		return access("%s: wrong user name or password for user %q: check --etcd-username and --etcd-password", where, r.cfg.Username)
	case errors.Is(cause, rpctypes.ErrUserEmpty), errors.Is(cause, rpctypes.ErrUserNotFound):
		return access("%s: it asks for a user: give --etcd-username and --etcd-password", where)
	case errors.Is(cause, rpctypes.ErrPermissionDenied):
		who := "a client without a user name"
		if r.cfg.Username != "" {
			who = fmt.Sprintf("user %q", r.cfg.Username)
		}
		return access("%s: %s may not read and write %s: grant its role readwrite on that prefix", where, who, strings.TrimSuffix(r.config, "config"))
	case errors.Is(cause, rpctypes.ErrNoSpace):
		return &EtcdError{Problem: where + ": its database is full and takes no new keys: compact, defragment and disarm the alarm", Err: err}
	case errors.Is(cause, rpctypes.ErrNoLeader):
		return &EtcdError{Problem: where + ": its cluster has no leader", Err: err}
	}
	if unanswered(err) {
		v := r.probe.why(ctx, r.cfg)
		return &EtcdError{Problem: v.problem, Access: v.access, Err: err, healthy: v.healthy}
	}
	return &EtcdError{Problem: where + ": " + oneLine(err), Err: err}
}

// unanswered reports whether the error says only that etcd could not be reached.
func unanswered(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) ||
		errors.Is(err, clientv3.ErrNoAvailableEndpoints) {
		return true
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return true
	}
	return false
}

func oneLine(err error) string {
	if s, ok := status.FromError(err); ok {
		return strings.Join(strings.Fields(s.Message()), " ")
	}
	return strings.Join(strings.Fields(err.Error()), " ")
}

// secure reports whether the endpoints use TLS; checkEndpoints made them agree.
func (c EtcdConfig) secure() bool {
	return len(c.Endpoints) > 0 && strings.HasPrefix(c.Endpoints[0], "https://")
}

// checkEndpoints trims the endpoints and gives each a scheme.
// Check says what is wrong with the values by themselves: no file is read and
// nothing is connected.
func (c EtcdConfig) Check() error {
	if _, err := checkEndpoints(c); err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	if (c.Username == "") != (c.Password == "") {
		return errors.New("lease: etcd user name and password must be given together: --etcd-username and --etcd-password")
	}
	if (c.CertFile == "") != (c.KeyFile == "") {
		return errors.New("lease: etcd client certificate and key must be given together: --etcd-certfile and --etcd-keyfile")
	}
	return nil
}

func checkEndpoints(cfg EtcdConfig) ([]string, error) {
	const example = "write for example http://127.0.0.1:2379"
	var out []string
	for _, ep := range cfg.Endpoints {
		if ep = strings.TrimRight(strings.TrimSpace(ep), "/"); ep == "" {
			continue
		}
		full := ep
		if !strings.Contains(ep, "://") {
			full = "http://" + ep
			if cfg.CAFile != "" || cfg.CertFile != "" {
				full = "https://" + ep
			}
		}
		u, err := url.Parse(full)
		switch {
		case err != nil || u.Hostname() == "" || u.Port() == "":
			return nil, fmt.Errorf("etcd endpoint %q is not scheme://host:port: %s", ep, example)
		case u.Scheme != "http" && u.Scheme != "https":
			return nil, fmt.Errorf("etcd endpoint %q has scheme %q, not http or https: %s", ep, u.Scheme, example)
		case u.Path != "" || u.RawQuery != "":
			return nil, fmt.Errorf("etcd endpoint %q has a path; the key prefix is given by --etcd-prefix: %s", ep, example)
		}
		if full = u.Scheme + "://" + u.Host; !slices.Contains(out, full) {
			out = append(out, full)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no etcd endpoint is given: %s", example)
	}
	for _, ep := range out {
		if strings.HasPrefix(ep, "https://") != strings.HasPrefix(out[0], "https://") {
			return nil, fmt.Errorf("etcd endpoints %s mix http and https: use one scheme for all", strings.Join(out, ","))
		}
	}
	return out, nil
}
