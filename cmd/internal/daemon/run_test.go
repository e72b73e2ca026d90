package daemon

import (
	"context"
	"testing"

	"golang.org/x/sys/unix"
)

func TestASignalThatComesTwiceAtOnceIsOneCleanStop(t *testing.T) {
	ctx, stop := stopContext(context.Background())
	defer stop()
	for range 2 {
		if err := unix.Kill(unix.Getpid(), unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		<-ctx.Done() // the second one would have killed this process
	}
}
