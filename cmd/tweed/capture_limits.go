package main

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// captureLimits are the values of -a or -b: when to stop, or when to go on to
// the next file. 0 is no limit.
type captureLimits struct {
	duration time.Duration
	// filesize is in bytes; -a and -b say it in kB of 1000 bytes.
	filesize int64
	packets  uint64
	files    int
}

// Type, String and Set make it a flag that may be repeated.
func (l *captureLimits) Type() string { return "limit" }

func (l *captureLimits) String() string { return "" }

func (l *captureLimits) Set(text string) error {
	const want = "expected duration:SECONDS, filesize:KB, packets:N or files:N"
	kind, value, found := strings.Cut(text, ":")
	if !found {
		return errors.New(want)
	}
	if kind == "duration" {
		s, err := strconv.ParseFloat(value, 64)
		if err != nil || !(s > 0) || s > math.MaxInt32 {
			return fmt.Errorf("duration %q: expected seconds above 0, such as 3 or 0.5", value)
		}
		l.duration = time.Duration(s * float64(time.Second))
		return nil
	}
	n, err := strconv.ParseUint(value, 10, 31)
	if err != nil || n == 0 {
		n = 0
	}
	switch kind {
	case "filesize":
		l.filesize = int64(n) * 1000
	case "packets":
		l.packets = n
	case "files":
		l.files = int(n)
	default:
		return errors.New(want)
	}
	if n == 0 {
		return fmt.Errorf("%s %q: expected a whole number from 1 to %d", kind, value, math.MaxInt32)
	}
	return nil
}

// strftime expands the conversions people use in file names with -G. The rest
// stays as it is.
func strftime(format string, t time.Time) string {
	var b strings.Builder
	for i := 0; i < len(format); i++ {
		if format[i] != '%' || i+1 == len(format) {
			b.WriteByte(format[i])
			continue
		}
		i++
		layout := map[byte]string{
			'Y': "2006", 'y': "06", 'm': "01", 'd': "02", 'H': "15", 'M': "04", 'S': "05", 'I': "03", 'p': "PM",
			'F': "2006-01-02", 'T': "15:04:05", 'R': "15:04", 'b': "Jan", 'B': "January", 'a': "Mon", 'A': "Monday", 'Z': "MST", 'z': "-0700",
		}[format[i]]
		switch {
		case layout != "":
			b.WriteString(t.Format(layout))
		case format[i] == 's':
			b.WriteString(strconv.FormatInt(t.Unix(), 10))
		case format[i] == 'j':
			fmt.Fprintf(&b, "%03d", t.YearDay())
		case format[i] == '%':
			b.WriteByte('%')
		default:
			b.WriteByte('%')
			b.WriteByte(format[i])
		}
	}
	return b.String()
}
