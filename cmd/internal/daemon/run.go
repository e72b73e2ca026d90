package daemon

import (
	"context"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"

	"tweed/node"
)

// secondSignalAfter is how long after the first signal another one counts: what
// is sent to a process and to its group (timeout, a terminal under a wrapper)
// comes twice at once and asks for one clean stop.
const secondSignalAfter = time.Second

// Run runs a node until it fails or the process is told to stop. SIGINT and
// SIGTERM stop it cleanly, which is not an error; a later second one kills the
// process, should the clean way out hang.
func Run(ctx context.Context, n *node.Node) error {
	tuneCollector()
	ctx, stop := stopContext(ctx)
	defer stop()
	return n.Run(ctx)
}

// stopContext ends with the first signal. From secondSignalAfter on, or once
// stop is called, signals do again what they do without it.
func stopContext(ctx context.Context) (_ context.Context, stop func()) {
	ctx, stop = signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
	context.AfterFunc(ctx, func() { time.AfterFunc(secondSignalAfter, stop) })
	return ctx, stop
}
