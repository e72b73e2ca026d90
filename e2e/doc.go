// Package e2e tests the built commands from outside: real TUN devices and real
// etcd in network namespaces, and a kernel vxlan device as an independent peer.
// The rows it speaks of are the behaviours a flannel user relies on.
//
// The tests need root, or a user namespace, which they then make for
// themselves, and an openable /dev/net/tun. What cannot run says why, and
// fails under CI=true. Sizes and durations fit a small machine; they grow with
//
//	TWEED_E2E_BYTES      bytes of each TCP transfer (default 20 MB)
//	TWEED_E2E_DATAGRAMS  number of UDP datagram sizes from 1 to 60000 bytes;
//	                     60000 means every size (default 300)
//	TWEED_E2E_OUTAGE     how long etcd stays away, such as 60s (default 6s)
package e2e
