package main

import (
	"net/netip"

	"github.com/spf13/cobra"

	"tweed/node"
)

// client holds the flags of the commands that ask a running engine.
type client struct {
	output
	stateDir, socket string
}

func (c *client) register(cmd *cobra.Command) {
	c.output.register(cmd)
	c.registerEngine(cmd)
}

// registerEngine registers the flags that choose the engine.
func (c *client) registerEngine(cmd *cobra.Command) {
	cmd.Flags().StringVar(&c.stateDir, "state-dir", "", "the engine's state `directory` (default: the only one running)")
	cmd.Flags().StringVar(&c.socket, "socket", "", "`path` of the engine's API socket")
	if err := cmd.MarkFlagDirname("state-dir"); err != nil {
		panic(err)
	}
}

// dial finds the engine's socket. With several engines and no flag the error
// lists them.
func (c *client) dial() (*node.Client, error) {
	path, err := node.FindSocket(c.socket, c.stateDir)
	if err != nil {
		return nil, err
	}
	return node.Dial(path), nil
}

// newClientCommand makes a command that asks the engine once and prints.
func newClientCommand(cmd *cobra.Command, ask func(*cobra.Command, *client, *node.Client, []string) error) *cobra.Command {
	var c client
	c.register(cmd)
	cmd.GroupID = groupLook
	if cmd.Args == nil {
		cmd.Args = noArgs
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		api, err := c.dial()
		if err != nil {
			return err
		}
		defer api.Close()
		return ask(cmd, &c, api, args)
	}
	return cmd
}

func addrText(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}
