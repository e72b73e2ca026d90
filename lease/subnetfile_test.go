package lease

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

var exampleFile = SubnetFile{
	Network: netip.MustParsePrefix("10.5.0.0/16"),
	Subnet:  netip.MustParsePrefix("10.5.72.0/24"),
	MTU:     1472,
}

func TestSubnetFileIsFlannelsByteForByte(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "flannel", "subnet.env")
	old := syscall.Umask(0o077)
	err := WriteSubnetFile(path, exampleFile)
	syscall.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	want := "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
	if err != nil || string(got) != want {
		t.Errorf("got %q, %v", got, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("mode is %v, %v, want 0644 whatever the umask", info.Mode(), err)
	}
	if back, err := ReadSubnetFile(path); err != nil || back != exampleFile {
		t.Errorf("read back %+v, %v", back, err)
	}
}

func TestSubnetFileKeepsTheModeOfTheFileItReplaces(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "subnet.env")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f := exampleFile
	f.IPMasq = true
	if err := WriteSubnetFile(path, f); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode is %v, %v, want 0600", info.Mode(), err)
	}
	if back, err := ReadSubnetFile(path); err != nil || back != f {
		t.Errorf("read back %+v, %v", back, err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestSubnetFileOfOthersIsReadAsFarAsItParses(t *testing.T) {
	for _, tc := range []struct {
		text string
		want SubnetFile
	}{
		{"", SubnetFile{}},
		{"junk\n=\nFLANNEL_SUBNET\n", SubnetFile{}},
		{"FLANNEL_SUBNET=10.5.72.1/24\n", SubnetFile{Subnet: exampleFile.Subnet}},
		{"export FLANNEL_SUBNET=\"10.5.72.1/24\" # ours\r\nFLANNEL_MTU='1472'\n", SubnetFile{Subnet: exampleFile.Subnet, MTU: 1472}},
		{"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=nonsense,10.5.72.1/24,fd00::1/64\n",
			SubnetFile{Network: exampleFile.Network, Subnet: exampleFile.Subnet}},
		{"FLANNEL_SUBNET=10.5.72.1/24,10.5.73.1/24\n", SubnetFile{}},
		{"FLANNEL_SUBNET=10.5.72.1\nFLANNEL_MTU=-3\nFLANNEL_IPMASQ=true\n", SubnetFile{IPMasq: true}},
	} {
		path := filepath.Join(t.TempDir(), "subnet.env")
		if err := os.WriteFile(path, []byte(tc.text), 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadSubnetFile(path); err != nil || got != tc.want {
			t.Errorf("%q: got %+v, %v", tc.text, got, err)
		}
	}
}

func TestSubnetFileErrors(t *testing.T) {
	dir := t.TempDir()
	if _, err := ReadSubnetFile(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	if err := WriteSubnetFile(filepath.Join(dir, "f"), SubnetFile{MTU: 1}); err == nil {
		t.Error("a file without a subnet was written")
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := WriteSubnetFile(filepath.Join(dir, "file", "subnet.env"), exampleFile); err == nil {
		t.Error("a directory that is a file was not noticed")
	}
}
