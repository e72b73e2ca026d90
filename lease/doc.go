// Package lease is the control plane of tweed: it claims one overlay subnet for
// this node in etcd, keeps the claim, and follows the claims of all the others.
//
// Keys and values are flannel's, byte for byte, so that tweed and flannel nodes
// share one prefix:
//
//	<prefix>/config                     the network configuration, JSON, written by the operator
//	<prefix>/subnets/<a.b.c.d>-<len>    one lease: who holds the subnet and how to reach it
//
// What differs is how they are written and read. The words:
//
//	lease        a subnet claimed by a node: one key and its value
//	etcd lease   etcd's time-to-live object the key is attached to
//	reservation  a lease whose key is attached to no etcd lease; it never expires
//	own          the lease of this node; it is never reported as a peer
//	fenced       a write that etcd carries out only if the key is still the one we hold
//	relist       reading every lease at one revision, to start or to repair a watch
//
// Three rules hold everywhere in the package. A peer changes only on positive
// evidence: a valid event, or a complete list at one revision; silence, errors
// and unparsable data change nothing. A key that we do not provably hold is
// never written or deleted. Data read from etcd is hostile: everything is
// bounded and parsed into typed values before it is used.
//
// The package knows nothing of devices, sockets or framings. [Manager.State] is
// what it produces.
package lease
