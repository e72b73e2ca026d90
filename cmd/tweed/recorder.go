package main

import (
	"bytes"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"tweed/capture"
	"tweed/node"
)

// saveRecorderOnSignal writes what the flight recorder holds to the state
// directory on every SIGUSR1, until stop is called.
func saveRecorderOnSignal(n *node.Node, log *slog.Logger) (stop func()) {
	signals, done := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(signals, unix.SIGUSR1)
	go func() {
		defer close(done)
		for range signals {
			file, packets, err := saveRecorder(n)
			if err != nil {
				log.Warn("flight recorder not saved", "err", err)
				continue
			}
			log.Info("flight recorder saved", "file", file, "packets", packets)
		}
	}()
	return func() {
		signal.Stop(signals)
		close(signals)
		<-done
	}
}

// saveRecorder writes one file.
func saveRecorder(n *node.Node) (file string, packets uint64, err error) {
	stream, dir, err := n.Recorded()
	if err != nil {
		return "", 0, err
	}
	r, hello, err := capture.NewReader(bytes.NewReader(stream))
	if err != nil {
		return "", 0, err
	}
	name := filepath.Join(dir, "recorder-"+time.Now().Format("20060102-150405.000")+".pcapng")
	f, err := newCaptureFiles(filePlan{path: name, format: formatPcapng}, hello)
	if err != nil {
		return "", 0, err
	}
	var p capture.Packet
	for err = r.Next(&p); err == nil; err = r.Next(&p) {
		if err := f.packet(&p, &r.Stats); err != nil {
			return "", 0, err
		}
	}
	if ferr := f.finish(&r.Stats); err == io.EOF {
		err = ferr
	}
	packets, _ = f.captured()
	return name, packets, err
}
