// SPDX-License-Identifier: GPL-2.0
//
// The in-kernel part of tweed: two tcx programs (Linux 6.6) that carry the
// plain cases past user space.
//
//   send     egress of the TUN device: encapsulates and sends what has a peer
//   receive  ingress of the underlay interface: takes the framing off and
//            hands the packet to the TUN device
//
// Neither ever drops a packet it could have passed on. Whatever is not a plain
// case continues unchanged: to the TUN queue or to the UDP socket, where the
// packet workers judge it, count it and answer it. The rules are those of
// engine/tx.go and engine/rx.go; a rule that cannot be checked here is a
// packet passed on.
//
// Datagrams sent here have no UDP checksum (RFC 7348 section 4.1 asks for none),
// those of the workers have one. The receiver tells them apart by it: without a
// checksum, an inner checksum is complete or known to the kernel as partial, so
// the packet may stay in the kernel; with one, it may have been left out on
// purpose, and the socket is the way. A flow therefore keeps to one way.
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/udp.h>

#include <stddef.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define FOR_US 0 // PACKET_HOST of skb->pkt_type: sent to our MAC address

// Verdicts (enum tcx_action_base, Linux 6.6).
#define PASS (-1) // TCX_NEXT
#define DROP 2	  // TCX_DROP

// Flags of struct config.
#define SENDING 1   // the send program is on duty
#define RECEIVING 2 // the receive program is
#define WHOLE 4     // the underlay carries super-packets without cutting them

// Flags of struct peer.
#define FOREIGN 1 // the peer's kernel merges datagrams without checksum itself

#define FRAMING_UDP 0
#define FRAMING_VXLAN 1
#define VXLAN_FLAGS 0x08000000

// After a super-packet that went to the workers, the packets of its protocol to
// that peer follow it for this long, so that none overtakes it. In ns.
#define BULK 20000000ull

// How often a packet takes the kernel's way to the neighbour although the hop's
// address is known: so the kernel goes on to check that it is there. In ns.
#define ASK 250000000ull

// What stands before the packet, behind the outer Ethernet header.
#define OUTER (sizeof(struct iphdr) + sizeof(struct udphdr))
#define PREFIX 22 // VXLAN and Ethernet headers

struct vxlan {
	__be32 flags, vni;
	__u8 dst[6], src[6];
	__be16 type;
} __attribute__((packed));

// outer is a datagram up to the inner packet, of either framing.
struct outer {
	struct ethhdr eth;
	struct iphdr ip;
	struct udphdr udp;
	union {
		struct vxlan vx;
		struct iphdr ip_in; // of the udp framing, which has nothing between
	} __attribute__((packed));
} __attribute__((packed));

// config is what the programs know of their own node. Addresses, ports and
// words of headers are in network byte order.
struct config {
	__u32 flags;
	__u32 underlay, tun; // interface indexes
	__be32 local;	     // underlay address
	__be32 own, mask;    // own subnet
	__be32 vni;	     // second word of the VXLAN header
	__be16 vxlan_port;   // received; 0 for a framing not received
	__be16 udp_port;
	__be16 udp_source; // source ports of what is sent
	__be16 vxlan_sources[4];
	__u8 mac[6];
	__u8 source[6]; // of frames
	__u32 snap; // bytes of a datagram's payload that a capture wants; 0: there is none
};

struct key {
	__u32 bits;
	__be32 addr;
};

// peer is an entry. One of zeros belongs to a subnet that is left to the workers
// and hides the shorter prefixes around it: no packet fits its MTU and no
// datagram comes from its address.
struct peer {
	__be32 addr;
	__be16 port;
	__u8 framing;
	__u8 flags;
	__u32 mtu; // bytes, of the inner packet
	__be32 vni;
	__u8 mac[6];
	__u8 pad[2];
	__u32 hop; // index of the first hop to addr; 0: one that is not known
	__u8 pad2[4];
	__u64 bulk[2]; // ns, when the last super-packet of TCP, of UDP went to the workers
};

// hop is a neighbour on the underlay. User space writes mac, the programs the rest.
struct hop {
	__u64 mac;   // Ethernet address, two bytes of zeros; 0: only the kernel knows
	__u64 asked; // ns, when a packet last took the kernel's way
};

// counters are inner packets as on the wire: a super-packet counts as its
// segments.
struct counters {
	__u64 sent, sent_bytes;
	__u64 failed;
	__u64 received, received_bytes;
	__u64 unseen_sent, unseen_received; // by a capture, for want of room
};

// sample is a carried packet for a capture. The payload of its datagram, framing
// included, follows: a super-packet whole, others cut to the snap length.
struct sample {
	__u64 time;    // CLOCK_MONOTONIC, ns
	__u32 length;  // bytes of the payload before it was cut
	__u32 stored;  // bytes that follow
	__be32 peer, local;
	__be16 peer_port, local_port;
	__u16 gso;     // payload of each segment; 0 for one packet
	__u8 prefix;   // bytes before the inner packet
	__u8 receive;
	__u8 ecn;      // of the outer header
	__u8 pad[7];
};

const struct sample *unused __attribute__((unused)); // keeps the type for bpf2go

// A place in the ring is reserved in one of three sizes.
#define SMALL 256
#define MEDIUM 2048
#define LARGE 65536

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct config);
} configs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1 << 17);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct key);
	__type(value, struct peer);
} peers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct hop);
} hops SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counters);
} counted SEC(".maps");

// taps holds the ring of the capture that runs, if one does.
struct ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 24);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct ring);
} taps SEC(".maps");

// fill reserves a place of one size and copies the packet there.
static __always_inline int fill(void *ring, struct __sk_buff *skb, struct sample *head, __u32 size)
{
	struct sample *s = bpf_ringbuf_reserve(ring, sizeof(*s) + size, 0);

	if (!s)
		return 0;
	*s = *head;
	// 1 to size, in a form that the verifier follows.
	__u32 n = ((head->stored - 1) & (size - 1)) + 1;
	if (bpf_skb_load_bytes(skb, ETH_HLEN + OUTER, s + 1, n)) {
		bpf_ringbuf_discard(s, BPF_RB_NO_WAKEUP);
		return 0;
	}
	bpf_ringbuf_submit(s, BPF_RB_NO_WAKEUP);
	return 1;
}

// show gives a capture the datagram in skb; head is filled but for the lengths.
static __always_inline int show(struct __sk_buff *skb, struct config *c, struct sample *head)
{
	__u32 zero = 0;
	void *ring = bpf_map_lookup_elem(&taps, &zero);

	if (!ring)
		return 0;
	head->time = bpf_ktime_get_ns();
	head->length = skb->len - ETH_HLEN - OUTER;
	head->stored = head->length;
	if (!head->gso && head->stored > c->snap)
		head->stored = c->snap;
	if (head->stored <= SMALL)
		return fill(ring, skb, head, SMALL);
	if (head->stored <= MEDIUM)
		return fill(ring, skb, head, MEDIUM);
	return fill(ring, skb, head, LARGE);
}

static __always_inline struct peer *peer_of(__be32 addr)
{
	struct key k = {.bits = 32, .addr = addr};

	return bpf_map_lookup_elem(&peers, &k);
}

// linear makes the first n bytes readable and returns the start, or NULL when
// the packet is shorter.
static __always_inline void *linear(struct __sk_buff *skb, __u32 n)
{
	if ((void *)(long)skb->data + n <= (void *)(long)skb->data_end)
		return (void *)(long)skb->data;
	if (skb->len < n || bpf_skb_pull_data(skb, n))
		return 0;
	if ((void *)(long)skb->data + n > (void *)(long)skb->data_end)
		return 0;
	return (void *)(long)skb->data;
}

static __always_inline __u16 header_sum(void *ip)
{
	__u16 *w = ip;
	__u32 sum = 0;

#pragma unroll
	for (int i = 0; i < 10; i++)
		sum += w[i];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

// follows reports whether a packet must go after one that went to the workers.
static __always_inline int follows(__u64 bulk)
{
	return bulk && bpf_ktime_get_coarse_ns() - bulk < BULK;
}

// neighbour returns the Ethernet address to send to, as struct hop has it, and 0
// when the kernel shall look for it.
static __always_inline __u64 neighbour(__u32 index)
{
	struct hop *h = index ? bpf_map_lookup_elem(&hops, &index) : 0;
	__u64 mac = h ? *(volatile __u64 *)&h->mac : 0;

	if (!mac)
		return 0;
	__u64 now = bpf_ktime_get_coarse_ns();
	if (now - h->asked < ASK)
		return mac;
	h->asked = now;
	return 0;
}

// segments returns how many packets of the wire a packet stands for; size is
// its gso_size.
static __always_inline __u32 segments(__u32 size, __u32 len, __u32 headers)
{
	if (!size || len <= headers)
		return 1;
	return (len - headers + size - 1) / size;
}

SEC("tcx/egress")
int send(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct config *c = bpf_map_lookup_elem(&configs, &zero);
	struct counters *n = bpf_map_lookup_elem(&counted, &zero);

	if (!c || !n || !(c->flags & SENDING) || skb->protocol != bpf_htons(ETH_P_IP))
		return PASS;
	struct iphdr *ip = linear(skb, sizeof(*ip));
	if (!ip || ip->version != 4 || ip->ihl != 5 || bpf_ntohs(ip->tot_len) != skb->len)
		return PASS;
	struct iphdr in = *ip;
	struct peer *p = peer_of(in.daddr);
	if (!p || in.ttl < (p->framing == FRAMING_UDP ? 2 : 1))
		return PASS;

	__u8 protocol = in.protocol, ecn = in.tos & 3;
	__be32 mix = in.saddr ^ in.daddr;
	__u32 headers = sizeof(in);
	int fragment = in.frag_off & bpf_htons(0x3fff);
	if (protocol == IPPROTO_TCP && !fragment) {
		__u8 *b = linear(skb, 40);
		if (!b)
			return PASS;
		mix ^= *(__be32 *)(b + 20);
		headers += (b[32] >> 4) * 4;
	} else if (protocol == IPPROTO_UDP && !fragment) {
		__u8 *b = linear(skb, 28);
		if (!b)
			return PASS;
		mix ^= *(__be32 *)(b + 20);
	}
	__u32 len = skb->len, gso = skb->gso_size;
	__u32 size = p->framing == FRAMING_VXLAN ? OUTER + PREFIX : OUTER;
	__u64 *bulk = &p->bulk[protocol == IPPROTO_UDP];
	if (gso && (protocol != IPPROTO_TCP || fragment || headers + gso > p->mtu || len + size > 0xffff ||
		    !(c->flags & WHOLE || p->flags & FOREIGN))) {
		*bulk = bpf_ktime_get_coarse_ns();
		return PASS;
	}
	if (!gso && (len > p->mtu || len + size > 0xffff))
		return PASS;
	if ((protocol == IPPROTO_TCP || protocol == IPPROTO_UDP) && follows(*bulk))
		return PASS;
	__u32 count = segments(gso, len, headers);

	struct outer o = {};
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP;
	if (p->framing == FRAMING_VXLAN) {
		// The kernel cuts super-packets behind the inner Ethernet header, so
		// only that counts as the second layer (net/ipv4/udp_offload.c).
		flags |= BPF_F_ADJ_ROOM_ENCAP_L2(ETH_HLEN) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH;
		o.vx.flags = bpf_htonl(VXLAN_FLAGS);
		o.vx.vni = p->vni;
		__builtin_memcpy(o.vx.dst, p->mac, 6);
		__builtin_memcpy(o.vx.src, c->mac, 6);
		o.vx.type = bpf_htons(ETH_P_IP);
		o.udp.source = c->vxlan_sources[bpf_ntohl(mix) * 0x9e3779b1 >> 30];
	} else {
		// The TTL is the high byte of its word (RFC 1624).
		__u32 sum = in.check + bpf_htons(0x0100);
		in.check = sum + (sum >= 0xffff);
		in.ttl--;
		o.ip_in = in;
		o.udp.source = c->udp_source;
	}
	__u64 mac = neighbour(p->hop); // without one, redirect_neigh writes the addresses
	__builtin_memcpy(o.eth.h_dest, &mac, 6);
	__builtin_memcpy(o.eth.h_source, c->source, 6);
	o.eth.h_proto = bpf_htons(ETH_P_IP);
	o.ip.version = 4;
	o.ip.ihl = 5;
	o.ip.tos = ecn; // RFC 6040 section 4.1, normal mode
	o.ip.tot_len = bpf_htons(len + size);
	o.ip.id = bpf_get_prandom_u32();
	o.ip.ttl = 64;
	o.ip.protocol = IPPROTO_UDP;
	o.ip.saddr = c->local;
	o.ip.daddr = p->addr;
	o.ip.check = header_sum(&o.ip);
	o.udp.dest = p->port;
	o.udp.len = bpf_htons(len + size - sizeof(o.ip));

	if (bpf_skb_adjust_room(skb, size, BPF_ADJ_ROOM_MAC, flags))
		return PASS;
	// From here on the packet is no longer what the workers could take.
	if (bpf_skb_change_head(skb, ETH_HLEN, 0))
		goto failed;
	if (bpf_skb_store_bytes(skb, 0, &o, size == OUTER ? ETH_HLEN + OUTER + sizeof(in) : sizeof(o), 0))
		goto failed;
	if (c->snap) {
		struct sample s = {
			.peer = o.ip.daddr, .peer_port = o.udp.dest, .local = o.ip.saddr, .local_port = o.udp.source,
			.gso = gso, .prefix = size - OUTER, .ecn = ecn,
		};
		if (!show(skb, c, &s))
			n->unseen_sent += count;
	}
	// The mark is about the packet inside: rules that route by it do not mean ours.
	skb->mark = 0;
	n->sent += count;
	n->sent_bytes += len + (__u64)(count - 1) * headers;
	return mac ? bpf_redirect(c->underlay, 0) : bpf_redirect_neigh(c->underlay, 0, 0, 0);
failed:
	n->failed += count;
	return DROP;
}

static __always_inline int differs(__u8 *a, __u8 *b)
{
	return (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]) | (a[5] ^ b[5]);
}

// framed checks the vxlan prefix as encap.VXLANReceiver does.
static __always_inline int framed(struct vxlan *v, struct config *c)
{
	if (v->flags != bpf_htonl(VXLAN_FLAGS) || v->vni != c->vni || v->type != bpf_htons(ETH_P_IP))
		return 0;
	if (differs(v->dst, c->mac) || !differs(v->src, c->mac) || (v->src[0] & 1))
		return 0;
	return v->src[0] | v->src[1] | v->src[2] | v->src[3] | v->src[4] | v->src[5];
}

SEC("tcx/ingress")
int receive(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct config *c = bpf_map_lookup_elem(&configs, &zero);
	struct counters *n = bpf_map_lookup_elem(&counted, &zero);

	if (!c || !n || !(c->flags & RECEIVING) || skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present ||
	    skb->pkt_type != FOR_US)
		return PASS;
	__u32 size = ETH_HLEN + OUTER;
	struct outer *o = linear(skb, ETH_HLEN + OUTER + sizeof(struct iphdr));
	if (!o || o->ip.version != 4 || o->ip.ihl != 5 || o->ip.protocol != IPPROTO_UDP || o->ip.daddr != c->local ||
	    (o->ip.frag_off & bpf_htons(0x3fff)) || o->udp.check || !o->udp.dest)
		return PASS;
	__u32 outer_len = bpf_ntohs(o->ip.tot_len);
	if (outer_len + ETH_HLEN != skb->len || bpf_ntohs(o->udp.len) + sizeof(o->ip) != outer_len)
		return PASS;
	__be32 sender = o->ip.saddr;
	__be16 sender_port = o->udp.source, port = o->udp.dest;
	__u8 ecn = o->ip.tos & 3;
	struct iphdr *ip;
	if (o->udp.dest == c->vxlan_port) {
		size += PREFIX;
		o = linear(skb, sizeof(*o) + sizeof(*ip));
		if (!o || !framed(&o->vx, c))
			return PASS;
		ip = (void *)o + sizeof(*o);
	} else if (o->udp.dest == c->udp_port) {
		ip = (void *)o + ETH_HLEN + OUTER;
	} else {
		return PASS;
	}
	__u32 len = skb->len - size;
	__u32 first = bpf_ntohl(ip->saddr) >> 24;
	if (ip->version != 4 || ip->ihl != 5 || bpf_ntohs(ip->tot_len) != len || !ip->ttl || !first || first == 127 || first >= 224)
		return PASS;
	if ((ip->saddr & c->mask) == c->own || (ip->daddr & c->mask) != c->own)
		return PASS;
	if (ecn && ecn != (ip->tos & 3))
		return PASS;
	struct peer *p = peer_of(ip->saddr);
	if (!p || p->addr != sender)
		return PASS;
	__u32 headers = sizeof(*ip), gso = skb->gso_size;
	if (gso) {
		if (ip->protocol != IPPROTO_TCP || (ip->frag_off & bpf_htons(0x3fff)))
			return PASS;
		__u8 *b = linear(skb, ETH_HLEN + OUTER + PREFIX + 40);
		if (!b)
			return PASS;
		headers += (b[size + 32] >> 4) * 4;
	}
	__u32 count = segments(gso, len, headers);
	if (c->snap) {
		struct sample s = {
			.peer = sender, .peer_port = sender_port, .local = c->local, .local_port = port,
			.gso = gso, .prefix = size - ETH_HLEN - OUTER, .ecn = ecn, .receive = 1,
		};
		if (!show(skb, c, &s))
			n->unseen_received += count;
	}
	if (bpf_skb_adjust_room(skb, -(__s32)(size - ETH_HLEN), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO))
		return PASS;
	skb->mark = 0; // as of what a worker writes
	n->received += count;
	n->received_bytes += len + (__u64)(count - 1) * headers;
	return bpf_redirect(c->tun, BPF_F_INGRESS);
}

char _license[] SEC("license") = "GPL";
