package node

import (
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
)

func TestLogTailKeepsTheNewestLines(t *testing.T) {
	var tail logTail
	var out strings.Builder
	log := newTailed(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelWarn}), &tail).With("a", 1).WithGroup("g")
	if tail.text() != "" {
		t.Errorf("%q", tail.text())
	}
	for i := range tailLines + 7 {
		log.Info("event", "n", i)
	}
	log.Debug("detail")
	log.Warn("last", "text", strings.Repeat("x", 2*tailWidth))
	lines := strings.Split(strings.TrimSuffix(tail.text(), "\n"), "\n")
	if len(lines) != tailLines || !strings.HasSuffix(lines[0], fmt.Sprint("msg=event a=1 g.n=", 8)) || !strings.Contains(lines[tailLines-1], "msg=last") || len(lines[tailLines-1]) > tailWidth {
		t.Errorf("%d lines, from %q to %.100q", len(lines), lines[0], lines[len(lines)-1])
	}
	// Its own level is still the handler's.
	if n := strings.Count(out.String(), "\n"); n != 1 {
		t.Errorf("%d lines in the log:\n%s", n, out.String())
	}
}

func TestSecretsAreRedacted(t *testing.T) {
	c := Config{
		EtcdPassword: "pass-1", EtcdEndpoints: []string{"http://me:pass-2@h1:2379", "http://h2:2379"}, EtcdKeyFile: "/etc/key.pem",
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
	text := fmt.Sprint(c.public(), c.redactor().Replace("cannot reach http://me:pass-2@h1:2379 with pass-1 or pass-2"))
	if strings.Contains(text, "pass-") || strings.Contains(text, "me:pass") || strings.Count(text, Redacted) != 5 || !strings.Contains(text, "/etc/key.pem") {
		t.Error(text)
	}
	if c.EtcdPassword != "pass-1" || c.EtcdEndpoints[0] != "http://me:pass-2@h1:2379" {
		t.Error("the configuration itself has changed")
	}
	if m := (Config{}).public(); m["EtcdPassword"] != "" {
		t.Errorf("no password shows as %v", m["EtcdPassword"])
	}
}
