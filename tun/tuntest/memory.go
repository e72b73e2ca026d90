package tuntest

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ResidentPages returns how many of the pages that b lies in have memory behind
// them (mincore(2)). It looks at none of its bytes, so other threads may use them.
func ResidentPages(b []byte) (int, error) {
	page := uintptr(os.Getpagesize())
	start := uintptr(unsafe.Pointer(unsafe.SliceData(b))) &^ (page - 1)
	end := (uintptr(unsafe.Pointer(unsafe.SliceData(b))) + uintptr(len(b)) + page - 1) &^ (page - 1)
	states := make([]byte, (end-start)/page)
	if _, _, e := unix.Syscall(unix.SYS_MINCORE, start, end-start, uintptr(unsafe.Pointer(&states[0]))); e != 0 {
		return 0, e
	}
	n := 0
	for _, s := range states {
		n += int(s & 1)
	}
	return n, nil
}
