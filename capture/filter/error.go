package filter

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// Error says what is wrong with an expression, where, and what to type instead.
type Error struct {
	// Expr is the whole expression.
	Expr string
	// Start and End delimit the offending bytes of Expr. End equals Start when
	// something is missing at that place.
	Start, End int
	// Msg says what is wrong, in one line.
	Msg string
	// Hint says what is accepted instead; empty when Msg says it already.
	Hint string
}

// Column returns the position of the mistake in Expr, in bytes, counted from 1.
func (e *Error) Column() int { return e.Start + 1 }

// Error returns one line: column, mistake, hint.
func (e *Error) Error() string {
	s := fmt.Sprintf("filter: column %d: %s", e.Column(), e.Msg)
	if e.Hint != "" {
		s += " (" + e.Hint + ")"
	}
	return s
}

// Caret returns the expression and below it a line that underlines the
// mistake, both without a trailing newline. Control characters of the
// expression are shown as spaces, so that the two lines stay aligned.
func (e *Error) Caret() string {
	shown := strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, e.Expr)
	start := min(e.Start, len(e.Expr))
	end := min(max(e.End, start), len(e.Expr))
	width := max(utf8.RuneCountInString(e.Expr[start:end]), 1)
	return shown + "\n" +
		strings.Repeat(" ", utf8.RuneCountInString(e.Expr[:start])) +
		"^" + strings.Repeat("~", width-1)
}

// didYouMean returns a hint with the candidate nearest to word, or "" when
// none is within two edits.
func didYouMean(word string, candidates []string) string {
	best, bestDist := "", 3
	for _, c := range candidates {
		if d := editDistance(strings.ToLower(word), c, bestDist); d < bestDist {
			best, bestDist = c, d
		}
	}
	// Two edits turn most words of three letters into most others.
	if best == "" || bestDist >= len(best) || bestDist == 2 && len(best) < 4 {
		return ""
	}
	return fmt.Sprintf("did you mean %q?", best)
}

// editDistance counts the insertions, deletions, replacements and swaps of
// neighbours that turn a into b, and gives up with limit when there are more.
func editDistance(a, b string, limit int) int {
	if len(a)-len(b) >= limit || len(b)-len(a) >= limit || len(a) > 64 {
		return limit
	}
	prev2 := make([]int, len(b)+1)
	prev := make([]int, len(b)+1)
	cur := make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], prev2[j-2]+1)
			}
		}
		prev2, prev, cur = prev, cur, prev2
	}
	return min(prev[len(b)], limit)
}
