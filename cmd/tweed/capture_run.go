package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"tweed/capture"
	"tweed/engine/tap"
	"tweed/node"
)

const (
	// captureNice is how much this process steps back behind the engine.
	captureNice = 10
	// captureTick is how often output is flushed and limits of time are looked at.
	captureTick = 50 * time.Millisecond
	// captureEnd bounds the wait for the engine to end a capture.
	captureEnd = 10 * time.Second
)

// packetSink takes the packets of a capture.
type packetSink interface {
	// packet takes a packet, and what the engine last said of its counters.
	packet(*capture.Packet, *capture.Stats) error
	// turn is called after a packet that was not the last.
	turn() error
	// flush and tick are called every captureTick.
	flush() error
	tick(time.Time) error
	// size is how much has been written, in bytes.
	size() int64
	// captured is how many packets are in the output, and in how many records.
	captured() (packets, records uint64)
	// finish ends the output with the final counters.
	finish(*capture.Stats) error
}

// captureRun is one capture from its start to its end.
type captureRun struct {
	req node.CaptureRequest
	// stop ends the capture.
	stop captureLimits
	open func(*capture.Hello) (packetSink, error)
	// started is called once packets are being captured.
	started func(*capture.Hello)
	// signals end the capture, the second time at once.
	signals chan os.Signal

	mu    sync.Mutex // held while sink is in use
	sink  packetSink
	taken uint64
	ended bool // nothing is written any more
	err   error
	told  bool        // a signal ended it
	cut   atomic.Bool // a second one did not wait for the engine
}

// stepBack lowers the priority of all threads of this process.
func stepBack() {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return
	}
	for _, t := range tasks {
		if tid, err := strconv.Atoi(t.Name()); err == nil {
			_ = unix.Setpriority(unix.PRIO_PROCESS, tid, captureNice)
		}
	}
}

// run captures until a limit, a signal, an error, or the end of the engine.
func (c *captureRun) run(ctx context.Context, api *node.Client) (capture.Stats, error) {
	stepBack()
	s, err := api.Capture(ctx, c.req)
	if err != nil {
		return capture.Stats{}, err
	}
	defer s.Close()
	if c.sink, err = c.open(&s.Hello); err != nil {
		return capture.Stats{}, err
	}
	c.started(&s.Hello)
	var once sync.Once
	end := func() {
		once.Do(func() {
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), captureEnd)
				defer cancel()
				if s.End(ctx) != nil {
					s.Close() // it has ended by itself, or never will
				}
			}()
		})
	}
	done := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() { c.watch(end, func() { s.Close() }, done) })
	rerr := c.read(s, end)
	close(done)
	watch.Wait()
	if errors.Is(c.err, errEnough) {
		c.err = nil
	}
	if err := c.sink.finish(&s.Stats); c.err == nil {
		c.err = err
	}
	if c.err == nil && c.cut.Load() && !s.Complete {
		c.err = errors.New("capture: ended at once by a second signal; what came up to then is there, without the final counters")
	}
	if c.err == nil && !s.Complete && !c.ended {
		c.err = fmt.Errorf("capture: the engine has gone (%w); everything up to then is there", rerr)
		if rerr == io.EOF {
			c.err = errors.New("capture: the engine has gone; everything up to then is there")
		}
	}
	return s.Stats, c.err
}

// read takes packets to the end of the stream. When enough is written, the
// rest is read for the final counters only.
func (c *captureRun) read(s *node.Capture, end func()) error {
	var p capture.Packet
	for {
		if err := s.Next(&p); err != nil {
			return err
		}
		c.mu.Lock()
		if !c.ended {
			c.enter(c.sink.packet(&p, &s.Stats))
			c.taken++
			if n := c.stop.packets; n > 0 && c.taken >= n || c.stop.filesize > 0 && c.sink.size() >= c.stop.filesize {
				c.ended = true
			}
			if !c.ended {
				c.enter(c.sink.turn())
			}
		}
		ended := c.ended
		c.mu.Unlock()
		if ended {
			end()
		}
	}
}

// enter notes the outcome of a write.
func (c *captureRun) enter(err error) {
	if err != nil && c.err == nil {
		c.err, c.ended = err, true
	}
}

// watch ends the capture for signals and limits of time.
func (c *captureRun) watch(end, closeNow func(), done chan struct{}) {
	ticker := time.NewTicker(captureTick)
	defer ticker.Stop()
	var over <-chan time.Time
	if c.stop.duration > 0 {
		t := time.NewTimer(c.stop.duration)
		defer t.Stop()
		over = t.C
	}
	for {
		select {
		case <-done:
			return
		case <-over:
			end()
		case <-c.signals:
			if c.told {
				c.cut.Store(true)
				closeNow()
			}
			c.told = true
			end()
		case now := <-ticker.C:
			c.mu.Lock()
			if !c.ended {
				c.enter(c.sink.tick(now))
				c.enter(c.sink.flush())
			}
			ended := c.ended
			c.mu.Unlock()
			if ended {
				end()
			}
		}
	}
}

// catchSignals makes the signals that end a capture readable, and a closed
// pipe an error of the write.
func catchSignals() (c chan os.Signal, stop func()) {
	c = make(chan os.Signal, 2)
	signal.Notify(c, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	signal.Ignore(unix.SIGPIPE)
	return c, func() { signal.Stop(c); signal.Reset(unix.SIGPIPE) }
}

// printSummary writes tcpdump's three lines. Without a filter, the first and
// the last add up to the one between.
func (c *captureRun) printSummary(w io.Writer, st *capture.Stats) {
	n, records := c.sink.captured()
	if c.req.SuperPackets {
		fmt.Fprintf(w, "%s captured, in %s\n", count(n, "packet"), count(records, "record"))
	} else {
		fmt.Fprintf(w, "%s captured\n", count(n, "packet"))
	}
	fmt.Fprintf(w, "%s received by filter\n", count(st.Seen.Total()+st.Lost.Total(), "packet"))
	fmt.Fprintf(w, "%s dropped by capture\n", count(st.Lost.Total()+st.Overrun.Total(), "packet"))
}

func pointsOf(h *capture.Hello) tap.Points {
	points, err := parsePoints(h.Points)
	if err != nil {
		return 0 // a name of another version
	}
	return points
}
