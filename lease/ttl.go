package lease

import (
	"context"
	"errors"
	"math"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

// grant makes an etcd lease.
func (r *Registry) grant(ctx context.Context, ttl time.Duration) (int64, error) {
	var id clientv3.LeaseID
	err := r.call(ctx, r.writeTimeout, func(ctx context.Context, c *clientv3.Client) error {
		resp, err := c.Grant(ctx, int64(math.Ceil(ttl.Seconds())))
		if err == nil {
			id = resp.ID
		}
		return err
	})
	return int64(id), err
}

// revoke ends an etcd lease; one that is gone already is no error.
func (r *Registry) revoke(ctx context.Context, id int64) error {
	err := r.call(ctx, r.writeTimeout, func(ctx context.Context, c *clientv3.Client) error {
		_, err := c.Revoke(ctx, clientv3.LeaseID(id))
		return err
	})
	if errors.Is(err, errLeaseGone) {
		return nil
	}
	return err
}

// revokeUnused ends an etcd lease that no key is attached to any more. It would
// end by itself; this keeps etcd tidy.
func (r *Registry) revokeUnused(ctx context.Context, id int64) error {
	info, err := r.leaseInfo(ctx, id)
	if err != nil || !info.alive || info.keys > 0 {
		return err
	}
	return r.revoke(ctx, id)
}

// leaseInfo is what etcd knows of an etcd lease.
type leaseInfo struct {
	alive   bool
	granted time.Duration
	keys    int // keys attached to it
}

func (r *Registry) leaseInfo(ctx context.Context, id int64) (leaseInfo, error) {
	var info leaseInfo
	err := r.call(ctx, r.readTimeout, func(ctx context.Context, c *clientv3.Client) error {
		resp, err := c.TimeToLive(ctx, clientv3.LeaseID(id), clientv3.WithAttachedKeys())
		if err == nil {
			info = leaseInfo{
				alive:   resp.TTL > 0,
				granted: time.Duration(resp.GrantedTTL) * time.Second,
				keys:    len(resp.Keys),
			}
		}
		return err
	})
	if errors.Is(err, errLeaseGone) {
		return leaseInfo{}, nil
	}
	return info, err
}

// keepAlive renews an etcd lease once. errLeaseGone is the only answer that says
// the lease is lost; any other error says nothing about it.
func (r *Registry) keepAlive(ctx context.Context, id int64) error {
	return r.call(ctx, r.readTimeout, func(ctx context.Context, c *clientv3.Client) error {
		// The client's own KeepAlive hides whether a renewal was refused or only
		// not answered, and KeepAliveOnce retries without a pause.
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := pb.NewLeaseClient(c.ActiveConnection()).LeaseKeepAlive(ctx, grpc.WaitForReady(true))
		if err != nil {
			return err
		}
		if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil {
			return err
		}
		resp, err := stream.Recv()
		if err == nil && resp.TTL <= 0 {
			err = errLeaseGone
		}
		return err
	})
}
