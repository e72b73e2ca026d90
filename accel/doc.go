// Package accel carries the plain packets of an overlay past user space: two
// BPF programs, at the egress of the TUN device and at the ingress of the
// underlay interface, frame and unframe what has a peer in the table. Whatever
// they do not take goes on to the TUN queue or the UDP socket as if they were
// not there, so the packet workers of package engine stay the only judge of
// what is dropped, and why.
//
// Words: a hit is a packet the programs carried; a hold is a reason for which
// they are off duty for a while (a capture, a promiscuous TUN device); a whole
// link carries super-packets without cutting them (a veth); a hop is the
// neighbour on the underlay that a datagram goes to first.
//
// What is in their table is what engine.Table says, minus the peers they must
// not serve. A changed entry is removed before the new table is in force and
// entered after it, so a packet is never sent by an old entry: in between it is
// a miss.
//
// The programs need Linux 6.6 (tcx), CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN, and leave
// with the process that attached them, however it ends.
//
// go generate compiles them (Debian: clang, llvm, libbpf-dev, linux-libc-dev). The objects are
// committed; clang 14.0.6 makes the same bytes of the same source.
package accel

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -target bpfel,bpfeb -cflags "-O2 -g -Wall -Werror -Wno-address-of-packed-member -I/usr/include/x86_64-linux-gnu" -type config -type peer -type hop -type key -type counters -type sample accel bpf/accel.c
//go:generate sh -c "sha256sum bpf/accel.c >bpf/accel.c.sha256"
