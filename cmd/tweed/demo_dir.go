package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"tweed/netns"
)

// Each demo has a folder of its own below the run directory. Its lock file is
// locked as long as anything of the demo runs: by the demo and all its processes,
// or by the etcd of one that is kept. A folder that nobody has locked is left over
// and removed.
const (
	demoPrefix = "demo-"
	demoLock   = "lock"
	demoRecord = "demo.json"
	// demoBuilding is the record of a demo that will be kept, until it is complete.
	demoBuilding = "building.json"
)

// demoDir is the folder of one demo, locked.
type demoDir struct {
	path string
	lock *os.File
}

// record is what a kept demo is known by.
type record struct {
	Schema int `json:"schema"`
	// Processes in the order in which they are stopped.
	Processes []kept     `json:"processes"`
	Nodes     []keptNode `json:"nodes"`
	// Builder is the demo itself, in the record of one that is being built.
	Builder kept `json:"builder,omitzero"`
	// Impaired says that the nodes lose or delay packets on purpose.
	Impaired bool `json:"impaired"`
}

// defaultDemoDir is the run directory: one for each user, gone after a reboot.
func defaultDemoDir() string {
	uid, inside := netns.OutsideUID()
	if !inside {
		uid = fmt.Sprint(os.Getuid())
	}
	if uid == "0" {
		return "/run/tweed-demo"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "tweed-demo")
	}
	return filepath.Join(os.TempDir(), "tweed-demo-"+uid)
}

// downCommand is what to type to remove the kept demos below base.
func downCommand(base string) string {
	if base == defaultDemoDir() {
		return selfName() + " demo down"
	}
	return selfName() + " demo down --run-dir " + base
}

// openDemoBase makes sure the run directory exists and nobody else can put
// anything into it, and locks it against other demos starting or stopping.
func openDemoBase(base string) (*os.File, error) {
	for {
		if err := os.MkdirAll(base, 0o700); err != nil {
			return nil, fmt.Errorf("--run-dir %s: %w", base, err)
		}
		f, err := lockDirectory(base)
		if err != nil {
			return nil, fmt.Errorf("--run-dir %s: %w", base, err)
		}
		mine, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("--run-dir %s: %w", base, err)
		}
		// The demo that had the lock may have removed the directory.
		if now, err := os.Stat(base); err == nil && os.SameFile(mine, now) {
			return f, nil
		}
		f.Close()
	}
}

func lockDirectory(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	if err == nil && (int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0) {
		err = errors.New("expected a directory of your own that others cannot write to")
	}
	if err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// newDemoDir makes a folder and locks it. Left-over folders are removed on the
// way. With keep, a demo that is already being kept is an error.
func newDemoDir(base string, keep bool) (*demoDir, error) {
	guard, err := openDemoBase(base)
	if err != nil {
		return nil, err
	}
	defer guard.Close()
	running, err := sweepDemos(base)
	if err != nil {
		return nil, err
	}
	for _, path := range running {
		if _, err := readRecord(path); err == nil && keep {
			return nil, fmt.Errorf("demo: one is being kept already (%s); type: %s", path, downCommand(base))
		}
	}
	path, err := os.MkdirTemp(base, demoPrefix)
	if err != nil {
		return nil, err
	}
	lock, err := os.Create(filepath.Join(path, demoLock))
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(path))
	}
	return &demoDir{path: path, lock: lock}, nil
}

// remove deletes the folder with everything in it, and the run directory if
// that was the last.
func (d *demoDir) remove() error {
	base := filepath.Dir(d.path)
	guard, err := openDemoBase(base)
	if err != nil {
		return err
	}
	defer guard.Close()
	err = os.RemoveAll(d.path)
	d.lock.Close()
	removeDemoBase(base)
	return err
}

// removeDemoBase removes the run directory unless there is something in it.
// The caller holds its lock.
func removeDemoBase(base string) { os.Remove(base) }

// sweepDemos removes the folders nobody holds and returns the others. The
// caller holds the run directory's lock.
func sweepDemos(base string) (running []string, err error) {
	entries, err := os.ReadDir(base)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), demoPrefix) || !e.IsDir() {
			continue
		}
		path := filepath.Join(base, e.Name())
		if r, ok := abandoned(path); ok {
			if _, err := r.stop(); err != nil {
				return nil, err
			}
		} else if demoRuns(path) {
			running = append(running, path)
			continue
		}
		if r, err := readRecord(path); err == nil {
			// Its etcd is gone, which held the lock, but perhaps not the nodes.
			if _, err := r.stop(); err != nil {
				return nil, err
			}
		}
		if err := os.RemoveAll(path); err != nil {
			return nil, err
		}
	}
	return running, nil
}

// demoRuns reports whether somebody holds a demo's lock.
func demoRuns(path string) bool {
	f, err := os.Open(filepath.Join(path, demoLock))
	if err != nil {
		return false
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil
}

// abandoned returns the record of a demo that was killed before it could be kept:
// nobody else ends what it had started.
func abandoned(path string) (record, bool) {
	r, err := readRecordFile(filepath.Join(path, demoBuilding))
	if err != nil || r.Builder.runs() {
		return r, false
	}
	r.Processes = append(r.Processes, writers(path)...)
	return r, true
}

// recordSchema is the version of record.
const recordSchema = 2

// writeRecord writes the record of a demo that is complete.
func (d *demoDir) writeRecord(r record) error {
	if err := r.write(d.path); err != nil {
		return err
	}
	err := os.Remove(filepath.Join(d.path, demoBuilding))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// write replaces the record of the demo at path.
func (r record) write(path string) error { return r.writeFile(filepath.Join(path, demoRecord)) }

func (r record) writeFile(file string) error {
	r.Schema = recordSchema
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(file+".new", append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

func readRecord(path string) (record, error) { return readRecordFile(filepath.Join(path, demoRecord)) }

func readRecordFile(file string) (record, error) {
	var r record
	b, err := os.ReadFile(file)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil || r.Schema != recordSchema {
		return r, fmt.Errorf("%s: not the record of a demo of this version", file)
	}
	return r, nil
}

// stop ends the processes and returns how many there were.
func (r record) stop() (int, error) {
	n := 0
	for _, p := range r.Processes {
		was, err := p.stop()
		if err != nil {
			return n, err
		}
		if was {
			n++
		}
	}
	return n, nil
}

// demoDown ends the kept demos below base and removes every trace of them. One
// that another terminal is running right now is left alone.
func demoDown(_ context.Context, base string, w io.Writer) error {
	p := printer{w}
	if _, err := os.Stat(base); errors.Is(err, os.ErrNotExist) {
		p.done("nothing to do", "no demo is running")
		return nil
	}
	guard, err := openDemoBase(base)
	if err != nil {
		return err
	}
	defer guard.Close()
	entries, err := filepath.Glob(filepath.Join(base, demoPrefix+"*"))
	if err != nil {
		return err
	}
	removed := 0
	for _, path := range entries {
		r, err := readRecord(path)
		if errors.Is(err, os.ErrNotExist) {
			var ok bool
			if r, ok = abandoned(path); !ok {
				continue // no record: not kept; swept below if left over
			}
			err = nil
		}
		if err != nil {
			return err
		}
		n, err := r.stop()
		if err != nil {
			return fmt.Errorf("demo down: %w", err)
		}
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("demo down: %w", err)
		}
		p.done("removed", "%s, processes ended: %d", path, n)
		removed++
	}
	running, err := sweepDemos(base)
	if err != nil {
		return fmt.Errorf("demo down: %w", err)
	}
	for _, path := range running {
		p.done("left alone", "%s belongs to a demo that runs in another terminal", path)
	}
	if removed == 0 && len(running) == 0 {
		p.done("nothing to do", "no demo is running")
	}
	removeDemoBase(base)
	return nil
}
