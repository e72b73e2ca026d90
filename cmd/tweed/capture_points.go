package main

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"tweed/engine"
	"tweed/engine/tap"
)

// dropComments say why a packet was dropped, by reason. The part up to the
// blank is stable: frame.comment contains "drop:no-route" finds it.
var dropComments = func() (texts [256]string) {
	for r := range texts {
		texts[r] = "drop:" + engine.Reason(r).String()
		if doc := engine.Reason(r).Doc(); doc != "" {
			texts[r] += " (" + doc + ")"
		}
	}
	return texts
}()

// pointGroups are names for several tap points.
var pointGroups = map[string]tap.Points{
	"inner": tap.Of(tap.TunIn, tap.TunOut),
	"outer": tap.Of(tap.WireOut, tap.WireIn),
	"all":   tap.AllPoints,
}

func parsePoints(words []string) (tap.Points, error) {
	var all tap.Points
	for _, word := range words {
		if group, ok := pointGroups[word]; ok {
			all |= group
			continue
		}
		p, err := tap.ParsePoint(word)
		if err != nil {
			return 0, fmt.Errorf("--point %q: expected tun-in, wire-out, wire-in, tun-out, drop, or inner, outer, all", word)
		}
		all |= tap.Of(p)
	}
	return all, nil
}

func namesOf(points tap.Points) []string {
	var names []string
	for p := range tap.NumPoints {
		if points.Has(p) {
			names = append(names, p.String())
		}
	}
	return names
}

// flowEnd is one end of a conversation; port may be empty.
type flowEnd struct{ host, port string }

func (e flowEnd) term(dir string) string {
	if e.port == "" {
		return dir + " host " + e.host
	}
	return dir + " host " + e.host + " and " + dir + " port " + e.port
}

// flowFilter is the filter for one conversation, both directions, inside the
// tunnel: HOST[:PORT],HOST[:PORT].
func flowFilter(text string) (string, error) {
	var ends []flowEnd
	for _, word := range strings.Split(text, ",") {
		e := flowEnd{host: word}
		if host, port, found := strings.Cut(word, ":"); found {
			if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
				return "", fmt.Errorf("--flow %q: port %q: expected 1 to 65535", text, port)
			}
			e = flowEnd{host, port}
		}
		if ip, err := netip.ParseAddr(e.host); err == nil && ip.Is4() {
			ends = append(ends, e)
		}
	}
	if len(ends) != 2 || strings.Count(text, ",") != 1 {
		return "", fmt.Errorf("--flow %q: expected HOST[:PORT],HOST[:PORT], such as 10.244.1.2,10.244.2.3:80", text)
	}
	a, b := ends[0], ends[1]
	return fmt.Sprintf("inner ((%s and %s) or (%s and %s))", a.term("src"), b.term("dst"), b.term("src"), a.term("dst")), nil
}
