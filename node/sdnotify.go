package node

import (
	"net"
	"os"
	"strings"
)

// sdNotify tells systemd about the life of the service (sd_notify(3)). Outside
// a Type=notify unit NOTIFY_SOCKET is unset and nothing happens. Errors are
// not reported: systemd notices by its own time limit.
func sdNotify(lines ...string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		return
	}
	defer c.Close()
	_, _ = c.Write([]byte(strings.Join(lines, "\n")))
}
