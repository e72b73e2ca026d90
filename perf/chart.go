package main

import (
	"fmt"
	"html"
	"io"
	"math"
)

// Measures of the chart in pixels.
const (
	chartMargin   = 24
	chartLabels   = 118 // column of subject names
	chartBars     = 240 // longest bar
	chartFigures  = 150 // figure right of the bar
	chartBarStep  = 20
	chartBar      = 13
	chartTitle    = 26 // title above the bars of a panel
	chartGap      = 18 // between panels
	chartHeader   = 64
	chartPanel    = chartLabels + chartBars + chartFigures
	chartPerLine  = 2
	chartLinkHead = 30
)

// chartColours are by kind of subject: ours stand out, baselines are grey.
var chartColours = map[string]string{
	subjectRaw: "#b8bec6", subjectKernel: "#7d8794",
	subjectPasta: "#e0b48c", subjectSlirp: "#d9a3a3", subjectSplice: "#c3b1d9",
	peerFlanneld: "#e0b48c", peerWireGuard: "#d9a3a3", peerNebula: "#c3b1d9",
}

func chartColour(subject string) string {
	if c, ok := chartColours[subject]; ok {
		return c
	}
	if twin(subject) != "" {
		return "#4fae9b"
	}
	return "#1f6feb"
}

// writeChart draws the traffic rows of every link as an SVG picture: bars are
// medians, the thin lines on them reach from the smallest to the largest round.
func (r *Report) writeChart(w io.Writer) {
	type panel struct {
		row  ResultRow
		x, y int
	}
	var panels []panel
	type label struct {
		text string
		y    int
	}
	var links []label
	height := chartTitle + len(r.Subjects)*chartBarStep + chartGap
	y := chartHeader
	for _, t := range r.Tables {
		links = append(links, label{"link " + t.Link, y + 16})
		y += chartLinkHead
		n := 0
		for _, row := range t.Rows {
			if row.Group != groupTraffic || len(row.Cells) == 0 {
				continue
			}
			panels = append(panels, panel{row, chartMargin + n%chartPerLine*(chartPanel+chartGap), y + n/chartPerLine*height})
			n++
		}
		y += (n + chartPerLine - 1) / chartPerLine * height
	}
	width := 2*chartMargin + chartPerLine*chartPanel + (chartPerLine-1)*chartGap
	fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" font-family="system-ui, sans-serif" font-size="12" fill="#1c2128">`+"\n", width, y+chartMargin)
	fmt.Fprintf(w, `<rect width="100%%" height="100%%" fill="#ffffff"/>`+"\n")
	svgText(w, chartMargin, 26, `font-size="16" font-weight="600"`, "tweed perf, "+r.Started.UTC().Format("2006-01-02")+", medians of "+plural(r.Settings.Rounds, "round"))
	svgText(w, chartMargin, 46, `fill="#57606a"`, r.machine())
	for _, l := range links {
		svgText(w, chartMargin, l.y, `font-size="14" font-weight="600"`, l.text)
	}
	for _, p := range panels {
		r.writePanel(w, p.row, p.x, p.y)
	}
	fmt.Fprintln(w, "</svg>")
}

func (r *Report) writePanel(w io.Writer, row ResultRow, x, y int) {
	note := "higher is better"
	if row.LowerIsBetter {
		note = "lower is better"
	}
	svgText(w, x, y+13, `font-weight="600"`, fmt.Sprintf("%s, %s (%s)", row.Title, row.Unit, note))
	most := 0.0
	for _, c := range row.Cells {
		most = max(most, c.Max)
	}
	length := func(v float64) float64 {
		if most <= 0 {
			return 0
		}
		return math.Round(max(v, 0)/most*chartBars*10) / 10
	}
	y += chartTitle
	for _, s := range r.Subjects {
		svgText(w, x+chartLabels-8, y+11, `text-anchor="end"`, s.Name)
		if c, ok := row.Cells[s.Name]; ok {
			left := x + chartLabels
			fmt.Fprintf(w, `<rect x="%d" y="%d" width="%g" height="%d" fill="%s"/>`+"\n", left, y, length(c.Median), chartBar, chartColour(s.Name))
			if c.N > 1 {
				fmt.Fprintf(w, `<path d="M%g %dH%g" stroke="#1c2128"/>`+"\n", float64(left)+length(c.Min), y+chartBar/2, float64(left)+length(c.Max))
			}
			svgText(w, left+chartBars+8, y+11, `fill="#57606a"`, c.String())
		} else {
			svgText(w, x+chartLabels, y+11, `fill="#8c959f"`, "-")
		}
		y += chartBarStep
	}
}

func svgText(w io.Writer, x, y int, style, text string) {
	fmt.Fprintf(w, `<text x="%d" y="%d" %s>%s</text>`+"\n", x, y, style, html.EscapeString(text))
}
