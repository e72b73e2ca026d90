package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"

	"tweed/capture"
	"tweed/encap"
	"tweed/node"
)

// decodeAs are Wireshark's flags for the ports of the overlay. It takes 4789 for
// vxlan, but not 8472, and has no idea of the udp framing.
func decodeAs(h *capture.Hello) []string {
	if pointsOf(h)&^pointGroups["inner"] == 0 {
		return nil
	}
	var args []string
	for _, port := range slices.Sorted(maps.Keys(h.Ports)) {
		dissector := "ip"
		if h.Ports[port] == encap.FramingVXLAN.String() {
			dissector = "vxlan"
		}
		args = append(args, "-d", fmt.Sprintf("udp.port==%d,%s", port, dissector))
	}
	return args
}

// captureLive shows a capture in Wireshark, or another program with its flags,
// and ends with it.
func captureLive(ctx context.Context, program string, run *captureRun, api *node.Client, plan filePlan, stderr io.Writer) error {
	path, err := exec.LookPath(program)
	if err != nil && program == "wireshark" {
		if path, err = exec.LookPath("tshark"); err == nil {
			fmt.Fprintln(stderr, "wireshark is not installed: starting tshark instead")
		}
	}
	if err != nil {
		return fmt.Errorf("--wireshark %s: no such program; on another machine: ssh THIS-HOST tweed capture -w - | wireshark -k -i -", program)
	}
	var viewer *exec.Cmd
	run.open = func(h *capture.Hello) (packetSink, error) {
		viewer = exec.Command(path, slices.Concat([]string{"-k", "-i", "-"}, decodeAs(h))...)
		if isTshark(path) {
			viewer.Args = slices.Concat([]string{path, "-n", "-i", "-"}, decodeAs(h))
		}
		viewer.Stdout, viewer.Stderr = os.Stdout, os.Stderr
		stdin, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		viewer.Stdin = stdin
		if err := viewer.Start(); err != nil {
			return nil, fmt.Errorf("--wireshark: %w", err)
		}
		stdin.Close()
		plan.path, plan.out = "-", w
		files, err := newCaptureFiles(plan, *h)
		if err != nil {
			w.Close()
			return nil, err
		}
		return &pipeSink{files, w}, nil
	}
	stats, err := run.run(ctx, api)
	if viewer == nil {
		return err
	}
	werr := viewer.Wait()
	run.printSummary(stderr, &stats)
	if errors.Is(err, errClosedPipe) {
		err = nil // its window was closed
	}
	if err == nil && werr != nil {
		err = fmt.Errorf("--wireshark: %s: %w", path, werr)
	}
	return err
}

func isTshark(path string) bool {
	return len(path) >= len("tshark") && path[len(path)-len("tshark"):] == "tshark"
}

// pipeSink closes its pipe at the end.
type pipeSink struct {
	*captureFiles
	w *os.File
}

func (s *pipeSink) finish(st *capture.Stats) error {
	err := s.captureFiles.finish(st)
	return errors.Join(err, s.w.Close())
}
