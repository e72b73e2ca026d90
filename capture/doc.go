// Package capture turns what the engine's taps copy out of the packet loop into
// packets people can look at: one stream of packets a session, filtered, with
// the tap point, the direction, the peer and the drop reason of each.
//
//	engine rings -> Hub (one goroutine) -> Session (bounded buffer) -> Reader
//
// The Hub runs at the lowest priority and never makes the engine wait; what
// does not fit is lost, and counted exactly, by point. A Session's stream is
// what travels over the API socket; a Reader at the other end decodes it.
// Files are written there, by package pcapng.
package capture
