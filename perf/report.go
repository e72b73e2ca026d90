package main

import (
	"slices"
	"time"
)

// reportSchema is the version of result.json. A field is added without changing
// it; it grows when a field goes or changes its meaning.
const reportSchema = 1

// Report is a whole run: what was measured on what, every single figure, and
// the tables made of them.
type Report struct {
	Schema  int       `json:"schema"`
	Started time.Time `json:"started"`
	// Elapsed is the length of the run in seconds.
	Elapsed  float64  `json:"elapsed_s"`
	Host     Host     `json:"host"`
	Settings Settings `json:"settings"`
	// Tools are versions of what the harness itself used.
	Tools    map[string]string `json:"tools"`
	Subjects []SubjectInfo     `json:"subjects"`
	Samples  []Sample          `json:"samples"`
	Failures []Failure         `json:"failures,omitempty"`
	// Tables are derived from Samples, one for each link.
	Tables []Table `json:"tables"`
	// Steal is the share of the machine, in percent, that the hypervisor gave
	// to others during the run.
	Steal float64 `json:"steal_percent"`
}

// Settings are the parameters of a run.
type Settings struct {
	Rounds int `json:"rounds"`
	// Seconds is the length of one traffic load.
	Seconds int      `json:"seconds"`
	Pings   int      `json:"pings"`
	Links   []string `json:"links"`
	Loads   []string `json:"loads"`
}

// SubjectInfo describes a column of the tables.
type SubjectInfo struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	// MTU of the overlay in bytes, 0 if it never came up.
	MTU int `json:"mtu,omitempty"`
}

// Sample is what one load on one subject gave in one round.
type Sample struct {
	Round   int    `json:"round"`
	Link    string `json:"link"`
	Subject string `json:"subject"`
	Load    string `json:"load"`
	// Values are by metric.
	Values map[string]float64 `json:"values,omitempty"`
	// Discarded says why the sample counts for nothing.
	Discarded string `json:"discarded,omitempty"`
}

// Failure is a subject that did not come up, and is left out from then on.
type Failure struct {
	Round   int    `json:"round"`
	Link    string `json:"link"`
	Subject string `json:"subject"`
	Error   string `json:"error"`
}

// Table holds the results on one link.
type Table struct {
	Link string      `json:"link"`
	Rows []ResultRow `json:"rows"`
}

// ResultRow is a Row with its cells by subject; a subject without a figure has
// no cell.
type ResultRow struct {
	Row
	Cells map[string]Cell `json:"cells"`
}

// Cell is one figure of one subject over all rounds.
type Cell struct {
	Spread
	// ToRaw, ToKernel and ToTwin are the ratios to raw veth, to the kernel's
	// vxlan, and of a column of the second binary to that of the first; each
	// is computed within a round first. They are absent where one side is.
	ToRaw    *Spread `json:"to_raw,omitempty"`
	ToKernel *Spread `json:"to_kernel_vxlan,omitempty"`
	ToTwin   *Spread `json:"to_twin,omitempty"`
	// ToNAT is the ratio to the better of pasta and slirp4netns in the same
	// round.
	ToNAT *Spread `json:"to_better_nat,omitempty"`
}

// summarise fills the tables from the samples.
func (r *Report) summarise(loads []load) {
	r.Tables = nil
	for _, link := range r.Settings.Links {
		t := Table{Link: link}
		for _, l := range loads {
			for _, row := range l.rows() {
				result := ResultRow{Row: row, Cells: map[string]Cell{}}
				for _, s := range r.Subjects {
					if c, ok := r.cell(link, s.Name, row); ok {
						result.Cells[s.Name] = c
					}
				}
				t.Rows = append(t.Rows, result)
			}
		}
		r.Tables = append(r.Tables, t)
	}
}

func (r *Report) cell(link, subject string, row Row) (Cell, bool) {
	values := r.figures(link, subject, row)
	if len(values) == 0 {
		return Cell{}, false
	}
	c := Cell{Spread: values.spread()}
	if row.NoRatio {
		return c, true
	}
	over := func(base byRound) *Spread {
		ratios := values.over(base)
		if len(ratios) == 0 {
			return nil
		}
		s := ratios.spread()
		return &s
	}
	to := func(base string) *Spread {
		if base == "" || base == subject {
			return nil
		}
		return over(r.figures(link, base, row))
	}
	c.ToRaw, c.ToKernel, c.ToTwin = to(subjectRaw), to(subjectKernel), to(twin(subject))
	if isTweed(subject) {
		c.ToNAT = over(r.betterNAT(link, row))
	}
	return c, true
}

// figures are the values of a row for one subject on one link.
func (r *Report) figures(link, subject string, row Row) byRound {
	if row.Metric == metricPingAdded {
		if subject == subjectRaw {
			return nil
		}
		avg := row
		avg.Metric = metricPingAvg
		return r.figures(link, subject, avg).minus(r.figures(link, subjectRaw, avg))
	}
	out := byRound{}
	for _, s := range r.Samples {
		if s.Link != link || s.Subject != subject || s.Load != row.Load || s.Discarded != "" {
			continue
		}
		if v, ok := s.Values[row.Metric]; ok {
			out[s.Round] = v
		}
	}
	return out
}

// row finds a row; nil if the run has none like it.
func (t *Table) row(load, metric string) *ResultRow {
	i := slices.IndexFunc(t.Rows, func(r ResultRow) bool { return r.Load == load && r.Metric == metric })
	if i < 0 {
		return nil
	}
	return &t.Rows[i]
}

// discarded counts the samples that count for nothing.
func (r *Report) discarded() int {
	n := 0
	for _, s := range r.Samples {
		if s.Discarded != "" {
			n++
		}
	}
	return n
}
