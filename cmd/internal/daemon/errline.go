package daemon

import "strings"

// ErrorLine is the one line a command prints for an error: without the line
// breaks of messages that other programs made, and without the name of the
// package that returned it, which says nothing to an operator.
func ErrorLine(err error) string {
	line := strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
	for _, pkg := range []string{"node: ", "lease: ", "engine: ", "encap: ", "tun: ", "netns: ", "attach: "} {
		if rest, found := strings.CutPrefix(line, pkg); found {
			return rest
		}
	}
	return line
}
