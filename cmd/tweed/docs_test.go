package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"tweed/engine"
)

func readDoc(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile("../../" + path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestREADMEHasEveryFlagOfUp(t *testing.T) {
	readme := readDoc(t, "README.md")
	newUpCommand().Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden && !strings.Contains(readme, "`--"+f.Name+"`") {
			t.Errorf("--%s is not in the table of flags", f.Name)
		}
	})
}

func TestREADMEExplainsEveryDropReason(t *testing.T) {
	readme := readDoc(t, "README.md")
	for r := range engine.NumReasons {
		if !strings.Contains(readme, "`"+r.String()+"`") {
			t.Errorf("drop reason %s is not in the troubleshooting table", r)
		}
	}
	for _, row := range regexp.MustCompile("(?m)^\\| (`[a-z-]+`(?:, `[a-z-]+`)*) \\| (?:sent|received) ").FindAllStringSubmatch(readme, -1) {
		for _, name := range strings.Split(row[1], ", ") {
			if _, err := engine.ParseReason(strings.Trim(name, "`")); err != nil {
				t.Errorf("the troubleshooting table has %s: %v", name, err)
			}
		}
	}
}

func TestREADMEBeginsWithTwoCommandsThatNeedOnlyGo(t *testing.T) {
	readme := readDoc(t, "README.md")
	_, rest, _ := strings.Cut(readme, "```\n")
	block, _, _ := strings.Cut(rest, "```")
	if want := "go run ./cmd/tweed demo\ngo test ./...\n"; block != want {
		t.Errorf("first block of the README is %q, want %q", block, want)
	}
}

func TestLinksBetweenDocumentsHold(t *testing.T) {
	for _, doc := range []string{"README.md", "docs/operating.md", "docs/etcd.md", "docs/wire.md", "docs/rootless.md", "docs/capture.md", "docs/accelerator.md"} {
		for _, link := range regexp.MustCompile(`\]\(([^)#]+)\)`).FindAllStringSubmatch(readDoc(t, doc), -1) {
			if strings.Contains(link[1], "://") {
				continue
			}
			// A link is read from where its document is.
			if _, err := os.Stat(filepath.Join("../..", filepath.Dir(doc), link[1])); err != nil {
				t.Errorf("%s: %v", doc, err)
			}
		}
	}
}
