package pcapng

import "net/netip"

// Link types of a file: what its packets start with (LINKTYPE registry).
const (
	LinkEthernet = 1
	LinkRaw      = 101
	LinkIPv4     = 228
)

// MaxSnapLen is the largest snap length in bytes. It is that of tcpdump.
const MaxSnapLen = 262144

// Header describes a file: its section and its interfaces.
type Header struct {
	// Hardware, OS and Application say what made the file.
	Hardware, OS, Application string
	// Comment is about the whole file.
	Comment string
	// Link is the link type of every interface.
	Link uint16
	// SnapLen is the most bytes kept of a packet, on every interface; 0 means
	// MaxSnapLen.
	SnapLen uint32
	// Interfaces in the order Packet.Interface counts them.
	Interfaces []Interface
}

// Interface describes one source of packets.
type Interface struct {
	Name, Description string
	// Filter is the capture filter in words.
	Filter string
}

// Flags are the epb_flags of a packet.
type Flags uint32

// Flags and the values of their direction field.
const (
	FlagInbound  Flags = 1 // direction: received
	FlagOutbound Flags = 2 // direction: sent
	FlagDirMask  Flags = 3

	// FlagChecksumNotReady: checksums are still to be filled in.
	FlagChecksumNotReady Flags = 1 << 9
	// FlagChecksumValid: checksums have been checked.
	FlagChecksumValid Flags = 1 << 10
	// FlagSuperPacket: a packet before segmentation or after coalescing.
	FlagSuperPacket Flags = 1 << 11
)

// Fields says which optional numbers of a Packet are there.
type Fields uint8

// Fields of a Packet.
const (
	HasID Fields = 1 << iota
	HasQueue
	HasDropCount
)

// Packet is one record of a file.
type Packet struct {
	// Interface is an index into Header.Interfaces.
	Interface int
	// Time is in nanoseconds since 1970 (UTC).
	Time int64
	// Data is what was captured. A Writer cuts it to the snap length.
	Data []byte
	// Length is the length of the packet in bytes before it was cut; a value
	// below len(Data) means len(Data).
	Length int
	// Flags are not written when 0.
	Flags Flags
	// Has says which of ID, Queue and DropCount are written.
	Has Fields
	// ID is the same in all records of one packet.
	ID uint64
	// DropCount is the number of packets lost on this interface since the
	// previous one.
	DropCount uint64
	// Queue is the number of the queue or worker.
	Queue uint32
	// Comment is for people; not written when empty.
	Comment string
}

// length returns the length of the whole packet.
func (p *Packet) length() int { return max(p.Length, len(p.Data)) }

// Statistics are the counters of an interface over a stretch of time.
type Statistics struct {
	// Interface is an index into Header.Interfaces.
	Interface int
	// Time is when the counters were read, Start and End the stretch they
	// cover, all in nanoseconds since 1970 (UTC).
	Time, Start, End int64
	// Received passed the interface, Dropped were lost there for want of room,
	// Accepted passed the filter, OSDropped were lost outside of the program
	// and Delivered reached the file. All in packets.
	Received, Dropped, Accepted, OSDropped, Delivered uint64
}

// Name gives an address a name that tools show in its place.
type Name struct {
	Addr netip.Addr
	Name string
}
