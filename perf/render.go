package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// grid is a table ready to be printed: a heading, the column names and cells of
// text. Both the terminal and the Markdown tables are made from it.
type grid struct {
	heading string
	columns []string
	lines   [][]string
}

// grids are the tables of one link: figures, then ratios.
func (r *Report) grids(t *Table) []grid {
	names := make([]string, len(r.Subjects))
	for i, s := range r.Subjects {
		names[i] = s.Name
	}
	has := func(name string) bool { return slices.Contains(names, name) }
	figure := func(c Cell) *Spread { return &c.Spread }
	out := []grid{
		t.grid("Traffic, "+t.Link+" link", groupTraffic, names, figure),
		t.grid("Cost, "+t.Link+" link", groupCost, names, figure),
	}
	if has(subjectKernel) {
		out = append(out, t.grid("Ratio to kernel vxlan, "+t.Link+" link", "", names, func(c Cell) *Spread { return c.ToKernel }))
	}
	if has(subjectRaw) {
		out = append(out, t.grid("Ratio to raw veth, "+t.Link+" link", "", names, func(c Cell) *Spread { return c.ToRaw }))
	}
	if has(subjectPasta) || has(subjectSlirp) {
		out = append(out, t.grid("Ratio to the better of pasta and slirp4netns, "+t.Link+" link", "", names, func(c Cell) *Spread { return c.ToNAT }))
	}
	if slices.ContainsFunc(names, func(n string) bool { return twin(n) != "" && has(twin(n)) }) {
		out = append(out, t.grid("Ratio of tweed-b to tweed, "+t.Link+" link", "", names, func(c Cell) *Spread { return c.ToTwin }))
	}
	return slices.DeleteFunc(out, func(g grid) bool { return len(g.lines) == 0 })
}

// grid makes one table of the rows of a group, "" for all, and leaves out rows
// and columns without any figure.
func (t *Table) grid(heading, group string, names []string, pick func(Cell) *Spread) grid {
	var used []string
	for _, n := range names {
		if slices.ContainsFunc(t.Rows, func(r ResultRow) bool {
			c, ok := r.Cells[n]
			return ok && (group == "" || r.Group == group) && pick(c) != nil
		}) {
			used = append(used, n)
		}
	}
	g := grid{heading: heading, columns: append([]string{"", "unit"}, used...)}
	if group == "" {
		g.columns = append([]string{""}, used...)
	}
	rows := slices.Clone(t.Rows)
	slices.SortStableFunc(rows, func(a, b ResultRow) int { return strings.Compare(b.Group, a.Group) }) // traffic before cost
	for _, row := range rows {
		if group != "" && row.Group != group {
			continue
		}
		line := []string{row.Title}
		if group != "" {
			line = append(line, row.Unit)
		}
		empty := true
		for _, n := range used {
			text := "-"
			if c, ok := row.Cells[n]; ok && pick(c) != nil {
				text, empty = pick(c).String(), false
			}
			line = append(line, text)
		}
		if !empty {
			g.lines = append(g.lines, line)
		}
	}
	return g
}

// goalGrid compares with the floors and goals.
func (r *Report) goalGrid() grid {
	g := grid{heading: "Floors and goals", columns: []string{"", "link", "subject", "median", "floor", "goal", "verdict"}}
	for _, j := range r.judgements() {
		g.lines = append(g.lines, []string{
			j.title, j.link, j.subject, j.result.String(), number(j.floor), number(j.goal), j.verdict,
		})
	}
	return g
}

// String is the median with the range, such as "9.12 (8.80-9.41)"; the median
// alone when there is one value.
func (s Spread) String() string {
	if s.N == 1 {
		return number(s.Median)
	}
	return fmt.Sprintf("%s (%s-%s)", number(s.Median), number(s.Min), number(s.Max))
}

// number prints v with three significant digits, and never in exponent form.
func number(v float64) string {
	switch a := math.Abs(v); {
	case a == 0:
		return "0"
	case a >= 99.95:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case a >= 9.995:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case a >= 0.9995:
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
	return strconv.FormatFloat(v, 'f', 3, 64)
}

// writeText prints the tables for a terminal.
func (r *Report) writeText(w io.Writer) {
	for i := range r.Tables {
		for _, g := range r.grids(&r.Tables[i]) {
			g.writeText(w)
		}
	}
	if g := r.goalGrid(); len(g.lines) > 0 {
		g.writeText(w)
	}
	for _, n := range r.notes() {
		fmt.Fprintf(w, "* %s\n", n)
	}
	for _, f := range r.Failures {
		fmt.Fprintf(w, "* left out: %s on the %s link since round %d: %s\n", f.Subject, f.Link, f.Round, f.Error)
	}
	for _, s := range r.Samples {
		if s.Discarded != "" {
			fmt.Fprintf(w, "* discarded: %s\n", s.where())
		}
	}
}

// where names a discarded sample and the reason.
func (s Sample) where() string {
	return fmt.Sprintf("round %d, %s link, %s, %s: %s", s.Round, s.Link, s.Subject, s.Load, s.Discarded)
}

func (g grid) writeText(w io.Writer) {
	width := make([]int, len(g.columns))
	for _, line := range append([][]string{g.columns}, g.lines...) {
		for i, cell := range line {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	fmt.Fprintf(w, "%s\n", g.heading)
	for _, line := range append([][]string{g.columns}, g.lines...) {
		text := ""
		for i, cell := range line {
			text += cell + strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell)+2)
		}
		fmt.Fprintf(w, "  %s\n", strings.TrimRight(text, " "))
	}
	fmt.Fprintln(w)
}

// writeMarkdown writes the report as a page; chart is the name of the SVG file
// beside it.
func (r *Report) writeMarkdown(w io.Writer, chart string) {
	fmt.Fprintf(w, "# perf, %s\n\n", r.Started.UTC().Format("2006-01-02 15:04 UTC"))
	fmt.Fprintf(w, "%s\n\n", r.machine())
	fmt.Fprintf(w, "Medians of %s, in parentheses the smallest and the largest; %d s for each load, %d pings. "+
		"Ratios are computed within each round, then the median is taken.\n\n",
		plural(r.Settings.Rounds, "round"), r.Settings.Seconds, r.Settings.Pings)
	fmt.Fprintf(w, "![chart](%s)\n\n", chart)
	for i := range r.Tables {
		for _, g := range r.grids(&r.Tables[i]) {
			g.writeMarkdown(w)
		}
	}
	if g := r.goalGrid(); len(g.lines) > 0 {
		g.writeMarkdown(w)
	}
	versions := grid{heading: "Subjects", columns: []string{"", "MTU", "version"}}
	for _, s := range r.Subjects {
		mtu := "-"
		if s.MTU > 0 {
			mtu = strconv.Itoa(s.MTU)
		}
		versions.lines = append(versions.lines, []string{s.Name, mtu, s.Version})
	}
	versions.writeMarkdown(w)
	fmt.Fprintf(w, "## What these figures say and what they do not\n\n")
	for _, n := range r.notes() {
		fmt.Fprintf(w, "* %s\n", n)
	}
	if len(r.Failures) > 0 || r.discarded() > 0 {
		fmt.Fprintf(w, "\n## Left out\n\n")
	}
	for _, f := range r.Failures {
		fmt.Fprintf(w, "* %s on the %s link since round %d: %s\n", f.Subject, f.Link, f.Round, strings.Join(strings.Fields(f.Error), " "))
	}
	for _, s := range r.Samples {
		if s.Discarded != "" {
			fmt.Fprintf(w, "* %s\n", s.where())
		}
	}
}

func (g grid) writeMarkdown(w io.Writer) {
	join := func(cells []string) string {
		out := "|"
		for _, c := range cells {
			out += " " + strings.ReplaceAll(c, "|", `\|`) + " |"
		}
		return out
	}
	fmt.Fprintf(w, "## %s\n\n%s\n", g.heading, join(g.columns))
	fmt.Fprintf(w, "|%s\n", strings.Repeat("---|", len(g.columns)))
	for _, line := range g.lines {
		fmt.Fprintln(w, join(line))
	}
	fmt.Fprintln(w)
}

// machine is the machine in one line.
func (r *Report) machine() string {
	h := r.Host
	kind := ""
	if h.Virtual {
		kind = " (virtual machine)"
	}
	return fmt.Sprintf("%s%s, %s, %d MiB, Linux %s %s, TCP %s, %s",
		h.CPU, kind, plural(h.Cores, "core"), h.MemoryMiB, h.Kernel, h.Arch, h.Congestion, r.Tools["iperf3"])
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return strconv.Itoa(n) + " " + what + "s"
}
