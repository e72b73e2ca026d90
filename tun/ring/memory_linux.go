package ring

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Memory is the memory of a pair. Whoever uses an end of it holds the memory.
type Memory struct {
	bytes []byte
	holds atomic.Int32
}

// Side says which of the two ends of a pair a process has.
type Side int

const (
	Engine Side = iota
	Program
)

// New makes a pair's memory and returns a descriptor of it, for the other
// process. Its size can no more be changed, so that neither process can make the
// other one fail.
func New() (*Memory, int, error) {
	fd, err := unix.MemfdCreate("tweed-ring", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, -1, fmt.Errorf("ring: memfd: %w", err)
	}
	err = unix.Ftruncate(fd, Size)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		unix.Close(fd)
		return nil, -1, fmt.Errorf("ring: memfd: %w", err)
	}
	m, err := Map(fd)
	if err != nil {
		unix.Close(fd)
		return nil, -1, err
	}
	return m, fd, nil
}

// Map maps memory that another process has made. The descriptor stays open.
func Map(fd int) (*Memory, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("ring: %w", err)
	}
	if st.Size != Size {
		return nil, fmt.Errorf("ring: %d bytes of memory, expected %d: the engine is of another version", st.Size, Size)
	}
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || seals&unix.F_SEAL_SHRINK == 0 {
		return nil, fmt.Errorf("ring: memory that can shrink (seals %#x): %w", seals, err)
	}
	b, err := unix.Mmap(fd, 0, Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("ring: map: %w", err)
	}
	m := &Memory{bytes: b}
	m.holds.Store(1)
	return m, nil
}

// Ends returns the two lanes of one side: out to send, in to receive. They are
// made once.
func (m *Memory) Ends(s Side) (out *Producer, in *Consumer) {
	toEngine, toProgram := newLane(m.bytes[:dataAt+ToEngine]), newLane(m.bytes[dataAt+ToEngine:])
	if s == Program {
		return &Producer{lane: toEngine}, &Consumer{lane: toProgram}
	}
	return &Producer{lane: toProgram}, &Consumer{lane: toEngine}
}

// Report returns the program's report. It may be used while the memory is held.
func (m *Memory) Report() *Report { return (*Report)(unsafe.Pointer(&m.bytes[reportAt])) }

// Hold keeps the memory mapped until one more Release.
func (m *Memory) Hold() { m.holds.Add(1) }

// Release gives a hold back, New's and Map's among them. With the last one the
// memory is unmapped.
func (m *Memory) Release() {
	if m.holds.Add(-1) == 0 {
		_ = unix.Munmap(m.bytes) // it was mapped
	}
}
