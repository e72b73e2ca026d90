package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"tweed/capture"
	"tweed/capture/pcapng"
	"tweed/engine/tap"
)

// Formats of capture files.
const (
	formatPcapng = "pcapng"
	formatPcap   = "pcap"
)

// naming is how several files of one capture are called.
type naming uint8

const (
	oneFile     naming = iota
	dumpcapRing        // name_00001_20261121101500.pcapng
	tcpdumpRing        // -C, -G and -W
)

// filePlan says where packets are written and when the next file begins.
type filePlan struct {
	path   string // "-" is out
	out    io.Writer
	format string
	naming naming
	// next is when to go on to the next file; its files is how many to keep.
	next captureLimits
	// stopFiles ends the capture after so many files. 0 is no limit.
	stopFiles int
	// wrap is -W with -C: how many files are written over in turn.
	wrap int
}

// errEnough ends a capture that reached its limit of files.
var errEnough = errors.New("enough files")

// packetFile is what both formats have in common.
type packetFile interface {
	WritePacket(*pcapng.Packet) error
	Flush() error
	Size() int64
}

// captureFiles writes packets to one file after the other.
type captureFiles struct {
	plan   filePlan
	hello  capture.Hello
	points []tap.Point
	index  [tap.NumPoints]int // of a point among the file's interfaces

	file    *os.File // nil for standard output
	out     blockWriter
	w       packetFile
	name    string
	opened  time.Time
	packets uint64 // in this file
	count   int    // files begun
	slice   int    // files begun since the last turn of -G
	kept    []string
	written [tap.NumPoints]uint64
	total   tally // in all files
	safe    tally // of these, surely written
	// stats are what the engine last said.
	stats capture.Stats
	start int64 // ns
	rec   pcapng.Packet
}

// tally counts packets as the ledger does, and the records they are in.
type tally struct{ packets, records uint64 }

// newCaptureFiles opens the first file.
func newCaptureFiles(plan filePlan, h capture.Hello) (*captureFiles, error) {
	f := &captureFiles{plan: plan, hello: h, start: time.Now().UnixNano()}
	for _, name := range h.Points {
		p, err := tap.ParsePoint(name)
		if err != nil {
			return nil, err
		}
		f.points = append(f.points, p)
	}
	slices.Sort(f.points)
	f.points = slices.Compact(f.points)
	for i, p := range f.points {
		f.index[p] = i
	}
	if err := f.open(time.Now()); err != nil {
		return nil, err
	}
	return f, nil
}

// open begins the next file.
func (f *captureFiles) open(now time.Time) error {
	f.count++
	f.slice++
	f.opened, f.packets = now, 0
	out := f.plan.out
	if f.plan.path != "-" {
		f.name = f.fileName(now)
		file, err := os.OpenFile(f.name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return fileError(err)
		}
		f.file, out = file, file
		// Captured packets are nobody else's business, in an old file too.
		if fi, err := file.Stat(); err == nil && fi.Mode().IsRegular() && fi.Mode().Perm()&0o077 != 0 {
			if err := file.Chmod(0o600); err != nil {
				file.Close()
				return fileError(err)
			}
		}
		if f.plan.naming == dumpcapRing {
			f.kept = append(f.kept, f.name)
			if keep := f.plan.next.files; keep > 0 && len(f.kept) > keep {
				_ = os.Remove(f.kept[0]) // someone else may have been faster
				f.kept = f.kept[1:]
			}
		}
	}
	f.out = blockWriter{w: out, file: f.file}
	var err error
	if f.w, err = f.begin(&f.out); err == nil {
		// The head is written at once, so that a full disk or a closed pipe
		// shows now.
		err = f.w.Flush()
	}
	return f.explain(err)
}

// begin writes the head of a file.
func (f *captureFiles) begin(out io.Writer) (packetFile, error) {
	h := &f.hello
	if f.plan.format == formatPcap {
		return pcapng.NewPcapWriter(out, pcapng.LinkIPv4, uint32(h.Snap), true)
	}
	head := &pcapng.Header{
		Hardware: runtime.GOARCH, OS: osName(), Application: "tweed " + h.Version,
		Comment: describeNode(h), Link: pcapng.LinkIPv4, SnapLen: uint32(h.Snap),
	}
	for _, p := range f.points {
		head.Interfaces = append(head.Interfaces, pcapng.Interface{Name: p.String(), Description: describePoint(p, h), Filter: h.Filter})
	}
	w, err := pcapng.NewWriter(out, head)
	if err != nil {
		return nil, err
	}
	return w, w.WriteNames(nodeNames(h))
}

// describeNode is the section's comment.
func describeNode(h *capture.Hello) string {
	words := []string{"node " + h.Node, "id " + h.NodeID, "version " + h.Version}
	for _, w := range []struct{ name, value string }{
		{"underlay", h.Address}, {"device", h.Device}, {"framing", h.Framing}, {"lease", h.Subnet}, {"filter", h.Filter},
	} {
		if w.value != "" {
			words = append(words, w.name+" "+w.value)
		}
	}
	if h.VNI != 0 {
		words = append(words, fmt.Sprint("vni ", h.VNI))
	}
	return strings.Join(words, ", ")
}

func describePoint(p tap.Point, h *capture.Hello) string {
	device := h.Device
	if device == "" {
		device = "the attached containers"
	}
	note := ""
	if h.SuperPackets {
		note = "; super-packets are in one piece, the statistics count their segments"
	}
	const made = "; the engine does not see the outer IP and UDP headers: they are made from the addresses"
	switch p {
	case tap.TunIn:
		return "inner packets read from " + device + ", leaving " + h.Node + note
	case tap.WireOut:
		return "datagrams " + h.Node + " sent to its peers" + made
	case tap.WireIn:
		return "datagrams " + h.Node + " received" + made
	case tap.TunOut:
		return "inner packets written to " + device + ", arriving at " + h.Node + note
	}
	return "packets " + h.Node + " gave up, with the reason as a comment"
}

// nodeNames are the names of nodes for the file's readers.
func nodeNames(h *capture.Hello) []pcapng.Name {
	var names []pcapng.Name
	add := func(addr, name string) {
		if a, err := netip.ParseAddr(addr); err == nil && name != "" && name != addr {
			names = append(names, pcapng.Name{Addr: a, Name: name})
		}
	}
	add(h.Address, h.Node)
	for addr, name := range h.Peers {
		add(addr, name)
	}
	slices.SortFunc(names, func(a, b pcapng.Name) int { return a.Addr.Compare(b.Addr) })
	return names
}

func osName() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return runtime.GOOS
	}
	text := func(b []byte) string { return string(b[:max(bytes.IndexByte(b, 0), 0)]) }
	return text(u.Sysname[:]) + " " + text(u.Release[:])
}

// fileName is the name of the file that begins now.
func (f *captureFiles) fileName(now time.Time) string {
	switch f.plan.naming {
	case dumpcapRing:
		ext := filepath.Ext(f.plan.path)
		return fmt.Sprintf("%s_%05d_%s%s", strings.TrimSuffix(f.plan.path, ext), f.count, now.Format("20060102150405"), ext)
	case tcpdumpRing:
		name := f.plan.path
		if f.plan.next.duration > 0 {
			name = strftime(name, now)
		}
		switch {
		case f.plan.next.filesize == 0:
		case f.plan.wrap > 0:
			name += fmt.Sprintf("%0*d", len(fmt.Sprint(f.plan.wrap-1)), (f.slice-1)%f.plan.wrap)
		case f.slice > 1:
			name += fmt.Sprint(f.slice - 1)
		}
		return name
	}
	return f.plan.path
}

// packet writes one packet.
func (f *captureFiles) packet(p *capture.Packet, stats *capture.Stats) error {
	f.stats = *stats
	// tcpdump looks before it writes, dumpcap after.
	if f.plan.naming == tcpdumpRing && f.full() {
		if err := f.rotate(time.Now()); err != nil {
			return err
		}
	}
	r := &f.rec
	*r = pcapng.Packet{
		Interface: f.index[p.Point], Time: p.Time, Data: p.Data, Length: p.Length,
		Flags: pcapng.FlagOutbound, Has: pcapng.HasID | pcapng.HasQueue, ID: p.ID, Queue: uint32(p.Worker),
	}
	if p.Receive {
		r.Flags = pcapng.FlagInbound
	}
	if p.Unfinished {
		r.Flags |= pcapng.FlagChecksumNotReady
	}
	if p.Lost > 0 {
		r.DropCount, r.Has = p.Lost, r.Has|pcapng.HasDropCount
	}
	if p.Point == tap.Drop {
		r.Comment = dropComments[p.Reason]
	}
	segments := uint64(max(p.Segments, 1))
	if segments > 1 {
		r.Flags |= pcapng.FlagSuperPacket
		r.Comment = strings.TrimPrefix(r.Comment+"; "+capture.SuperComment(p), "; ")
	}
	before := f.out.size
	if err := f.explain(f.w.WritePacket(r)); err != nil {
		return err
	}
	f.written[p.Point] += segments
	f.packets++
	f.total.records++
	f.total.packets += segments
	if f.out.size != before {
		f.safe = f.total
	}
	return nil
}

// turn goes on to the next file when this one is full, as dumpcap does.
func (f *captureFiles) turn() error {
	if f.plan.naming == dumpcapRing && f.full() {
		return f.rotate(time.Now())
	}
	return nil
}

func (f *captureFiles) full() bool {
	n := f.plan.next
	if n.filesize > 0 {
		if f.plan.naming == tcpdumpRing && f.w.Size() > n.filesize || f.plan.naming == dumpcapRing && f.w.Size() >= n.filesize {
			return true
		}
	}
	return n.packets > 0 && f.packets >= n.packets
}

// tick goes on to the next file when its time has come.
func (f *captureFiles) tick(now time.Time) error {
	if f.file == nil && pipeClosed(f.plan.out) {
		return errClosedPipe
	}
	if d := f.plan.next.duration; d > 0 && now.Sub(f.opened) >= d {
		f.slice = 0
		return f.rotate(now)
	}
	return nil
}

// rotate ends a file and begins the next.
func (f *captureFiles) rotate(now time.Time) error {
	if err := f.finish(&f.stats); err != nil {
		return err
	}
	if f.plan.stopFiles > 0 && f.count >= f.plan.stopFiles {
		return errEnough
	}
	return f.open(now)
}

// size is that of the file being written, in bytes.
func (f *captureFiles) size() int64 {
	if f.w == nil {
		return 0
	}
	return f.w.Size()
}

// finish ends a file with the counters, where it has a place for them.
func (f *captureFiles) finish(stats *capture.Stats) error {
	if f.w == nil {
		return nil
	}
	err := f.statistics(stats)
	if err == nil {
		err = f.w.Flush()
	}
	f.w = nil
	if f.file != nil {
		if cerr := f.file.Close(); err == nil {
			err = cerr
		}
		f.file = nil
	}
	return f.explain(err)
}

// statistics writes what the engine last said. What is in the file of every
// point is known better here.
func (f *captureFiles) statistics(stats *capture.Stats) error {
	w, ok := f.w.(*pcapng.Writer)
	if !ok {
		return nil
	}
	now := time.Now().UnixNano()
	for i, p := range f.points {
		err := w.WriteStatistics(&pcapng.Statistics{
			Interface: i, Time: now, Start: f.start, End: now,
			Received: stats.Seen[p] + stats.Lost[p], Dropped: stats.Lost[p] + stats.Overrun[p],
			Accepted: stats.Matched[p], OSDropped: stats.Lost[p], Delivered: f.written[p],
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (f *captureFiles) flush() error {
	if f.w == nil {
		return nil
	}
	err := f.explain(f.w.Flush())
	if err == nil {
		f.safe = f.total
	}
	return err
}

// captured is how many packets are in the files.
func (f *captureFiles) captured() (packets, records uint64) {
	if f.out.failed {
		return f.safe.packets, f.safe.records
	}
	return f.total.packets, f.total.records
}

// blockWriter counts what it writes, which is always whole blocks, and takes
// back what it wrote in part, so that a file on a full disk stays readable.
type blockWriter struct {
	w      io.Writer
	file   *os.File // nil for a stream
	size   int64
	failed bool
}

func (b *blockWriter) Write(p []byte) (int, error) {
	n, err := b.w.Write(p)
	if err == nil {
		b.size += int64(n)
		return n, nil
	}
	b.failed = true
	if b.file != nil {
		_ = b.file.Truncate(b.size) // a device cannot be cut
	}
	return n, err
}

// pipeClosed reports whether w is a pipe that nobody reads any more, which
// otherwise shows only when there is something to write.
func pipeClosed(w io.Writer) bool {
	file, ok := w.(*os.File)
	if !ok {
		return false
	}
	p := []unix.PollFd{{Fd: int32(file.Fd())}}
	n, err := unix.Poll(p, 0)
	return err == nil && n == 1 && p[0].Revents&unix.POLLERR != 0
}

// errClosedPipe says that nobody reads what is written any more.
var errClosedPipe = errors.New("capture: whoever read the packets has closed the pipe")

// explain turns a failed write into one line.
func (f *captureFiles) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPIPE):
		return errClosedPipe
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("capture: %s: the disk is full after %s; end the file earlier with -a filesize:KB or keep a few with -b filesize:KB -b files:N",
			f.plan.path, count(f.safe.packets, "packet"))
	}
	return fileError(err)
}

func fileError(err error) error { return fmt.Errorf("capture: %w", err) }
