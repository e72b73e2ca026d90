package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tweed/node"
)

// untar returns the files of an archive by their names below its one directory.
func untar(t *testing.T, archive []byte) map[string][]byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(archive))
	if err != nil {
		t.Fatal(err)
	}
	files, top := map[string][]byte{}, ""
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		dir, name, _ := strings.Cut(h.Name, "/")
		if top == "" {
			top = dir
		}
		if dir != top || path.Clean(h.Name) != h.Name || h.Mode != 0o600 {
			t.Errorf("%s, mode %o, in an archive of %s", h.Name, h.Mode, top)
		}
		if files[name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func TestBugreport(t *testing.T) {
	const secret = "hunter2-is-secret"
	w := newWorld(t, 2)
	w.config(udpConfig)
	a := w.up(0, "--flight-recorder", "100", "--etcd-username", "somebody", "--etcd-password", secret)
	b := w.up(1)
	awaitPeers(1, a, b)
	for range 3 {
		assertPing(t, a.host(), b.host(), 100)
	}
	file := filepath.Join(w.dir, "report.tar.gz")
	if err := os.WriteFile(file, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	status, out, errs := run(t, tweedBin, "bugreport", "--state-dir", a.dir, "-o", file)
	if status != 0 || errs != "" || strings.Contains(out, "missing:") || !strings.Contains(out, "wrote "+file) {
		t.Fatalf("exit status %d, %s%s", status, out, errs)
	}
	if fi, err := os.Stat(file); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	archive, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	files := untar(t, archive)
	for name, want := range map[string]string{
		"CONTENTS.txt": "node " + a.name, "version.json": `"version"`, "status.json": `"ledger"`, "status.txt": "lease", "peers.json": b.underlay().String(),
		"routes.json": "10.244.", "leases.json": "10.244.", "metrics.txt": "tweed_packets_total", "config.json": `"EtcdPassword": "(redacted)"`,
		"log.txt": "connected to etcd", "goroutines.txt": "engine.(*pair).receive", "engine.json": `"observed": true`, "state.txt": "snapshot.json",
		"state/node.json": a.status().Node.ID, "host/facts.txt": "/dev/net/tun", "host/kernel.txt": "== /proc/net/snmp", "host/links.txt": "gso_max_size",
	} {
		if !strings.Contains(string(files[name]), want) {
			t.Errorf("%s does not contain %q: %.300s", name, want, files[name])
		}
		if name != "CONTENTS.txt" && !strings.Contains(out, name+" ") {
			t.Errorf("%s is not in the list:\n%s", name, out)
		}
	}
	for name, body := range files {
		if bytes.Contains(body, []byte(secret)) {
			t.Errorf("%s has the password", name)
		}
	}
	var s node.Status
	if err := json.Unmarshal(files["status.json"], &s); err != nil || s.Node.ID != a.status().Node.ID {
		t.Errorf("status.json: %v", err)
	}
	recorder := filepath.Join(w.dir, "recorder.pcapng")
	if err := os.WriteFile(recorder, files["recorder.pcapng"], 0o600); err != nil {
		t.Fatal(err)
	}
	if n := sum(readCapture(t, recorder).packets); n != 12 {
		t.Errorf("%d packets in the flight recorder, want 12", n)
	}

	// What a dead engine leaves.
	a.end(unix.SIGKILL)
	status, out, errs = run(t, tweedBin, "bugreport", "--state-dir", a.dir, "-o", "-")
	if status != 0 || !strings.Contains(errs, "missing: everything about the running engine: "+a.dir) {
		t.Errorf("dead engine: exit status %d, %s", status, errs)
	}
	files = untar(t, []byte(out))
	if !strings.Contains(string(files["state/snapshot.json"]), "10.244.") || len(files["host/kernel.txt"]) == 0 || files["status.json"] != nil || !bytes.Contains(files["CONTENTS.txt"], []byte("missing: everything")) {
		t.Errorf("dead engine: %s", files["CONTENTS.txt"])
	}
	if status, out, errs := run(t, tweedBin, "bugreport", "--state-dir", b.dir, "-o", "/nowhere/x"); status != 1 || out != "" || !strings.Contains(errs, "/nowhere/x: no such file or directory") {
		t.Errorf("exit status %d, %s%s", status, out, errs)
	}
}
