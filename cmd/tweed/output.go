package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
)

// output is the value of -o.
type output struct{ format string }

func (o *output) register(cmd *cobra.Command) {
	o.format = "table"
	cmd.Flags().VarP((*outputFormat)(&o.format), "output", "o", "`format`: table, or json with a schema version")
	completeWords(cmd, "output", "table", "json")
}

// print writes v as JSON, or calls table, as -o says.
func (o *output) print(w io.Writer, v any, table func(io.Writer)) error {
	if o.format == "json" {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		return enc.Encode(v)
	}
	table(w)
	return nil
}

type outputFormat string

func (f *outputFormat) String() string { return string(*f) }
func (f *outputFormat) Type() string   { return "format" }

func (f *outputFormat) Set(v string) error {
	if v != "table" && v != "json" {
		return fmt.Errorf("expected table or json")
	}
	*f = outputFormat(v)
	return nil
}

// writeTable aligns rows under their headers. An empty cell shows as "-", so
// that columns can be counted by scripts as well.
func writeTable(w io.Writer, header []string, rows [][]string) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, strings.Join(header, "\t"))
	for _, row := range rows {
		cells := make([]string, len(row))
		for i, c := range row {
			cells[i] = orDash(c)
		}
		fmt.Fprintln(tw, strings.Join(cells, "\t"))
	}
	tw.Flush()
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// completeWords offers fixed words to the shell for a flag's value.
func completeWords(cmd *cobra.Command, flag string, words ...string) {
	// The only error is a flag that does not exist or is registered twice.
	if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err)
	}
}

// bytesText is a number of bytes for people.
func bytesText(n uint64) string {
	const unit = 1000
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	div, exp := uint64(unit), 0
	for v := n / unit; v >= unit; v /= unit {
		div *= unit
		exp++
	}
	return fmt.Sprintf("%.1f %cB", float64(n)/float64(div), "kMGTPE"[exp])
}

// count is a number and its noun in the right form.
func count(n uint64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
