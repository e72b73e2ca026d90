package lease

import (
	"context"
	"errors"
	"fmt"
	"io"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

// maxWatchMessage bounds one message of a watch, in bytes.
const maxWatchMessage = 256 << 20

// watchStream is one gRPC watch stream with two watches on it: the leases and the
// configuration. It is used instead of clientv3's Watcher because that one
// resumes on its own from revisions it was only told about, and buffers without a
// bound; here the consumer decides when to resume and etcd waits for it.
type watchStream struct {
	// responses delivers what etcd sends, in order. It is closed at the end; err
	// then says why.
	responses chan *pb.WatchResponse
	err       error

	progress chan struct{}
	cancel   context.CancelFunc
	done     chan struct{}
	gen      int // generation of the client, valid once responses delivered or closed
}

// watch starts watching from the given revisions, both inclusive. It returns at
// once, connected or not. The first response is the creation of the watch on the
// leases, the second that of the watch on the configuration.
func (r *Registry) watch(ctx context.Context, leasesFrom, configFrom int64) *watchStream {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	s := &watchStream{
		responses: make(chan *pb.WatchResponse),
		progress:  make(chan struct{}, 1),
		cancel:    cancel,
		done:      make(chan struct{}),
	}
	go func() {
		defer close(s.done)
		defer close(s.responses)
		defer cancel()
		s.err = r.serveWatch(ctx, s, leasesFrom, configFrom)
	}()
	return s
}

func (r *Registry) serveWatch(ctx context.Context, s *watchStream, leasesFrom, configFrom int64) error {
	c, gen, err := r.connect(ctx)
	s.gen = gen
	if err != nil {
		return err
	}
	stream, err := pb.NewWatchClient(c.ActiveConnection()).Watch(ctx,
		grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(maxWatchMessage))
	if err != nil {
		return err
	}
	for _, create := range []*pb.WatchCreateRequest{
		{Key: []byte(r.leases), RangeEnd: []byte(clientv3.GetPrefixRangeEnd(r.leases)), StartRevision: leasesFrom},
		{Key: []byte(r.config), StartRevision: configFrom},
	} {
		err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: create}})
		if err != nil && !errors.Is(err, io.EOF) { // EOF: Recv has the reason
			return err
		}
	}
	go s.sendProgress(ctx, stream)
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		select {
		case s.responses <- resp:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// sendProgress sends the progress requests apart from the receiver, which must
// never wait for a full connection.
func (s *watchStream) sendProgress(ctx context.Context, stream pb.Watch_WatchClient) {
	ask := &pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}}
	for {
		select {
		case <-s.progress:
			if stream.Send(ask) != nil {
				return // Recv fails as well and has the reason
			}
		case <-ctx.Done():
			return
		}
	}
}

// requestProgress asks etcd for a sign of life. It never blocks.
func (s *watchStream) requestProgress() {
	select {
	case s.progress <- struct{}{}:
	default:
	}
}

// close ends the stream and waits for its receiver.
func (s *watchStream) close() {
	s.cancel()
	for range s.responses {
	}
	<-s.done
}

// watchEnd is why etcd ended a watch by a response, nil if it did not.
func watchEnd(resp *pb.WatchResponse) error {
	switch {
	case resp.CompactRevision != 0:
		return errCompacted
	case resp.Canceled && resp.CancelReason != "":
		return fmt.Errorf("watch canceled by etcd: %s", resp.CancelReason)
	case resp.Canceled:
		return errors.New("watch canceled by etcd")
	}
	return nil
}

// isProgress reports whether a response carries nothing but a revision.
func isProgress(resp *pb.WatchResponse) bool {
	return len(resp.Events) == 0 && !resp.Created && !resp.Canceled && resp.CompactRevision == 0
}
