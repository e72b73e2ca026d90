package node

import (
	"errors"
	"log/slog"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// netWatch reports that links, addresses, routes or rules changed. It says only that
// something did: the reader looks at the present state, so a lost message is
// harmless as long as one follows.
type netWatch struct {
	// changed has capacity 1 and coalesces.
	changed chan struct{}
	done    chan struct{}
	broken  atomic.Bool
	log     *slog.Logger
}

// watchNet subscribes in the network namespace of the calling thread.
func watchNet(log *slog.Logger) (*netWatch, error) {
	w := &netWatch{changed: make(chan struct{}, 1), done: make(chan struct{}), log: log}
	links := make(chan netlink.LinkUpdate, 16)
	addrs := make(chan netlink.AddrUpdate, 16)
	routes := make(chan netlink.RouteUpdate, 64)
	rules, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_RULE)
	if err != nil {
		return nil, err
	}
	err = errors.Join(
		netlink.LinkSubscribeWithOptions(links, w.done, netlink.LinkSubscribeOptions{ErrorCallback: w.fail}),
		netlink.AddrSubscribeWithOptions(addrs, w.done, netlink.AddrSubscribeOptions{ErrorCallback: w.fail}),
		netlink.RouteSubscribeWithOptions(routes, w.done, netlink.RouteSubscribeOptions{ErrorCallback: w.fail}),
	)
	if err != nil {
		close(w.done)
		rules.Close()
		return nil, err
	}
	go w.watchRules(rules)
	go pump(links, w, func(netlink.LinkUpdate) bool { return true })
	go pump(addrs, w, func(netlink.AddrUpdate) bool { return true })
	go pump(routes, w, func(u netlink.RouteUpdate) bool {
		return u.Family == unix.AF_INET && u.Table != unix.RT_TABLE_LOCAL && u.Flags&unix.RTM_F_CLONED == 0
	})
	return w, nil
}

func pump[T any](in <-chan T, w *netWatch, relevant func(T) bool) {
	for u := range in {
		if relevant(u) {
			w.notify()
		}
	}
}

func (w *netWatch) notify() {
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// watchRules reads what the kernel says of rules, all of which matter.
func (w *netWatch) watchRules(s *nl.NetlinkSocket) {
	go func() {
		<-w.done
		s.Close()
	}()
	for {
		if _, _, err := s.Receive(); err != nil {
			w.fail(err)
			return
		}
		w.notify()
	}
}

// fail is called when a subscription ends, also by close.
func (w *netWatch) fail(err error) {
	select {
	case <-w.done:
		return
	default:
	}
	w.broken.Store(true)
	w.log.Warn("network change subscription ended; checking periodically until it is renewed", "err", err)
	w.notify()
}

func (w *netWatch) close() { close(w.done) }
