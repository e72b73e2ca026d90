package node

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

const smapsText = `00400000-01367000 r-xp 00000000 fe:00 1050 /usr/local/bin/tweed up
Size:              15772 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me sd
01367000-025e8000 r--p 00f67000 fe:00 1050 /usr/local/bin/tweed up
Anonymous:             4 kB
025e8000-0268e000 rw-p 021e8000 fe:00 1050 /usr/local/bin/tweed up
Anonymous:             0 kB
0268e000-04e0a000 rw-p 00000000 00:00 0
Anonymous:             0 kB
7f0000000000-7f0000001000 r--s 00000000 fe:00 1051 /etc/shared
Anonymous:             0 kB
7f0000001000-7f0000002000 r--p 00000000 00:00 0
Anonymous:             0 kB
7f0000002000-7f0000003000 r--p 00000000 fe:00 1052 /usr/lib/libc.so.6 (deleted)
Anonymous:             0 kB
7ffe12345000-7ffe12347000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
`

func TestOnlyUnchangedPagesOfFilesAreGivenBack(t *testing.T) {
	want := []addrRange{{0x400000, 0x1367000}, {0x7f0000002000, 0x7f0000003000}}
	if got := unchangedFilePages([]byte(smapsText)); !slices.Equal(got, want) {
		t.Errorf("%x, want %x", got, want)
	}
}

func TestProgramPagesAreGivenBackAndComeAgain(t *testing.T) {
	before := residentFilePages(t)
	if err := giveBackMemory(); err != nil {
		t.Fatal(err)
	}
	after := residentFilePages(t)
	if after >= before {
		t.Errorf("%d kB of files resident, %d kB before", after, before)
	}
}

// residentFilePages reads RssFile of /proc/self/status, in kB.
func residentFilePages(t *testing.T) (kB int) {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "RssFile:")
	if n, err := fmt.Sscanf(rest, "%d kB", &kB); n != 1 {
		t.Fatalf("/proc/self/status: RssFile: %v", err)
	}
	return kB
}
