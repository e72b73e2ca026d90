package filter

import (
	"fmt"
	"net/netip"

	"golang.org/x/net/bpf"
)

// LinkType is a LINKTYPE value of pcap files: what a record starts with.
type LinkType uint16

// The link types the compiler knows.
const (
	LinkEthernet LinkType = 1   // an Ethernet header
	LinkRaw      LinkType = 101 // an IPv4 or IPv6 header
	LinkIPv4     LinkType = 228 // an IPv4 header
)

// MaxInstructions bounds the size of a program. It is the limit of the Linux
// kernel (BPF_MAXINSNS), so that what compiles can also be attached.
const MaxInstructions = 4096

// maxTests bounds the work of compiling what may still shrink to
// MaxInstructions.
const maxTests = 2 * MaxInstructions

// snapLen is the value a classic program returns for a match: how many bytes
// to keep. It is that of tcpdump.
const snapLen = 262144

// acceptBlock and rejectBlock are the verdicts every graph ends in.
var acceptBlock, rejectBlock = &block{}, &block{}

// Options says what an expression is compiled for. The zero value compiles for
// IPv4 packets and knows no names.
type Options struct {
	// Link is the link type of the records; 0 means LinkIPv4.
	Link LinkType
	// Points and Reasons are the names after "point" and "reason". The index of
	// a name is the number Meta carries.
	Points, Reasons []string
	// Peers finds the underlay addresses of the peer a word after "peer" names.
	// nil, or no addresses, leaves only addresses written as such.
	Peers func(word string) ([]netip.Addr, error)
}

// Program is a compiled expression. It is immutable: any number of goroutines
// may use it at once.
type Program struct {
	expr    string
	link    LinkType
	steps   []step
	peers   [][]netip.Addr
	classic []bpf.RawInstruction
	never   *Error
}

// Compile translates an expression. The empty one matches every packet. Its
// errors are of type *Error.
func Compile(text string, opt Options) (*Program, error) {
	switch opt.Link {
	case 0:
		opt.Link = LinkIPv4
	case LinkIPv4, LinkRaw, LinkEthernet:
	default:
		return nil, &Error{Expr: text, Msg: fmt.Sprintf("no filters for link type %d", opt.Link),
			Hint: "1 (Ethernet), 101 (raw IP) and 228 (IPv4) have them"}
	}
	tree, err := parse(text)
	if err != nil {
		return nil, err
	}
	w := &lowerer{text: text, opt: &opt}
	var c cond = condBool(true)
	if tree != nil {
		if c, err = w.lower(tree); err != nil {
			return nil, err
		}
	}
	if n := countTests(c); n > maxTests {
		return nil, tooLarge(text, n)
	}
	root := build(c, acceptBlock, rejectBlock)
	improve(root)
	p := &Program{expr: text, link: opt.Link, steps: toSteps(root), peers: w.own.peers}
	n := len(p.steps)
	if n <= MaxInstructions && pure(p.steps) {
		p.classic = toClassic(emit(root))
		n = len(p.classic)
	}
	if n > MaxInstructions {
		return nil, tooLarge(text, n)
	}
	if !reaches(root, acceptBlock) {
		if p.never = w.never; p.never == nil {
			p.never = &Error{Expr: text, End: len(text), Msg: "no packet can match this expression"}
		}
	}
	return p, nil
}

func tooLarge(text string, instructions int) *Error {
	return &Error{Expr: text, End: len(text), Msg: fmt.Sprintf("the expression takes %d instructions", instructions),
		Hint: fmt.Sprintf("the limit is %d; a net or a portrange may replace a list", MaxInstructions)}
}

// reaches reports whether a way leads from root to the verdict b.
func reaches(root, b *block) bool {
	if root == b {
		return true
	}
	for _, x := range order(root) {
		if x.t == b || x.f == b {
			return true
		}
	}
	return false
}

// pure reports whether a program looks at the bytes of the record only.
func pure(steps []step) bool {
	for i := range steps {
		if s := &steps[i]; s.jump > ret || s.load.scope != scopeRecord {
			return false
		}
	}
	return true
}

// String returns the expression the program was compiled from.
func (p *Program) String() string { return p.expr }

// Link returns the link type the program was compiled for.
func (p *Program) Link() LinkType { return p.link }

// Classic returns the program as classic BPF, for a socket or another
// evaluator, and whether there is such a form: there is none when the
// expression uses a word of our own. The caller must not change the slice.
func (p *Program) Classic() ([]bpf.RawInstruction, bool) { return p.classic, p.classic != nil }

// Never returns an error that names the cause when the compiler can tell that
// no packet matches, such as "ip6" on LinkIPv4, and nil otherwise. nil does not
// promise that some packet matches.
func (p *Program) Never() error {
	if p.never == nil {
		return nil
	}
	return p.never
}
