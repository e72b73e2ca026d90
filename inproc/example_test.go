package inproc_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"time"

	"tweed/inproc"
)

// Two nodes of an overlay in one program: a server on one, a client on the
// other, real UDP between them, and no privilege.
func Example() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()

	network, err := inproc.NewNetwork(inproc.NetworkConfig{})
	if err != nil {
		log.Fatal(err)
	}
	defer network.Close()
	a, err := network.Start(ctx, "a")
	if err != nil {
		log.Fatal(err)
	}
	b, err := network.Start(ctx, "b")
	if err != nil {
		log.Fatal(err)
	}
	if err := network.Await(ctx); err != nil {
		log.Fatal(err)
	}

	l, err := b.Listen("tcp", ":80")
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		fmt.Fprintln(c, "hello over the overlay")
	}()

	c, err := a.Dial(ctx, "tcp", l.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	text, err := io.ReadAll(c)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Print(string(text))
	// Output: hello over the overlay
}
