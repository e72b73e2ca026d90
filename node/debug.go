package node

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"runtime"
	"runtime/pprof"
	"strings"
)

// DebugAnswer is what a developer asks for: the inside of a node. It is told
// to its administrator only, and holds no secret.
type DebugAnswer struct {
	Schema int `json:"schema"`
	// Config is the configuration with its defaults filled in.
	Config map[string]any `json:"config,omitempty"`
	// Engine is the engine in force; null without one.
	Engine *DebugEngine `json:"engine"`
	// Attachments are the containers connected now.
	Attachments []AttachmentStatus `json:"attachments"`
	// Captures is the number of captures that run, the flight recorder included.
	Captures int `json:"captures"`
	// GoVersion, Processors (GOMAXPROCS) and Memory are the runtime's; memory
	// in bytes.
	GoVersion  string            `json:"go_version"`
	Processors int               `json:"processors"`
	Memory     map[string]uint64 `json:"memory"`
	// Log are the newest lines of the log, Goroutines the stacks of all.
	Log        string `json:"log,omitempty"`
	Goroutines string `json:"goroutines,omitempty"`
}

// DebugEngine is what status does not tell of the engine.
type DebugEngine struct {
	// Workers is the number of transmit workers, TxBatches and RxBatches the
	// rounds of all workers.
	Workers   int    `json:"workers"`
	TxBatches uint64 `json:"tx_batches"`
	RxBatches uint64 `json:"rx_batches"`
	// Observed says that a capture, the flight recorder or a replay is active.
	Observed bool `json:"observed"`
}

// Debug returns the inside of the node.
func (c *Client) Debug(ctx context.Context) (DebugAnswer, error) {
	var a DebugAnswer
	err := c.get(ctx, "/v1/debug", &a)
	return a, err
}

// Redacted stands in place of a secret.
const Redacted = "(redacted)"

func (n *Node) debug(w http.ResponseWriter, _ *http.Request) {
	a := DebugAnswer{
		Schema: Schema, Config: n.cfg.public(), Attachments: n.Attachments(), Captures: n.captures.hub.Sessions(),
		GoVersion: runtime.Version(), Processors: runtime.GOMAXPROCS(0),
	}
	n.data.mu.RLock()
	if n.data.eng != nil {
		s := n.data.eng.Stats()
		a.Engine = &DebugEngine{s.Workers, s.TxBatches, s.RxBatches, s.Observed}
	}
	n.data.mu.RUnlock()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	a.Memory = map[string]uint64{"heap": m.HeapAlloc, "heap_objects": m.HeapObjects, "stack": m.StackSys, "system": m.Sys, "collections": uint64(m.NumGC)}
	hide := n.cfg.redactor()
	a.Log = hide.Replace(n.tail.text())
	var stacks strings.Builder
	_ = pprof.Lookup("goroutine").WriteTo(&stacks, 2) // writes to memory
	a.Goroutines = hide.Replace(stacks.String())
	answer(w, a)
}

// public is the configuration without its secrets, by field.
func (c Config) public() map[string]any {
	c.Log = nil
	if c.EtcdPassword != "" {
		c.EtcdPassword = Redacted
	}
	endpoints := make([]string, len(c.EtcdEndpoints))
	for i, e := range c.EtcdEndpoints {
		endpoints[i] = c.redactor().Replace(e)
	}
	c.EtcdEndpoints = endpoints
	var m map[string]any
	b, err := json.Marshal(c)
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	if err != nil {
		return map[string]any{"error": err.Error()}
	}
	delete(m, "Log")
	return m
}

// redactor replaces the secrets of the configuration in any text.
func (c *Config) redactor() *strings.Replacer {
	var pairs []string
	if c.EtcdPassword != "" {
		pairs = append(pairs, c.EtcdPassword, Redacted)
	}
	for _, e := range c.EtcdEndpoints {
		u, err := url.Parse(e)
		if err != nil || u.User == nil {
			continue
		}
		pairs = append(pairs, u.User.String()+"@", Redacted+"@")
		if p, ok := u.User.Password(); ok && p != "" {
			pairs = append(pairs, p, Redacted)
		}
	}
	return strings.NewReplacer(pairs...)
}
