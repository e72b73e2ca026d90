package node

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"
)

const socketName = "api.sock"

// Environment names that stand in for the flags of the client commands.
const (
	EnvStateDir = "TWEED_STATE_DIR"
	EnvSocket   = "TWEED_SOCKET"
)

// userDirs are the default roots for one user (DESIGN 4.1): sockets below
// runtime, everything else below state.
type userDirs struct{ runtime, state string }

func defaultDirs(euid int, getenv func(string) string) userDirs {
	if euid == 0 {
		return userDirs{runtime: "/run/tweed", state: "/var/lib/tweed"}
	}
	var d userDirs
	if x := getenv("XDG_RUNTIME_DIR"); x != "" {
		d.runtime = filepath.Join(x, "tweed")
	} else {
		// No login session: a private directory of the user's own.
		d.runtime = filepath.Join(os.TempDir(), fmt.Sprintf("tweed-%d", euid))
	}
	if x := getenv("XDG_STATE_HOME"); x != "" {
		d.state = filepath.Join(x, "tweed")
	} else if home := getenv("HOME"); home != "" {
		d.state = filepath.Join(home, ".local", "state", "tweed")
	} else {
		d.state = filepath.Join(d.runtime, "state")
	}
	return d
}

// enginePaths are the places of one engine.
type enginePaths struct {
	stateDir, socket string
	// runDirs are directories for the socket alone that nobody else may count on,
	// deepest first: they go with the engine, even if one that was killed made them.
	runDirs []string
}

// removeRunDirs removes the runDirs that are empty.
func (p enginePaths) removeRunDirs() {
	for _, dir := range p.runDirs {
		_ = os.Remove(dir) // fails when it is not empty
	}
}

func (d userDirs) engine(stateDir, socket, tunName string) enginePaths {
	p := enginePaths{stateDir: stateDir, socket: socket}
	if p.stateDir == "" {
		p.stateDir = filepath.Join(d.state, tunName)
		if p.socket == "" {
			p.runDirs = []string{filepath.Join(d.runtime, tunName), d.runtime}
			p.socket = filepath.Join(d.runtime, tunName, socketName)
		}
	}
	if p.socket == "" {
		p.socket = filepath.Join(p.stateDir, socketName)
	}
	return p
}

// StateDirs returns the state directories that engines of this user have in
// their usual place, whether they run or not.
func StateDirs() []string {
	found, err := filepath.Glob(filepath.Join(defaultDirs(os.Geteuid(), os.Getenv).state, "*", identityFile))
	if err != nil {
		return nil // a pattern in a directory's name
	}
	for i, path := range found {
		found[i] = filepath.Dir(path)
	}
	return found
}

// ErrNoEngine: no engine answers in the usual places.
var ErrNoEngine = errors.New("no engine found")

// FindSocket returns the API socket of the engine a client command means: the
// explicit path, else the one in stateDir, else what the environment names,
// else the only engine that answers on this host. With several engines, or
// none, the error lists what was found and what to type.
func FindSocket(explicit, stateDir string) (string, error) {
	if explicit == "" && stateDir == "" {
		explicit, stateDir = os.Getenv(EnvSocket), os.Getenv(EnvStateDir)
	}
	if explicit != "" {
		return explicit, nil
	}
	d := defaultDirs(os.Geteuid(), os.Getenv)
	if stateDir != "" {
		return d.socketOf(stateDir), nil
	}
	roots := []string{d.runtime}
	if d.runtime != "/run/tweed" {
		roots = append(roots, "/run/tweed")
	}
	return scanSockets(roots)
}

// socketOf is the API socket of the engine with a state directory: in it, or for
// a default one, which has none, in the default place.
func (d userDirs) socketOf(stateDir string) string {
	inside := filepath.Join(stateDir, socketName)
	dir := filepath.Dir(inside)
	if filepath.Dir(dir) == d.state && !isSocket(inside) {
		return d.engine("", "", filepath.Base(dir)).socket
	}
	return inside
}

func isSocket(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode()&os.ModeSocket != 0
}

// scanSockets finds the only answering socket below roots. The first root that
// has any decides, so that an ordinary user's engine comes before root's.
func scanSockets(roots []string) (string, error) {
	var denied []string
	for _, root := range roots {
		found, err := filepath.Glob(filepath.Join(root, "*", socketName))
		if err != nil {
			return "", err
		}
		var live []string
		for _, path := range found {
			c, err := net.DialTimeout("unix", path, time.Second)
			switch {
			case err == nil:
				c.Close()
				live = append(live, path)
			case errors.Is(err, os.ErrPermission):
				denied = append(denied, path)
			}
		}
		sort.Strings(live)
		switch len(live) {
		case 0:
		case 1:
			return live[0], nil
		default:
			return "", fmt.Errorf("%d engines run here: choose one with --socket: %s", len(live), strings.Join(live, ", "))
		}
	}
	if len(denied) > 0 {
		return "", fmt.Errorf("%s: permission denied: run as root or as the user that started the engine", strings.Join(denied, ", "))
	}
	return "", fmt.Errorf("%w (looked in %s): start one with tweed up, or name it with --state-dir DIR or --socket PATH", ErrNoEngine, strings.Join(roots, ", "))
}

// dirMaker creates directories and can take back those it made, so that a
// start that fails leaves nothing behind.
type dirMaker struct{ made []string }

// mkdirAll is os.MkdirAll that remembers what it created.
func (m *dirMaker) mkdirAll(dir string, mode os.FileMode) error {
	var missing []string
	for d := filepath.Clean(dir); ; d = filepath.Dir(d) {
		fi, err := os.Stat(d)
		if err == nil {
			if !fi.IsDir() {
				return fmt.Errorf("%s: not a directory", d)
			}
			break
		}
		if !errors.Is(err, os.ErrNotExist) {
			return err
		}
		missing = append(missing, d)
	}
	for i := len(missing) - 1; i >= 0; i-- {
		m2 := os.FileMode(0o755)
		if i == 0 {
			m2 = mode
		}
		if err := os.Mkdir(missing[i], m2); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		m.made = append(m.made, missing[i])
	}
	return nil
}

// undoExcept removes the directories it made, deepest first, but for keep and
// its parents, and those that something else is in by now.
func (m *dirMaker) undoExcept(keep string) {
	keep = filepath.Clean(keep) + string(filepath.Separator)
	for i := len(m.made) - 1; i >= 0; i-- {
		if strings.HasPrefix(keep, m.made[i]+string(filepath.Separator)) {
			continue
		}
		_ = os.Remove(m.made[i]) // fails when it is not empty
	}
	m.made = nil
}
