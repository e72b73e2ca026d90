// Package pcapng writes capture files that every tool opens without a warning,
// and reads capture files of other tools.
//
// Two writers share the type Packet: Writer for pcapng, where a packet carries
// its direction, an id common to its records inside and outside the tunnel, the
// number of packets lost before it and a comment such as the reason it was
// dropped; and PcapWriter for the classic format, which has none of these. Reader
// reads both formats in either byte order, in bounded memory whatever the input.
//
// The pcapng packages in use elsewhere write fewer options and allocate for them
// on every packet; the writers here do not allocate after they are made.
//
// Format: draft-ietf-opsawg-pcapng-03 (pcapng) and draft-ietf-opsawg-pcap-05 (classic).
//
// # What libpcap insists on
//
// libpcap, and so tcpdump, refuses a file in which two interfaces differ in link
// type or snap length. Both are therefore properties of the whole file here
// (Header). It also refuses LINKTYPE_RAW on a second interface, since it
// compares that number with its own for the same thing; LINKTYPE_IPV4 and
// LINKTYPE_ETHERNET have but one.
//
// Glossary: a block is the unit of a pcapng file; a section is what one section
// header block governs, usually the file; an interface is a numbered source of
// packets, here a tap point; an option is a tagged value at the end of a block.
package pcapng
