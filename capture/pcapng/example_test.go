package pcapng_test

import (
	"bytes"
	"fmt"

	"tweed/capture/pcapng"
)

func Example() {
	var file bytes.Buffer
	w, err := pcapng.NewWriter(&file, &pcapng.Header{
		Application: "tweed", Link: pcapng.LinkIPv4,
		Interfaces: []pcapng.Interface{{Name: "tun-in"}, {Name: "drop"}},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	err = w.WritePacket(&pcapng.Packet{Interface: 1, Data: []byte{0x45}, Length: 84, Comment: "drop:no-route"})
	if err == nil {
		err = w.Flush()
	}
	if err != nil {
		fmt.Println(err)
		return
	}

	r, err := pcapng.NewReader(&file)
	for err == nil {
		var p pcapng.Packet
		if err = r.Next(&p); err == nil {
			fmt.Println(r.Interfaces()[p.Interface].Name, len(p.Data), "of", p.Length, "bytes,", p.Comment)
		}
	}
	fmt.Println(err)
	// Output:
	// drop 1 of 84 bytes, drop:no-route
	// EOF
}
