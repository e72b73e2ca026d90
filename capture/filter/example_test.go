package filter_test

import (
	"errors"
	"fmt"

	"tweed/capture/filter"
)

func ExampleCompile() {
	program, err := filter.Compile("reason no-route and inner tcp port 80", filter.Options{
		Reasons: []string{"no-route", "too-big"},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	syn := []byte("\x45\x00\x00\x28\x00\x01\x00\x00\x40\x06\x00\x00\x0a\x00\x00\x01\x0a\x4d\x02\x05" +
		"\x04\x00\x00\x50\x00\x00\x00\x01\x00\x00\x00\x00\x50\x02\xff\xff\x00\x00\x00\x00")
	fmt.Println(program.Match(&filter.Meta{Inner: syn, Dropped: true, Reason: 0}, syn))
	fmt.Println(program.Match(&filter.Meta{Inner: syn, Dropped: true, Reason: 1}, syn))
	// Output:
	// true
	// false
}

func ExampleError() {
	_, err := filter.Compile("host 10.77.2.5 and tcp prt 80", filter.Options{})
	var mistake *filter.Error
	if errors.As(err, &mistake) {
		fmt.Println(mistake.Caret())
		fmt.Println(err)
	}
	// Output:
	// host 10.77.2.5 and tcp prt 80
	//                        ^~~
	// filter: column 24: unknown word "prt" (did you mean "port"?)
}
