package node

import (
	"log/slog"
	"sync"
	"time"
)

// saveInterval is the shortest time between two writes of the snapshot: a
// thousand lease changes in a second are one file.
const saveInterval = time.Second

// saver writes snapshots away from the goroutine that follows the leases, so
// that a slow or full disk never delays a route. Only the newest one counts.
type saver struct {
	dir string
	log *slog.Logger

	writing sync.Mutex // held during a write

	mu      sync.Mutex
	pending *savedTable
	err     error // of the last write

	wake chan struct{}
	stop chan struct{}
	done chan struct{}
}

func newSaver(dir string, log *slog.Logger) *saver {
	s := &saver{
		dir: dir, log: log,
		wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{}),
	}
	go s.run()
	return s
}

// save hands over a snapshot and returns at once.
func (s *saver) save(t savedTable) {
	s.mu.Lock()
	s.pending = &t
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// lastError is why the last write failed, nil if it did not.
func (s *saver) lastError() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// drop forgets what is pending, after a write in progress.
func (s *saver) drop() {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pending = nil
}

// close writes what is pending and stops.
func (s *saver) close() {
	close(s.stop)
	<-s.done
}

func (s *saver) run() {
	defer close(s.done)
	for {
		select {
		case <-s.wake:
			s.write()
		case <-s.stop:
			s.write()
			return
		}
		select {
		case <-time.After(saveInterval):
		case <-s.stop:
			s.write()
			return
		}
	}
}

func (s *saver) write() {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	t := s.pending
	s.pending = nil
	s.mu.Unlock()
	if t == nil {
		return
	}
	t.Saved = time.Now().UTC()
	err := writeSnapshot(s.dir, *t)
	s.mu.Lock()
	changed := (err == nil) != (s.err == nil)
	s.err = err
	s.mu.Unlock()
	if changed && err != nil {
		s.log.Warn("snapshot not saved; a restart without etcd would use an older one", "dir", s.dir, "err", err)
	}
}
