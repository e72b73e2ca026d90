package filter

import (
	"fmt"
	"math/rand/v2"
	"regexp"
	"testing"
)

// vanishing are expressions of which a load is multiplied away. Whether libpcap
// still does it then depends on what stands around them.
var vanishing = regexp.MustCompile(`[*&] 0 `)

// composed joins random expressions of the corpus by and, or, not and
// parentheses, up to depth levels.
func composed(r *rand.Rand, depth int) corpusEntry {
	if depth == 0 || r.IntN(4) == 0 {
		for {
			e := pick(r, corpus)
			if e.expr != "" && e.expr == e.oracle && !vanishing.MatchString(e.expr) {
				return corpusEntry{"(" + e.expr + ")", "(" + e.oracle + ")"}
			}
		}
	}
	a, b := composed(r, depth-1), composed(r, depth-1)
	form := pick(r, []string{"%s and %s", "%s or %s", "(%s or %s)", "(%s and %s)", "not (%s or %s)", "! (%s and %s)", "%s and not %s"})
	text := fmt.Sprintf(form, a.expr, b.expr)
	return corpusEntry{text, text}
}

// On packets cut short inside a header libpcap's optimiser decides case by case
// which loads remain, so that tcpdump and tcpdump -O differ on one verdict in
// 300 here; ours must then be one of the two.
func TestComposedExpressionsAgreeWithTcpdump(t *testing.T) {
	tool := needTool(t, "tcpdump")
	for _, link := range allLinks {
		t.Run(fmt.Sprint("link ", link), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(2, uint64(link)))
			packets := randomPackets(r, link, 2000)
			c := comparison{eitherWay: true}
			for range 150 {
				c.compare(t, tool, link, composed(r, 3), packets)
			}
			t.Logf("%d expressions, %d verdicts, %d disagreements; %d where tcpdump and tcpdump -O differ",
				c.expressions, c.verdicts, c.disagreements, c.split)
		})
	}
}
