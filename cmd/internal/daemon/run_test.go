package daemon

import (
	"context"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func TestASignalThatComesTwiceAtOnceIsOneCleanStop(t *testing.T) {
	ctx, stop := stopContext(context.Background())
	defer stop()
	// A signal to the calling thread is handled before the call returns. One to
	// the process may come after stop, and kill it for the wrong reason.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for range 2 {
		if err := unix.Tgkill(unix.Getpid(), unix.Gettid(), unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		<-ctx.Done() // the second one would have killed this process
	}
}
