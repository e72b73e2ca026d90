package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Names of the files of a result.
const (
	resultJSON  = "result.json"
	resultPage  = "result.md"
	resultChart = "chart.svg"
)

// save writes the report as JSON, Markdown and SVG and returns the folder:
// out, or one below perf/results named after date, kernel and CPU.
func (r *Report) save(out string) (string, error) {
	if out == "" {
		root, err := moduleRoot()
		if err != nil {
			return "", fmt.Errorf("%w; or give a folder with --out DIR", err)
		}
		out = filepath.Join(root, "perf", "results", r.folder())
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return "", err
	}
	text, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return "", err
	}
	var page, chart bytes.Buffer
	r.writeMarkdown(&page, resultChart)
	r.writeChart(&chart)
	for name, content := range map[string][]byte{
		resultJSON: append(text, '\n'), resultPage: page.Bytes(), resultChart: chart.Bytes(),
	} {
		if err := os.WriteFile(filepath.Join(out, name), content, 0o644); err != nil {
			return "", err
		}
	}
	return out, nil
}

// folder is a name that says when and on what, in UTC to the minute.
func (r *Report) folder() string {
	return strings.Join([]string{
		r.Started.UTC().Format("2006-01-02-1504"), slug(r.Host.Kernel), slug(r.Host.CPU),
	}, "-")
}

// slug keeps letters, digits and points of s and joins the rest by single
// dashes; trade marks go.
func slug(s string) string {
	s = strings.NewReplacer("(R)", "", "(TM)", "", "(r)", "", "(tm)", "").Replace(s)
	return strings.ToLower(strings.Join(strings.FieldsFunc(s, func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.')
	}), "-"))
}
