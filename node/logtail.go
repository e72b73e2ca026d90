package node

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
)

const (
	// tailLines is how many lines of its log a node remembers.
	tailLines = 500
	// tailWidth is how much of a line it remembers, in bytes.
	tailWidth = 4096
)

// logTail remembers the newest lines written to it. It is safe for concurrent
// use.
type logTail struct {
	mu    sync.Mutex
	lines [tailLines]string
	n     uint64 // ever written
}

// Write takes one line.
func (t *logTail) Write(b []byte) (int, error) {
	line := string(bytes.TrimRight(b[:min(len(b), tailWidth)], "\n"))
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lines[t.n%tailLines] = line
	t.n++
	return len(b), nil
}

// text returns the lines, oldest first.
func (t *logTail) text() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var b strings.Builder
	for i := t.n - min(t.n, tailLines); i < t.n; i++ {
		b.WriteString(t.lines[i%tailLines])
		b.WriteByte('\n')
	}
	return b.String()
}

// tailed hands records to a handler, and those from slog.LevelInfo on to the
// tail whatever the handler wants.
type tailed struct{ next, tail slog.Handler }

func newTailed(next slog.Handler, t *logTail) *slog.Logger {
	return slog.New(tailed{next, slog.NewTextHandler(t, nil)})
}

func (h tailed) Enabled(ctx context.Context, l slog.Level) bool {
	return h.next.Enabled(ctx, l) || h.tail.Enabled(ctx, l)
}

func (h tailed) Handle(ctx context.Context, r slog.Record) error {
	if h.tail.Enabled(ctx, r.Level) {
		_ = h.tail.Handle(ctx, r) // writes to memory
	}
	if !h.next.Enabled(ctx, r.Level) {
		return nil
	}
	return h.next.Handle(ctx, r)
}

func (h tailed) WithAttrs(a []slog.Attr) slog.Handler {
	return tailed{h.next.WithAttrs(a), h.tail.WithAttrs(a)}
}

func (h tailed) WithGroup(name string) slog.Handler {
	return tailed{h.next.WithGroup(name), h.tail.WithGroup(name)}
}
