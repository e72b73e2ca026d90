package main

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/gopacket/layers"
)

func TestDecodersOfANodeTakeNoMemory(t *testing.T) {
	for _, table := range []*[65536]layers.EnumMetadata{&layers.EthernetTypeMetadata, &layers.PPPTypeMetadata} {
		for i := range table {
			table[i].Name = "in use" // as a start leaves it, or an earlier run of this test did not
		}
	}
	before := anonymousMemory(t)
	forgetDecoders()
	if after := anonymousMemory(t); before-after < 4<<10 {
		t.Errorf("%d kB of memory, %d kB before", after, before)
	}
	if e := layers.EthernetTypeMetadata[layers.EthernetTypeIPv4]; e.Name != "" {
		t.Errorf("still knows %s", e.Name)
	}
}

// anonymousMemory reads RssAnon of /proc/self/status, in kB.
func anonymousMemory(t *testing.T) (kB int) {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "RssAnon:")
	if n, err := fmt.Sscanf(rest, "%d kB", &kB); n != 1 {
		t.Fatalf("/proc/self/status: RssAnon: %v", err)
	}
	return kB
}
