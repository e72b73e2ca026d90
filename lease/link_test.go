package lease

import (
	"io"
	"net"
	"strings"
	"sync"
	"testing"
)

// link is a TCP relay in front of etcd whose connections can be cut, or made to
// swallow everything without a sign, which is what a firewall that forgot its
// state does.
type link struct {
	endpoint string
	target   string
	listener net.Listener
	wg       sync.WaitGroup

	mu     sync.Mutex
	conns  map[*relay]bool
	answer int  // chunks from etcd until all connections are cut; -1 never
	dark   bool // new connections are swallowed as well
	opened int
}

// relay is one connection through a link.
type relay struct {
	client, server net.Conn
	dark           bool // guarded by link.mu
}

func newLink(t *testing.T, endpoint string) *link {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &link{
		endpoint: "http://" + listener.Addr().String(),
		target:   strings.TrimPrefix(endpoint, "http://"),
		listener: listener,
		conns:    make(map[*relay]bool),
		answer:   -1,
	}
	l.wg.Go(l.serve)
	t.Cleanup(func() {
		listener.Close()
		l.cut()
		l.wg.Wait()
	})
	return l
}

func (l *link) serve() {
	for {
		client, err := l.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", l.target)
		if err != nil {
			client.Close()
			continue
		}
		l.mu.Lock()
		r := &relay{client: client, server: server, dark: l.dark}
		l.conns[r] = true
		l.opened++
		l.mu.Unlock()
		l.wg.Go(func() { l.pump(r, server, client, false) })
		l.wg.Go(func() { l.pump(r, client, server, true) })
	}
}

func (l *link) pump(r *relay, to io.WriteCloser, from io.ReadCloser, answers bool) {
	defer func() {
		from.Close()
		to.Close()
		l.mu.Lock()
		delete(l.conns, r)
		l.mu.Unlock()
	}()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		l.mu.Lock()
		dark, cut := r.dark, false
		if answers && l.answer >= 0 {
			cut = l.answer == 0
			l.answer--
		}
		l.mu.Unlock()
		if cut {
			l.cut()
			return
		}
		if dark {
			continue
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// cut resets every connection.
func (l *link) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for r := range l.conns {
		r.client.Close()
		r.server.Close()
	}
}

// cutAfterAnswers lets n chunks of answers pass and loses the next one together
// with every connection, once.
func (l *link) cutAfterAnswers(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answer = n
}

// blackHole makes the established connections swallow everything; new ones too,
// if all is set.
func (l *link) blackHole(all bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dark = all
	for r := range l.conns {
		r.dark = true
	}
}

// open lets new connections pass again.
func (l *link) open() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dark = false
}

// count is the number of connections made so far.
func (l *link) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.opened
}
