package accel

import (
	"crypto/sha256"
	"fmt"
	"os"
	"testing"
)

// TestObjectsAreOfThisSource: whoever changes bpf/accel.c has to compile it.
func TestObjectsAreOfThisSource(t *testing.T) {
	const source = "bpf/accel.c"
	text, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	compiled, err := os.ReadFile(source + ".sha256")
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("%x  %s\n", sha256.Sum256(text), source); string(compiled) != want {
		t.Errorf("the committed objects were compiled from\n%s%s is\n%srun: go generate ./accel", compiled, source, want)
	}
}
