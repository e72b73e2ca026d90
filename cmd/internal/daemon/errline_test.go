package daemon

import (
	"errors"
	"testing"
)

func TestErrorLineIsOneLineForAnOperator(t *testing.T) {
	for text, want := range map[string]string{
		"first\nsecond\r\n":             "first; second",
		"lease: etcd: no answer":        "etcd: no answer",
		"--iface eth9: no such":         "--iface eth9: no such",
		"lease: renew 10.0.0.0/24: eof": "renew 10.0.0.0/24: eof",
	} {
		if got := ErrorLine(errors.New(text)); got != want {
			t.Errorf("ErrorLine(%q) = %q, want %q", text, got, want)
		}
	}
}
