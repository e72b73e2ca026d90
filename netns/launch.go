package netns

import (
	"errors"
	"os/exec"
	"runtime"
)

// errPdeathsig: see Start.
var errPdeathsig = errors.New("netns: start: Pdeathsig needs a Launcher (the signal follows the death of the starting thread)")

// Start starts cmd inside the namespace, as [exec.Cmd.Start]; the caller waits
// for it. A child inherits the namespace of the thread that forks it.
// SysProcAttr.Pdeathsig is refused: use a [Launcher] for that.
func (n *Namespace) Start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr != nil && cmd.SysProcAttr.Pdeathsig != 0 {
		return errPdeathsig
	}
	return n.Do(cmd.Start)
}

// Launcher starts processes from one thread that it keeps until Close. The
// kernel sends a child its Pdeathsig when the thread that forked it ends, not
// when the process does; from a Launcher it therefore means what it says:
// no child outlives this program, however the program ends. It is safe for
// concurrent use.
type Launcher struct {
	jobs chan launch
	done chan struct{}
}

type launch struct {
	where  *Namespace
	cmd    *exec.Cmd
	result chan error
}

// NewLauncher starts the thread. Wait for the children before Close: one that
// was given a Pdeathsig may get it when the thread ends.
func NewLauncher() *Launcher {
	l := &Launcher{jobs: make(chan launch), done: make(chan struct{})}
	go l.run()
	return l
}

// Start starts cmd inside the namespace; nil means where the program itself
// runs.
func (l *Launcher) Start(where *Namespace, cmd *exec.Cmd) error {
	job := launch{where: where, cmd: cmd, result: make(chan error, 1)}
	select {
	case l.jobs <- job:
		return <-job.result
	case <-l.done:
		return errors.New("netns: start: the launcher is closed")
	}
}

// Close ends the thread. It may be called once.
func (l *Launcher) Close() { close(l.done) }

// run never unlocks its thread, so the thread ends with the goroutine and never
// before.
func (l *Launcher) run() {
	runtime.LockOSThread()
	home, err := Current()
	if err == nil {
		defer home.Close()
	}
	for {
		select {
		case <-l.done:
			return
		case job := <-l.jobs:
			job.result <- start(home, err, job)
		}
	}
}

func start(home *Namespace, homeErr error, job launch) error {
	if job.where == nil {
		return job.cmd.Start()
	}
	if homeErr != nil {
		return homeErr
	}
	if err := job.where.join(); err != nil {
		return err
	}
	err := job.cmd.Start()
	if back := home.join(); back != nil {
		// Later jobs name their namespace themselves, except those for home.
		err = errors.Join(err, back)
	}
	return err
}
