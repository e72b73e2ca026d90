package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func names(o *options) []string {
	var out []string
	for _, s := range o.subjects {
		out = append(out, s.name)
	}
	return out
}

// program makes an executable file.
func program(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSubjectsByDefault(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	o, err := parseOptions(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"raw", "vxlan", "tweed-udp", "tweed-vxlan", "tweed-vxlan@workers"}; !slices.Equal(names(o), want) {
		t.Errorf("%v, want %v", names(o), want)
	}
	if want := []string{"virtual", "wire"}; !slices.Equal(o.links, want) {
		t.Errorf("links %v, want %v", o.links, want)
	}
	if !o.usesEtcd() || !o.usesIperf3() {
		t.Error("the default needs etcd and iperf3")
	}
}

func TestPeersOnPathAreMeasured(t *testing.T) {
	wireguard, nebula := program(t, "wireguard-go"), program(t, "nebula")
	t.Setenv("PATH", filepath.Dir(wireguard)+":"+filepath.Dir(nebula))
	o, err := parseOptions(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := names(o); !slices.Contains(got, "wireguard-go") || slices.Contains(got, "nebula") {
		t.Errorf("%v: want wireguard-go, and no nebula without nebula-cert", got)
	}
	if _, err := parseOptions([]string{"--subjects", "nebula"}, nil); err == nil || !strings.Contains(err.Error(), "--peer nebula=") {
		t.Errorf("nebula without nebula-cert: %v", err)
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(nebula), "nebula-cert"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if o, err = parseOptions(nil, nil); err != nil || !slices.Contains(names(o), "nebula") {
		t.Errorf("%v, %v: want nebula", names(o), err)
	}
}

func TestSubjectsAsked(t *testing.T) {
	binary := program(t, "tweed")
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--subjects", "tweed,raw,raw"}, "tweed-udp tweed-vxlan raw"},
		{[]string{"--subjects", "tweed@tso"}, "tweed-udp@tso tweed-vxlan@tso"},
		{[]string{"--subjects", "tweed-vxlan@none,vxlan", "--against", binary}, "tweed-vxlan@none tweed-b-vxlan@none vxlan"},
		{[]string{"--subjects", "tweed-b", "--against", binary}, "tweed-b-udp tweed-b-vxlan"},
		{[]string{"--subjects", "tweed,tweed-b", "--against", binary}, "tweed-udp tweed-b-udp tweed-vxlan tweed-b-vxlan"},
	} {
		o, err := parseOptions(c.args, nil)
		if err != nil {
			t.Errorf("%v: %v", c.args, err)
			continue
		}
		if got := strings.Join(names(o), " "); got != c.want {
			t.Errorf("%v: %s, want %s", c.args, got, c.want)
		}
	}
	if got := twin("tweed-b-vxlan@tso"); got != "tweed-vxlan@tso" {
		t.Errorf("twin %q", got)
	}
	if got := twin("tweed-vxlan"); got != "" {
		t.Errorf("twin %q", got)
	}
}

func TestOptionsRefused(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	for _, c := range []struct{ args, want string }{
		{"--rounds 0", "--rounds 0: expected 1 to 100"},
		{"--seconds 301", "--seconds 301: expected"},
		{"--link wifi", "expected virtual, wire or both"},
		{"--loads http", "--loads \"http\": expected"},
		{"--subjects ipsec", "--subjects \"ipsec\": expected"},
		{"--subjects tweed-vxlan@fast", "--subjects tweed-vxlan@fast:"},
		{"--subjects tweed-vxlan@", "--subjects tweed-vxlan@:"},
		{"--subjects tweed-b-udp", "--against"},
		{"--subjects flanneld", "--peer flanneld=/path"},
		{"--peer zerotier=/bin/true", "NAME one of flanneld"},
		{"--peer nebula", "expected NAME=/path"},
		{"--peer nebula=/nonexistent/nebula", "/nonexistent/nebula"},
		{"--against /nonexistent/tweed", "--against /nonexistent/tweed"},
		{"--against-flags --workers=2", "needs --against"},
		{"--fast", "-fast"},
		{"now", "unexpected argument \"now\""},
	} {
		if _, err := parseOptions(strings.Fields(c.args), nil); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q in it", c.args, err, c.want)
		}
	}
}

func TestHelpNamesEveryFlag(t *testing.T) {
	var out bytes.Buffer
	if _, err := parseOptions([]string{"--help"}, &out); !errors.Is(err, errHelp) {
		t.Fatal(err)
	}
	for _, want := range []string{"-rounds", "-link", "-loads", "-subjects", "-peer", "-against", "-out", "tweed-vxlan@tso"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %s in the help", want)
		}
	}
}

func TestMissingIperf3IsExplained(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if _, _, err := findIperf3(); err == nil || !strings.Contains(err.Error(), "apt-get install iperf3") {
		t.Errorf("%v", err)
	}
}
