package node

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"sort"
	"time"
)

// SocketPath is where the API socket of an engine with these settings is, for a
// program that starts one.
func SocketPath(c Config) string {
	name := c.TUNName
	if name == "" {
		name = DefaultTUNName
	}
	return defaultDirs(os.Geteuid(), os.Getenv).engine(c.StateDir, c.Socket, attachOnlyName(name)).socket
}

// LiveSockets are the API sockets of this user's engines that answer, in
// alphabetical order.
func LiveSockets() ([]string, error) {
	found, err := filepath.Glob(filepath.Join(defaultDirs(os.Geteuid(), os.Getenv).runtime, "*", socketName))
	if err != nil {
		return nil, err
	}
	var live []string
	for _, path := range found {
		if Answers(path) {
			live = append(live, path)
		}
	}
	sort.Strings(live)
	return live, nil
}

// Answers reports whether an engine listens on the API socket at path.
func Answers(path string) bool {
	c, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		return !errors.Is(err, os.ErrNotExist) && errors.Is(err, os.ErrDeadlineExceeded)
	}
	c.Close()
	return true
}
