package node

import "tweed/netns"

// A network namespace belongs to a thread. A node lives in the namespace of
// the thread that called Run; work that runs elsewhere and opens sockets or
// starts programs (iptables) has to be put there explicitly.

// goIn runs f in a goroutine on a thread inside home. When the whole process
// is there anyway, as it is in the daemons, nothing is entered: setns needs
// CAP_SYS_ADMIN, and a node needs only CAP_NET_ADMIN. f is told when the
// namespace could not be entered.
func goIn(home *netns.Namespace, f func(err error)) {
	go func() {
		if inside(home) {
			f(nil)
			return
		}
		entered := false
		err := home.Do(func() error {
			entered = true
			f(nil)
			return nil
		})
		if !entered {
			f(err)
		}
	}()
}

// inside reports whether the process as a whole is in home.
func inside(home *netns.Namespace) bool {
	process, err := netns.Open("/proc/self/ns/net")
	if err != nil {
		return false
	}
	defer process.Close()
	a, errA := process.ID()
	b, errB := home.ID()
	return errA == nil && errB == nil && a == b
}
