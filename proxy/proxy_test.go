package proxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// echoTCP answers on a port of loopback.
func echoTCP(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	return l.Addr().String()
}

func listener(t *testing.T) net.Listener {
	t.Helper()
	l, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

var direct net.Dialer

// toEcho dials addr whatever is asked for, and notes what was.
func toEcho(addr string, asked *string) Dial {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		*asked = network + " " + address
		return direct.DialContext(ctx, network, addr)
	}
}

func closing(t *testing.T, c io.Closer) {
	t.Helper()
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}

// socksDial speaks SOCKS5 by hand and returns the reply code.
func socksDial(t *testing.T, server string, cmd byte, address []byte) (net.Conn, byte, []byte) {
	t.Helper()
	c, err := net.Dial("tcp", server)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	c.Write([]byte{5, 2, 2, 0})
	c.Write(append([]byte{5, cmd, 0}, address...))
	var greet [2]byte
	if _, err := io.ReadFull(c, greet[:]); err != nil || greet != [2]byte{5, 0} {
		t.Fatalf("greeting %v, %v", greet, err)
	}
	reply := make([]byte, 10)
	if _, err := io.ReadFull(c, reply); err != nil {
		t.Fatalf("reply: %v", err)
	}
	return c, reply[1], reply[4:]
}

func TestSOCKSConnectsToAddressesAndNames(t *testing.T) {
	var asked string
	s := ServeSOCKS5(listener(t), toEcho(echoTCP(t), &asked), nil)
	closing(t, s)
	for want, address := range map[string][]byte{
		"tcp 10.1.2.3:80":      {addrIPv4, 10, 1, 2, 3, 0, 80},
		"tcp [fd00::1]:443":    append(append([]byte{addrIPv6, 0xfd}, make([]byte, 14)...), 1, 1, 187),
		"tcp host.example:256": append([]byte("\x03\x0chost.example"), 1, 0),
	} {
		c, code, _ := socksDial(t, s.Addr().String(), cmdConnect, address)
		if code != replyGood || asked != want {
			t.Errorf("reply %d, dialled %q, want %q", code, asked, want)
		}
		fmt.Fprintln(c, want)
		c.(*net.TCPConn).CloseWrite()
		if got, err := io.ReadAll(c); err != nil || string(got) != want+"\n" {
			t.Errorf("echo %q, %v", got, err)
		}
	}
}

func TestSOCKSSaysWhyNot(t *testing.T) {
	for want, cause := range map[byte]error{
		replyRefused: unix.ECONNREFUSED, replyNetworkUnreachable: unix.ENETUNREACH,
		replyHostUnreachable: context.DeadlineExceeded, replyFailed: errors.New("something"),
	} {
		s := ServeSOCKS5(listener(t), func(context.Context, string, string) (net.Conn, error) { return nil, cause }, nil)
		closing(t, s)
		if _, code, _ := socksDial(t, s.Addr().String(), cmdConnect, []byte{addrIPv4, 1, 2, 3, 4, 0, 1}); code != want {
			t.Errorf("%v: reply %d, want %d", cause, code, want)
		}
	}
	s := ServeSOCKS5(listener(t), direct.DialContext, nil)
	closing(t, s)
	if _, code, _ := socksDial(t, s.Addr().String(), 2, []byte{addrIPv4, 1, 2, 3, 4, 0, 1}); code != replyNoCommand {
		t.Errorf("BIND: reply %d", code)
	}
}

func TestSOCKSCarriesDatagrams(t *testing.T) {
	echo, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := echo.ReadFrom(b)
			if err != nil {
				return
			}
			echo.WriteTo(bytes.ToUpper(b[:n]), from)
		}
	}()
	s := ServeSOCKS5(listener(t), direct.DialContext, nil)
	closing(t, s)
	_, code, bound := socksDial(t, s.Addr().String(), cmdUDPAssociate, []byte{addrIPv4, 0, 0, 0, 0, 0, 0})
	if code != replyGood {
		t.Fatalf("reply %d", code)
	}
	c, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: bound[:4], Port: int(bound[4])<<8 | int(bound[5])})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	for _, text := range []string{"one", "two"} {
		c.Write(append(appendSocksAddr([]byte{0, 0, 0}, echo.LocalAddr()), text...))
		b := make([]byte, 2048)
		n, err := c.Read(b)
		want := append(appendSocksAddr([]byte{0, 0, 0}, echo.LocalAddr()), strings.ToUpper(text)...)
		if err != nil || !bytes.Equal(b[:n], want) {
			t.Errorf("datagram %q, %v; want %q", b[:n], err, want)
		}
	}
}

func TestHTTPConnectsAndForwards(t *testing.T) {
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s%s %q", r.Method, r.Host, r.URL.Path, r.Header.Get("Proxy-Connection"))
	}))
	defer web.Close()
	addr := web.Listener.Addr().String()
	var asked string
	h := ServeHTTP(listener(t), toEcho(addr, &asked), nil)
	closing(t, h)
	proxyURL := &url.URL{Scheme: "http", Host: h.Addr().String()}
	client := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(proxyURL)}, Timeout: time.Minute}
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://overlay.example/path")
	if err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if string(b) != `GET overlay.example/path ""` || asked != "tcp overlay.example:80" {
		t.Errorf("forwarded %q, dialled %q", b, asked)
	}

	c, err := net.Dial("tcp", h.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// The first bytes come together with the request, as some clients send them.
	fmt.Fprintf(c, "CONNECT overlay.example:99 HTTP/1.1\r\nHost: overlay.example:99\r\n\r\nGET /x HTTP/1.0\r\nHost: h\r\n\r\n")
	r := bufio.NewReader(c)
	if line, err := r.ReadString('\n'); err != nil || !strings.HasPrefix(line, "HTTP/1.1 200") || asked != "tcp overlay.example:99" {
		t.Errorf("CONNECT: %q, %v, dialled %q", line, err, asked)
	}
	if rest, err := io.ReadAll(r); err != nil || !strings.HasSuffix(string(rest), `GET h/x ""`) {
		t.Errorf("through CONNECT: %q, %v", rest, err)
	}

	direct, err := http.Get("http://" + h.Addr().String() + "/")
	if err != nil {
		t.Fatal(err)
	}
	direct.Body.Close()
	if direct.StatusCode != http.StatusBadRequest {
		t.Errorf("a request to the proxy itself: %s", direct.Status)
	}
}

func TestForwardArguments(t *testing.T) {
	for s, want := range map[string]Forward{
		"8080:10.1.2.3:80":       {"127.0.0.1:8080", "10.1.2.3:80"},
		"0.0.0.0:8080:web:80":    {"0.0.0.0:8080", "web:80"},
		"localhost:0:10.0.0.1:1": {"localhost:0", "10.0.0.1:1"},
	} {
		if got, err := ParseForward(s, "127.0.0.1"); err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "80", "80:host", "x:host:80", "80:host:x", "80::80", "80:host:0", "80:host:70000", "a:b:c:d:e"} {
		for _, bind := range []string{"", "127.0.0.1"} {
			if got, err := ParseForward(s, bind); err == nil {
				t.Errorf("%q was read as %+v", s, got)
			}
		}
	}
	// The overlay has one address of ours.
	if got, err := ParseForward("8080:10.1.2.3:80", ""); err != nil || got != (Forward{":8080", "10.1.2.3:80"}) {
		t.Errorf("without an address to choose: %+v, %v", got, err)
	}
	if got, err := ParseForward("0.0.0.0:8080:web:80", ""); err == nil {
		t.Errorf("an address to listen at where there is none to choose was read as %+v", got)
	}
}

func TestASocketIsItsOwnersOnlyAndReplacesADeadOne(t *testing.T) {
	dir, err := os.MkdirTemp("", "tweed-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := dir + "/s"
	l, err := Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(path)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	if _, err := Listen("unix:" + path); err == nil {
		t.Error("a socket in use was taken")
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	l, err = Listen("unix:" + path)
	if err != nil {
		t.Fatalf("a dead socket is in the way: %v", err)
	}
	l.Close()
	if _, err := Listen("1080"); err == nil || !strings.Contains(err.Error(), "unix:PATH") {
		t.Errorf("a port alone: %v", err)
	}
}
