package main

import (
	"fmt"
	"io"
	"runtime"

	"github.com/spf13/cobra"

	"tweed/cmd/internal/daemon"
	"tweed/node"
)

// versionAnswer is what `tweed version -o json` prints.
type versionAnswer struct {
	Schema  int    `json:"schema"`
	Version string `json:"version"`
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

func newVersionCommand() *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := versionAnswer{node.Schema, daemon.Version(), runtime.Version(), runtime.GOOS, runtime.GOARCH}
			return out.print(cmd.OutOrStdout(), v, func(w io.Writer) {
				fmt.Fprintf(w, "tweed %s (%s %s/%s)\n", v.Version, v.Go, v.OS, v.Arch)
			})
		},
	}
	out.register(cmd)
	return cmd
}
