package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tweed/cmd/internal/daemon"
)

// usageError is a command line that cannot be carried out as typed. It ends
// the process with status 2.
type usageError struct {
	path string // the command to ask for help
	err  error
}

func newUsageError(cmd *cobra.Command, err error) error {
	return &usageError{path: cmd.CommandPath(), err: err}
}

func (e *usageError) Error() string {
	return fmt.Sprintf("%s (see: %s --help)", daemon.ErrorLine(e.err), e.path)
}

func (e *usageError) Unwrap() error { return e.err }

// asUsageError recognises the one usage error cobra reports as plain text.
func asUsageError(cmd *cobra.Command, err error) error {
	name, found := strings.CutPrefix(err.Error(), "unknown command ")
	if !found {
		return err
	}
	name, _, _ = strings.Cut(strings.TrimPrefix(name, `"`), `"`)
	return newUsageError(cmd, unknownCommand(cmd, name))
}

func unknownCommand(cmd *cobra.Command, name string) error {
	if near := cmd.SuggestionsFor(name); len(near) > 0 {
		return fmt.Errorf("unknown command %q; did you mean: %s %s", name, cmd.CommandPath(), near[0])
	}
	return fmt.Errorf("unknown command %q", name)
}

// explainFlagError puts a flag error into the words of all others: the flag,
// its value and what was expected.
func explainFlagError(cmd *cobra.Command, err error) error {
	var invalid *pflag.InvalidValueError
	if errors.As(err, &invalid) {
		return fmt.Errorf("--%s %q: %w", invalid.GetFlag().Name, invalid.GetValue(), expected(invalid.GetFlag().Value, invalid.Unwrap()))
	}
	var unknown *pflag.NotExistError
	if errors.As(err, &unknown) {
		// flannel's habit of one dash reads as a bundle of short flags here.
		long, _, _ := strings.Cut(unknown.GetSpecifiedShortnames(), "=")
		if len(long) > 1 && cmd.Flags().Lookup(long) != nil {
			return fmt.Errorf("-%s: expected two dashes: --%s", long, long)
		}
	}
	return err
}

// expected says what a flag takes, where the flag package only says that it
// could not parse the value.
func expected(v pflag.Value, cause error) error {
	switch v.Type() {
	case "int", "uint", "int64", "uint64", "uint16", "uint32":
		return errors.New("expected a whole number in range")
	case "bool":
		return errors.New("expected true or false")
	case "duration":
		return errors.New("expected a time such as 30s, 5m or 24h")
	}
	return cause
}

// noArgs refuses positional arguments.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return newUsageError(cmd, fmt.Errorf("%q: expected no argument", args[0]))
}

// oneArg wants exactly one positional argument; what names it.
func oneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch len(args) {
		case 0:
			return newUsageError(cmd, fmt.Errorf("expected %s; type: %s", what, cmd.UseLine()))
		case 1:
			return nil
		}
		return newUsageError(cmd, fmt.Errorf("%q: expected nothing after %s", args[1], what))
	}
}

// group makes a command that only has subcommands: alone or with an unknown
// one it is a usage error, where cobra would print help and succeed.
func group(cmd *cobra.Command, subcommands ...*cobra.Command) *cobra.Command {
	cmd.AddCommand(subcommands...)
	cmd.SuggestionsMinimumDistance = 2
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return newUsageError(cmd, unknownCommand(cmd, args[0]))
		}
		var names []string
		for _, sub := range cmd.Commands() {
			names = append(names, cmd.CommandPath()+" "+sub.Name())
		}
		return newUsageError(cmd, fmt.Errorf("expected a subcommand; type: %s", strings.Join(names, " or ")))
	}
	return cmd
}

// newHelpCommand is cobra's help command, but an unknown topic is an error.
func newHelpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "help [command]",
		Short: "Help about any command",
		RunE: func(cmd *cobra.Command, args []string) error {
			topic, rest, err := cmd.Root().Find(args)
			if err != nil || topic.HasSubCommands() && len(rest) > 0 {
				return newUsageError(cmd.Root(), unknownCommand(topic, args[len(args)-1]))
			}
			topic.InitDefaultHelpFlag()
			return topic.Help()
		},
	}
}
