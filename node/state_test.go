package node

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tweed/lease"
)

func testTable(revision int64) savedTable {
	own := testLease("10.1.1.0/24", "192.0.2.1", "vxlan")
	own.NodeID, own.NodeName, own.PartialChecksums = "id", "name", true
	return savedTable{
		EtcdPrefix: testPrefix, Revision: revision,
		NodeID: "0b0a6a3c-3f5b-4d5e-9a53-2a9a0f3f0d11", VtepMAC: "02:00:00:00:00:01",
		Config: []byte(`{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan"}}`),
		Own:    saveLease(own),
		Peers:  []savedLease{saveLease(testLease("10.1.2.0/24", "192.0.2.2", "udp")), saveLease(testLease("10.1.3.0/24", "192.0.2.3", "vxlan"))},
	}
}

func mustWriteSnapshot(t *testing.T, dir string, table savedTable) {
	t.Helper()
	if err := writeSnapshot(dir, table); err != nil {
		t.Fatal(err)
	}
}

func TestSnapshotComesBackAsItWas(t *testing.T) {
	dir := t.TempDir()
	mustWriteSnapshot(t, dir, testTable(42))
	c, warn := readSnapshot(dir, testPrefix)
	if warn != nil || c == nil {
		t.Fatal(c, warn)
	}
	if c.revision != 42 || c.own.Subnet.String() != "10.1.1.0/24" || c.own.VNI != 7 || !c.own.PartialChecksums ||
		c.own.NodeName != "name" || len(c.peers) != 2 || c.peers[1].VtepMAC.String() != "02:00:00:00:00:09" ||
		c.peers[0].BackendType != lease.BackendUDP || c.config.Network.String() != "10.1.0.0/16" {
		t.Errorf("got %+v", c)
	}
}

func TestDamagedSnapshotFallsBackToTheOneBefore(t *testing.T) {
	damage := map[string]func([]byte) []byte{
		"truncated":     func(b []byte) []byte { return b[:len(b)/2] },
		"empty":         func([]byte) []byte { return nil },
		"one bit":       func(b []byte) []byte { return bytes.Replace(b, []byte("192.0.2.3"), []byte("192.0.2.1"), 1) },
		"other version": func(b []byte) []byte { return bytes.Replace(b, []byte(`"version":1`), []byte(`"version":9`), 1) },
	}
	for name, f := range damage {
		dir := t.TempDir()
		mustWriteSnapshot(t, dir, testTable(1))
		mustWriteSnapshot(t, dir, testTable(2))
		path := filepath.Join(dir, snapshotFile)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, f(b), 0o600); err != nil {
			t.Fatal(err)
		}
		c, warn := readSnapshot(dir, testPrefix)
		if c == nil || c.revision != 1 || warn == nil || strings.Contains(warn.Error(), "\n") {
			t.Errorf("%s: got %+v, warning %v, expected revision 1 and a warning of one line", name, c, warn)
		}
	}
}

func TestSnapshotOfAnotherNetworkIsIgnored(t *testing.T) {
	dir := t.TempDir()
	mustWriteSnapshot(t, dir, testTable(1))
	c, warn := readSnapshot(dir, "/other")
	if c != nil || warn == nil || !strings.Contains(warn.Error(), "is ignored: it is of etcd prefix "+testPrefix) {
		t.Errorf("got %+v, %v", c, warn)
	}
	if c, warn := readSnapshot(t.TempDir(), testPrefix); c != nil || warn != nil {
		t.Errorf("empty directory: %+v, %v", c, warn)
	}
}

func TestIdentityIsMadeOnceAndIsAValidVTEP(t *testing.T) {
	dir := t.TempDir()
	if _, err := readIdentity(dir); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for range 64 {
		i, err := newIdentity()
		if err != nil {
			t.Fatal(err)
		}
		if i.MAC[0]&1 != 0 || i.MAC[0]&2 == 0 {
			t.Fatalf("MAC %s is no locally administered unicast address", i.MAC)
		}
		if err := writeIdentity(dir, i); err != nil {
			t.Fatal(err)
		}
		got, err := readIdentity(dir)
		if err != nil || got.NodeID != i.NodeID || got.MAC.String() != i.MAC.String() {
			t.Fatalf("wrote %+v, read %+v, %v", i, got, err)
		}
	}
	for _, bad := range []string{`{`, `{"version":2}`, `{"version":1,"node_id":"x","vtep_mac":"02:00:00:00:00:01"}`,
		`{"version":1,"node_id":"0b0a6a3c-3f5b-4d5e-9a53-2a9a0f3f0d11","vtep_mac":"01:00:00:00:00:01"}`} {
		if err := os.WriteFile(filepath.Join(dir, identityFile), []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readIdentity(dir); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
}

func TestSaverWritesTheNewestAndForgetsWhatIsDropped(t *testing.T) {
	dir := t.TempDir()
	s := newSaver(dir, quiet())
	for rev := range int64(100) {
		s.save(testTable(rev))
	}
	s.close()
	if c, warn := readSnapshot(dir, testPrefix); c == nil || c.revision != 99 {
		t.Errorf("got %+v, %v, expected revision 99", c, warn)
	}
	s = newSaver(dir, quiet())
	s.save(testTable(200))
	s.drop()
	if err := removeSnapshot(dir); err != nil {
		t.Fatal(err)
	}
	s.close()
	if c, _ := readSnapshot(dir, testPrefix); c != nil {
		t.Errorf("a dropped snapshot came back: %+v", c)
	}
}

func TestSaverReportsAFullDiskAndGoesOn(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	s := newSaver(dir, quiet())
	s.save(testTable(1))
	s.close()
	if s.lastError() == nil {
		t.Error("no error for a directory that does not exist")
	}
}

func TestPathsFollowTheUser(t *testing.T) {
	env := func(m map[string]string) func(string) string { return func(k string) string { return m[k] } }
	for _, c := range []struct {
		euid          int
		env           map[string]string
		stateDir      string
		socket        string
		wantDir, want string
	}{
		{0, nil, "", "", "/var/lib/tweed/tweed0", "/run/tweed/tweed0/api.sock"},
		{0, nil, "/x", "", "/x", "/x/api.sock"},
		{0, nil, "/x", "/y.sock", "/x", "/y.sock"},
		{0, nil, "", "/y.sock", "/var/lib/tweed/tweed0", "/y.sock"},
		{1000, map[string]string{"XDG_RUNTIME_DIR": "/run/user/1000", "HOME": "/home/u"}, "", "",
			"/home/u/.local/state/tweed/tweed0", "/run/user/1000/tweed/tweed0/api.sock"},
		{1000, map[string]string{"XDG_RUNTIME_DIR": "/r", "XDG_STATE_HOME": "/s"}, "", "", "/s/tweed/tweed0", "/r/tweed/tweed0/api.sock"},
	} {
		p := defaultDirs(c.euid, env(c.env)).engine(c.stateDir, c.socket, "tweed0")
		if p.stateDir != c.wantDir || p.socket != c.want {
			t.Errorf("%+v: got %+v", c, p)
		}
	}
}

func TestRunDirectoriesGoWithTheLastEngine(t *testing.T) {
	d := userDirs{runtime: filepath.Join(t.TempDir(), "tweed"), state: t.TempDir()}
	one, two := d.engine("", "", "tweed0"), d.engine("", "", "tweed1")
	for _, p := range []enginePaths{one, two} {
		if err := os.MkdirAll(filepath.Dir(p.socket), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	there := func(dir string) bool { _, err := os.Stat(dir); return err == nil }
	one.removeRunDirs()
	if there(filepath.Dir(one.socket)) || !there(filepath.Dir(two.socket)) {
		t.Error("one engine's directory stays, or the other's is gone")
	}
	two.removeRunDirs()
	if there(d.runtime) || !there(d.state) {
		t.Error("the root of the sockets stays, or that of the state is gone")
	}
	given := d.engine(t.TempDir(), "", "tweed0")
	given.removeRunDirs()
	if !there(given.stateDir) {
		t.Error("a directory that was given is gone")
	}
}

func TestAStateDirectoryNamesTheSocketOfItsEngine(t *testing.T) {
	d := userDirs{runtime: t.TempDir(), state: t.TempDir()}
	given := d.engine("/srv/overlay", "", "tweed0")
	if got := d.socketOf("/srv/overlay"); got != given.socket {
		t.Errorf("given: %s, want %s", got, given.socket)
	}
	byDefault := d.engine("", "", "tweed1")
	if got := d.socketOf(byDefault.stateDir + "/"); got != byDefault.socket {
		t.Errorf("default: %s, want %s", got, byDefault.socket)
	}
	// The same directory, but given with --state-dir.
	if err := os.MkdirAll(byDefault.stateDir, 0o755); err != nil {
		t.Fatal(err)
	}
	inside := filepath.Join(byDefault.stateDir, socketName)
	l, err := net.Listen("unix", inside)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if got := d.socketOf(byDefault.stateDir); got != inside {
		t.Errorf("default directory, given: %s, want %s", got, inside)
	}
}

func TestDirMakerTakesBackOnlyWhatItMade(t *testing.T) {
	root := t.TempDir()
	var m dirMaker
	for _, d := range []string{"lib/a/b", "run/a", "lib/a/c"} {
		if err := m.mkdirAll(filepath.Join(root, d), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "lib/a/c/foreign"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m.undoExcept(filepath.Join(root, "lib/a/b"))
	for d, want := range map[string]bool{"lib/a/b": true, "lib/a/c": true, "run": false} {
		if _, err := os.Stat(filepath.Join(root, d)); (err == nil) != want {
			t.Errorf("%s: %v, expected to exist: %t", d, err, want)
		}
	}
}
