// Command flanneld runs a tweed node behind flannel's own flags and
// environment, so that it can take the place of the original under an
// existing unit file without a change.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"tweed/attach"
	"tweed/cmd/internal/daemon"
	"tweed/node"
)

func main() {
	if attach.IsHelper() {
		os.Exit(attach.HelperMain())
	}
	os.Exit(run(os.Args[1:], os.LookupEnv, os.Stderr))
}

// run is main without the process: it returns the exit status, which is 0 for
// a clean stop, 1 for a failure and 2 for a command line that does not parse.
func run(args []string, lookupEnv func(string) (string, bool), stderr io.Writer) int {
	o := newOptions(stderr)
	switch err := o.fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2 // the flag package has said why
	}
	if o.version {
		fmt.Fprintln(stderr, "tweed", daemon.Version(), "(flanneld)")
		return 0
	}
	envErr := setFromEnv(o.fs, "FLANNELD", lookupEnv)
	log, err := o.logger(stderr)
	if err != nil {
		return fail(stderr, err)
	}
	if envErr != nil {
		log.Warn("environment ignored", "error", envErr)
	}
	cfg, err := o.config(log)
	if err != nil {
		return fail(stderr, err)
	}
	n, err := node.New(cfg)
	if err != nil {
		return fail(stderr, err)
	}
	if err := daemon.Run(context.Background(), n); err != nil {
		return fail(stderr, err)
	}
	return 0
}

func fail(w io.Writer, err error) int {
	fmt.Fprintln(w, "flanneld:", daemon.ErrorLine(err))
	return 1
}
