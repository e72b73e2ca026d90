package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tweed/capture"
	"tweed/cmd/internal/daemon"
	"tweed/node"
)

const bugreportLong = `bugreport collects what somebody needs who was not there: status, peers, routes,
leases, configuration, counters, metrics, the end of the log, the stacks of the
engine's goroutines, what its flight recorder holds, its state directory, and
facts about the kernel, the network interfaces and their offloads.

It writes one tar.gz, mode 0600, and lists what is in it. Passwords are replaced by
(redacted) and key files are not read, but addresses and node names are there,
and the flight recorder has the first 128 bytes of packets: look before you
publish it. Without a running engine it collects the rest and says what is missing.`

func newBugreportCommand() *cobra.Command {
	var c client
	var out string
	cmd := &cobra.Command{
		Use: "bugreport", Short: "Collect everything about an engine and its host in one file",
		Long: bugreportLong, GroupID: groupLook, Args: noArgs,
		Example: `  tweed bugreport
  tweed bugreport -o /tmp/report.tar.gz
  ssh NODE tweed bugreport -o - | tar tz`,
	}
	c.registerEngine(cmd)
	cmd.Flags().StringVarP(&out, "output", "o", "", "write to `FILE`, or to standard output with - (default tweed-bugreport-NODE-TIME.tar.gz)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if out == "-" && isTerminal(cmd.OutOrStdout()) {
			return newUsageError(cmd, errors.New("-o -: standard output is a terminal: expected a pipe or a file"))
		}
		return runBugreport(cmd, &c, out)
	}
	return cmd
}

// report is the content of a bug report.
type report struct {
	node    string
	made    time.Time
	files   []reportFile
	missing []string
}

type reportFile struct {
	name, what string
	body       []byte
}

// add adds a file, or notes why it is missing.
func (r *report) add(name, what string, body []byte, err error) {
	if err != nil {
		r.missing = append(r.missing, fmt.Sprintf("%s (%s): %s", name, what, hideURLs(daemon.ErrorLine(err))))
		return
	}
	if strings.HasSuffix(name, ".txt") || strings.HasSuffix(name, ".json") {
		body = []byte(hideURLs(string(body)))
	}
	r.files = append(r.files, reportFile{name, what, body})
}

func (r *report) addJSON(name, what string, v any, err error) {
	var b []byte
	if err == nil {
		b, err = json.MarshalIndent(v, "", "  ")
	}
	r.add(name, what, append(b, '\n'), err)
}

// credentials are those of a URL.
var credentials = regexp.MustCompile(`(\w://)[^/@\s"]+@`)

func hideURLs(s string) string { return credentials.ReplaceAllString(s, "${1}"+node.Redacted+"@") }

// list says what is in the report and what is not.
func (r *report) list(w io.Writer) {
	var rows [][]string
	for _, f := range r.files {
		rows = append(rows, []string{f.name, bytesText(uint64(len(f.body))), f.what})
	}
	writeTable(w, []string{"FILE", "SIZE", "WHAT"}, rows)
	for _, m := range r.missing {
		fmt.Fprintln(w, "missing:", m)
	}
}

// write makes the archive.
func (r *report) write(w io.Writer) error {
	z := gzip.NewWriter(w)
	t := tar.NewWriter(z)
	var contents bytes.Buffer
	fmt.Fprintf(&contents, "tweed bugreport, %s, node %s\n\n", r.made.Format(time.RFC3339), r.node)
	r.list(&contents)
	for _, f := range append([]reportFile{{name: "CONTENTS.txt", body: contents.Bytes()}}, r.files...) {
		h := &tar.Header{Name: filepath.Join(r.base(), f.name), Mode: 0o600, Size: int64(len(f.body)), ModTime: r.made, Format: tar.FormatPAX}
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		if _, err := t.Write(f.body); err != nil {
			return err
		}
	}
	return errors.Join(t.Close(), z.Close())
}

// base is the name of the report without its ending.
func (r *report) base() string {
	safe := regexp.MustCompile(`[^A-Za-z0-9._-]+`).ReplaceAllString(r.node, "_")
	return "tweed-bugreport-" + safe + "-" + r.made.Format("20060102-150405")
}

func runBugreport(cmd *cobra.Command, c *client, out string) error {
	r := &report{made: time.Now()}
	if r.node, _ = os.Hostname(); r.node == "" {
		r.node = "unknown"
	}
	r.addJSON("version.json", "version of this command", buildFacts(), nil)
	status, err := r.engine(cmd.Context(), c)
	if err != nil {
		r.missing = append(r.missing, "everything about the running engine: "+hideURLs(daemon.ErrorLine(err)))
	}
	r.stateDir(c, status)
	r.host(cmd.Context(), status)
	return r.save(cmd, out)
}

// save writes the report and lists it: on standard error when the archive
// itself goes to standard output.
func (r *report) save(cmd *cobra.Command, out string) error {
	if out == "-" {
		r.list(cmd.ErrOrStderr())
		return r.write(cmd.OutOrStdout())
	}
	if out == "" {
		out = r.base() + ".tar.gz"
	}
	f, err := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("bugreport: %w", err)
	}
	err = f.Chmod(0o600) // of an old file, too
	if fi, serr := f.Stat(); serr == nil && !fi.Mode().IsRegular() {
		err = nil
	}
	if err == nil {
		err = r.write(f)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("bugreport: %s: %w", out, err)
	}
	r.list(cmd.OutOrStdout())
	fi, err := os.Stat(out)
	if err != nil {
		return fmt.Errorf("bugreport: %w", err)
	}
	fmt.Fprintf(cmd.OutOrStdout(), "wrote %s (%s, readable by you only)\n", out, bytesText(uint64(fi.Size())))
	return nil
}

// engine asks the running engine.
func (r *report) engine(ctx context.Context, c *client) (*node.Status, error) {
	api, err := c.dial()
	if err != nil {
		return nil, err
	}
	defer api.Close()
	status, err := api.Status(ctx)
	if err != nil {
		return nil, err // the other calls would wait as long
	}
	r.node = status.Node.Name
	r.addJSON("status.json", "status, ledger and problems", status, nil)
	peers, err := api.Peers(ctx)
	var text bytes.Buffer
	printStatus(&text, status, peers.Peers, r.made)
	r.add("status.txt", "the same for people", text.Bytes(), nil)
	r.addJSON("peers.json", "the nodes packets can be sent to", peers, err)
	routes, err := api.Routes(ctx)
	r.addJSON("routes.json", "routing table of the overlay", routes, err)
	leases, err := api.Leases(ctx)
	r.addJSON("leases.json", "all leases", leases, err)
	metrics, err := api.Metrics(ctx)
	r.add("metrics.txt", "metrics in Prometheus' format", []byte(metrics), err)
	debug, err := api.Debug(ctx)
	r.addJSON("config.json", "configuration, secrets redacted", debug.Config, err)
	r.add("log.txt", "end of the log", []byte(debug.Log), err)
	r.add("goroutines.txt", "stacks of the engine's goroutines", []byte(debug.Goroutines), err)
	debug.Config, debug.Log, debug.Goroutines = nil, "", ""
	r.addJSON("engine.json", "engine counters, attachments, memory", debug, err)
	recorded, err := recordedFile(ctx, api)
	r.add("recorder.pcapng", "what the flight recorder holds", recorded, err)
	return &status, nil
}

// recordedFile is what the flight recorder holds, as a pcapng file.
func recordedFile(ctx context.Context, api *node.Client) ([]byte, error) {
	s, err := api.Capture(ctx, node.CaptureRequest{Recorder: true})
	if err != nil {
		return nil, err
	}
	defer s.Close()
	var b bytes.Buffer
	f, err := newCaptureFiles(filePlan{path: "-", out: &b, format: formatPcapng}, s.Hello)
	if err != nil {
		return nil, err
	}
	var p capture.Packet
	for err = s.Next(&p); err == nil; err = s.Next(&p) {
		if err := f.packet(&p, &s.Stats); err != nil {
			return nil, err
		}
	}
	if err != io.EOF {
		return nil, err
	}
	err = f.finish(&s.Stats)
	return b.Bytes(), err
}
