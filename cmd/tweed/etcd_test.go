package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// startTestEtcd runs `tweed etcd` as its own process and returns its endpoint.
func startTestEtcd(t *testing.T, args ...string) (*exec.Cmd, string) {
	t.Helper()
	cmd := command(t, nil, append([]string{"etcd", "--listen-client", "http://127.0.0.1:0"}, args...)...)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("no endpoint: %v", err)
	}
	return cmd, strings.TrimSpace(line)
}

func stopTestEtcd(t *testing.T, cmd *exec.Cmd, sig os.Signal) {
	t.Helper()
	if err := cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after %v: %v, want exit status 0", sig, err)
	}
}

func TestEtcdKeepsItsDataAndCleansUp(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	cmd, endpoint := startTestEtcd(t, "--data-dir", dir)
	if o := inProcess("network", "set", "10.244.0.0/16", "--etcd-endpoints", endpoint); o.status != exitGood {
		t.Fatalf("network set: %+v", o)
	}
	oneErrorLine(t, execute(t, nil, "etcd", "--listen-client", "http://127.0.0.1:0", "--data-dir", dir), exitFailed, "in use by another tweed etcd")
	oneErrorLine(t, execute(t, nil, "etcd", "--listen-client", endpoint), exitFailed, "--listen-client "+endpoint+": port in use")
	stopTestEtcd(t, cmd, unix.SIGTERM)
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("data directory: %v %v, want mode 0700", info, err)
	}

	cmd, endpoint = startTestEtcd(t, "--data-dir", dir)
	if o := inProcess("network", "get", "--etcd-endpoints", endpoint); o.status != exitGood || !strings.Contains(o.stdout, "10.244.0.0/16") {
		t.Errorf("after a restart: %+v", o)
	}
	stopTestEtcd(t, cmd, unix.SIGINT)
}

func TestEtcdRemovesItsTemporaryDirectory(t *testing.T) {
	cmd, _ := startTestEtcd(t)
	tmp := ""
	for _, kv := range cmd.Env {
		if v, ok := strings.CutPrefix(kv, "TMPDIR="); ok {
			tmp = v
		}
	}
	if found, _ := filepath.Glob(filepath.Join(tmp, "tweed-etcd-*")); len(found) != 1 {
		t.Errorf("temporary directories while running: %q, want one", found)
	}
	stopTestEtcd(t, cmd, unix.SIGTERM)
	if found, _ := filepath.Glob(filepath.Join(tmp, "tweed-etcd-*")); len(found) != 0 {
		t.Errorf("left behind: %q", found)
	}
}

func TestEtcdWritesTheEndpointToReadyFD(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := command(t, nil, "etcd", "--listen-client", "http://127.0.0.1:0", "--ready-fd", "3")
	cmd.ExtraFiles = []*os.File{w}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "http://127.0.0.1:") {
		t.Errorf("ready-fd: %q %v", line, err)
	}
	stopTestEtcd(t, cmd, unix.SIGTERM)
}

func TestEtcdRefusesADirectoryOthersCanRead(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	oneErrorLine(t, inProcess("etcd", "--listen-client", "http://127.0.0.1:0", "--data-dir", dir), exitFailed, "chmod 700 "+dir)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	oneErrorLine(t, inProcess("etcd", "--listen-client", "http://127.0.0.1:0", "--data-dir", file), exitFailed, file)
}

func TestOnlyLoopbackIsClosedToOthers(t *testing.T) {
	for _, c := range []struct {
		listen, ca string
		want       bool
	}{
		{"http://127.0.0.1:2379", "", false},
		{"http://localhost:2379", "", false},
		{"http://[::1]:2379", "", false},
		{"http://0.0.0.0:2379", "", true},
		{"http://10.0.0.5:2379", "", true},
		{"https://10.0.0.5:2379", "ca.pem", false},
	} {
		if got, _ := openToOthers(etcdOptions{listen: c.listen, caFile: c.ca}); got != c.want {
			t.Errorf("%s with CA %q: open to others %v, want %v", c.listen, c.ca, got, c.want)
		}
	}
}

func TestNetworkSetAndGetAgainstEtcd(t *testing.T) {
	_, endpoint := startTestEtcd(t)
	network := func(args ...string) outcome {
		return inProcess(append([]string{"network"}, append(args, "--etcd-endpoints", endpoint)...)...)
	}
	oneErrorLine(t, network("get"), exitFailed, "tweed network set 10.244.0.0/16")
	oneErrorLine(t, network("set", "10.244.0.0/29"), exitUsage, "too small")
	oneErrorLine(t, network("get"), exitFailed, "no network configuration")

	o := network("set", "10.244.0.0/16", "--backend", "vxlan")
	if o.status != exitGood || o.stderr != "" {
		t.Fatalf("set: %+v", o)
	}
	golden(t, "network-set.txt", []byte(o.stdout))
	golden(t, "network-set-same.txt", []byte(network("set", "10.244.0.0/16").stdout))
	golden(t, "network-grow.txt", []byte(network("set", "10.240.0.0/12").stdout))
	golden(t, "network-get.txt", []byte(network("get").stdout))

	var a networkAnswer
	o = network("get", "-o", "json")
	if err := json.Unmarshal([]byte(o.stdout), &a); err != nil || a.Schema != 1 || a.Subnets != 4095 {
		t.Errorf("get -o json: %v %+v", err, o)
	}
	o = network("set", "10.240.0.0/12", "--mtu", "1400", "-o", "json")
	if err := json.Unmarshal([]byte(o.stdout), &a); err != nil || a.Changed == nil || !*a.Changed || a.Before == nil {
		t.Errorf("set -o json: %v %+v", err, o)
	}
	// Another prefix is another network.
	oneErrorLine(t, network("get", "--etcd-prefix", "/other"), exitFailed, "/other/config")
}

func TestEtcdThatDoesNotAnswerIsNamed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	endpoint := fmt.Sprintf("http://%s", l.Addr())
	l.Close()
	oneErrorLine(t, inProcess("network", "get", "--etcd-endpoints", endpoint), exitFailed, endpoint)
}
