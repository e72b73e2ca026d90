package daemon

import (
	"context"
	"os/signal"

	"golang.org/x/sys/unix"

	"tweed/node"
)

// Run runs a node until it fails or the process is told to stop. SIGINT and
// SIGTERM stop it cleanly, which is not an error; a second one kills the
// process, should the clean way out hang.
func Run(ctx context.Context, n *node.Node) error {
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	return n.Run(ctx)
}
