package pcapng

import (
	"encoding/binary"
	"math"
	"strings"
)

// Block types.
const (
	blockSection    = 0x0A0D0D0A
	blockInterface  = 1
	blockObsolete   = 2 // the packet block EPB replaced
	blockSimple     = 3
	blockNames      = 4
	blockStatistics = 5
	blockEnhanced   = 6
)

// Options, by the block they belong to.
const (
	optEnd     = 0
	optComment = 1

	shbHardware = 2
	shbOS       = 3
	shbUserAppl = 4

	ifName        = 2
	ifDescription = 3
	ifTSResol     = 9
	ifFilter      = 11
	ifTSOffset    = 14

	epbFlags     = 2
	epbDropCount = 4
	epbPacketID  = 5
	epbQueue     = 6

	isbStartTime    = 2
	isbEndTime      = 3
	isbIfRecv       = 4
	isbIfDrop       = 5
	isbFilterAccept = 6
	isbOSDrop       = 7
	isbUsrDeliv     = 8

	recordIPv4 = 1
	recordIPv6 = 2
)

const (
	byteOrderMagic = 0x1A2B3C4D
	// maxOption is the longest value of an option, in bytes.
	maxOption = math.MaxUint16
)

var le = binary.LittleEndian

// open appends the head of a block, whose length close fills in.
func open(b []byte, kind uint32) []byte {
	b = le.AppendUint32(b, kind)
	return le.AppendUint32(b, 0)
}

// closeBlock ends the block that starts at b[start].
func closeBlock(b []byte, start int) []byte {
	n := uint32(len(b) - start + 4)
	le.PutUint32(b[start+4:], n)
	return le.AppendUint32(b, n)
}

// pad appends zeros up to the next multiple of four after n bytes.
func pad(b []byte, n int) []byte {
	for ; n%4 != 0; n++ {
		b = append(b, 0)
	}
	return b
}

func appendOption(b []byte, code uint16, n int) []byte {
	b = le.AppendUint16(b, code)
	return le.AppendUint16(b, uint16(n))
}

// appendText appends a text option, cut to what an option holds, or nothing
// when the text is empty.
func appendText(b []byte, code uint16, text string) []byte {
	if text == "" {
		return b
	}
	text = cutText(text, maxOption)
	b = appendOption(b, code, len(text))
	b = append(b, text...)
	return pad(b, len(text))
}

// cutText cuts a text to n bytes without leaving half a character.
func cutText(text string, n int) string {
	if len(text) <= n {
		return text
	}
	return strings.ToValidUTF8(text[:n], "")
}

func appendUint32(b []byte, code uint16, v uint32) []byte {
	return le.AppendUint32(appendOption(b, code, 4), v)
}

func appendUint64(b []byte, code uint16, v uint64) []byte {
	return le.AppendUint64(appendOption(b, code, 8), v)
}

func endOptions(b []byte) []byte { return appendOption(b, optEnd, 0) }

// AppendHeader appends the section header block and the interface description
// blocks of h. It does not check h; NewWriter does.
func AppendHeader(b []byte, h *Header) []byte {
	start := len(b)
	b = open(b, blockSection)
	b = le.AppendUint32(b, byteOrderMagic)
	b = le.AppendUint16(b, 1) // version 1.0
	b = le.AppendUint16(b, 0)
	b = le.AppendUint64(b, math.MaxUint64) // section length: up to the end
	b = appendText(b, shbHardware, h.Hardware)
	b = appendText(b, shbOS, h.OS)
	b = appendText(b, shbUserAppl, h.Application)
	b = appendText(b, optComment, h.Comment)
	b = closeBlock(endOptions(b), start)
	for i := range h.Interfaces {
		b = appendInterface(b, h, &h.Interfaces[i])
	}
	return b
}

func appendInterface(b []byte, h *Header, i *Interface) []byte {
	start := len(b)
	b = open(b, blockInterface)
	b = le.AppendUint16(b, h.Link)
	b = le.AppendUint16(b, 0)
	b = le.AppendUint32(b, h.snapLen())
	b = appendText(b, ifName, i.Name)
	b = appendText(b, ifDescription, i.Description)
	if i.Filter != "" {
		text := cutText(i.Filter, maxOption-1)
		b = appendOption(b, ifFilter, 1+len(text))
		b = append(b, 0) // what follows is a string in libpcap's language
		b = append(b, text...)
		b = pad(b, 1+len(text))
	}
	b = appendOption(b, ifTSResol, 1)
	b = append(b, 9, 0, 0, 0) // 10^-9 s
	return closeBlock(endOptions(b), start)
}

func (h *Header) snapLen() uint32 {
	if h.SnapLen == 0 {
		return MaxSnapLen
	}
	return h.SnapLen
}

// appendTime appends a timestamp of 64 bits, the upper half first in either
// byte order. Times before 1970 become 0.
func appendTime(b []byte, ns int64) []byte {
	t := uint64(max(ns, 0))
	b = le.AppendUint32(b, uint32(t>>32))
	return le.AppendUint32(b, uint32(t))
}

// AppendPacket appends the enhanced packet block of p, with all of p.Data.
func AppendPacket(b []byte, p *Packet) []byte {
	start := len(b)
	b = open(b, blockEnhanced)
	b = le.AppendUint32(b, uint32(p.Interface))
	b = appendTime(b, p.Time)
	b = le.AppendUint32(b, uint32(len(p.Data)))
	b = le.AppendUint32(b, uint32(p.length()))
	b = append(b, p.Data...)
	b = pad(b, len(p.Data))
	options := len(b)
	if p.Flags != 0 {
		b = appendUint32(b, epbFlags, uint32(p.Flags))
	}
	if p.Has&HasDropCount != 0 {
		b = appendUint64(b, epbDropCount, p.DropCount)
	}
	if p.Has&HasID != 0 {
		b = appendUint64(b, epbPacketID, p.ID)
	}
	if p.Has&HasQueue != 0 {
		b = appendUint32(b, epbQueue, p.Queue)
	}
	b = appendText(b, optComment, p.Comment)
	if len(b) > options {
		b = endOptions(b)
	}
	return closeBlock(b, start)
}

// AppendStatistics appends an interface statistics block.
func AppendStatistics(b []byte, s *Statistics) []byte {
	start := len(b)
	b = open(b, blockStatistics)
	b = le.AppendUint32(b, uint32(s.Interface))
	b = appendTime(b, s.Time)
	b = appendTime(appendOption(b, isbStartTime, 8), s.Start)
	b = appendTime(appendOption(b, isbEndTime, 8), s.End)
	b = appendUint64(b, isbIfRecv, s.Received)
	b = appendUint64(b, isbIfDrop, s.Dropped)
	b = appendUint64(b, isbFilterAccept, s.Accepted)
	b = appendUint64(b, isbOSDrop, s.OSDropped)
	b = appendUint64(b, isbUsrDeliv, s.Delivered)
	return closeBlock(endOptions(b), start)
}

// AppendNames appends a name resolution block. Names that are empty or contain
// a zero byte are left out.
func AppendNames(b []byte, names []Name) []byte {
	start := len(b)
	b = open(b, blockNames)
	for _, n := range names {
		addr := n.Addr.Unmap()
		name := cutText(n.Name, maxOption-17)
		if name == "" || strings.IndexByte(name, 0) >= 0 || !addr.IsValid() {
			continue
		}
		kind := uint16(recordIPv4)
		if addr.Is6() {
			kind = recordIPv6
		}
		size := addr.BitLen()/8 + len(name) + 1
		b = appendOption(b, kind, size)
		b = append(b, addr.AsSlice()...)
		b = append(b, name...)
		b = append(b, 0)
		b = pad(b, size)
	}
	return closeBlock(endOptions(b), start)
}
