package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/pflag"
)

// envName is the environment variable of a flag: --etcd-endpoints is
// TWEED_ETCD_ENDPOINTS.
func envName(flag string) string {
	return "TWEED_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// setFromEnv sets the flags that the command line left alone from the
// environment. An empty variable counts as unset, and a flag that may be
// repeated takes one value. A value that does not parse is a usage error
// naming the variable.
func setFromEnv(fs *pflag.FlagSet, lookup func(string) (string, bool)) error {
	var failed error
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Changed || f.Name == "help" || f.Name == "version" || failed != nil {
			return
		}
		value, ok := lookup(envName(f.Name))
		if !ok || value == "" {
			return
		}
		if err := fs.Set(f.Name, value); err != nil {
			failed = fmt.Errorf("%s=%q: %w", envName(f.Name), value, envCause(f, err))
		}
	})
	if failed != nil {
		return &usageError{path: "tweed", err: failed}
	}
	return nil
}

// envCause is what was expected instead, in the words of a bad command line.
func envCause(f *pflag.Flag, err error) error {
	var invalid *pflag.InvalidValueError
	if errors.As(err, &invalid) {
		return expected(f.Value, invalid.Unwrap())
	}
	return err
}
