package main

import (
	"io"
	"testing"

	"tweed/capture"
	"tweed/engine/tap"
)

// BenchmarkCaptureFile is the way of a packet from the stream into a file.
func BenchmarkCaptureFile(b *testing.B) {
	h := capture.Hello{Node: "n1", Points: []string{"tun-in", "wire-out"}, Snap: 128}
	f, err := newCaptureFiles(filePlan{path: "-", out: io.Discard, format: formatPcapng}, h)
	if err != nil {
		b.Fatal(err)
	}
	p := capture.Packet{Time: 1e18, ID: 1, Point: tap.WireOut, Length: 1454, Data: make([]byte, 128)}
	var stats capture.Stats
	b.ReportAllocs()
	for b.Loop() {
		if err := f.packet(&p, &stats); err != nil {
			b.Fatal(err)
		}
	}
}
