package main

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From include/uapi/linux/ethtool.h.
const (
	stringSetFeatures = 4  // ETH_SS_FEATURES
	featureNameLength = 32 // ETH_GSTRING_LEN
	setBlockSize      = 8  // struct ethtool_set_features_block: valid, requested
	getBlockSize      = 16 // struct ethtool_get_features_block: available, requested, active, never_changed
)

// wireLike makes a device of the calling thread's namespace hand over frames of
// at most its MTU: all segmentation offloads off, TCP's, UDP's and the
// tunnels', and GRO on. It fails if the kernel leaves one of them on.
func wireLike(dev string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	e := ethtool{fd: fd, dev: dev}
	names, err := e.featureNames()
	if err != nil {
		return err
	}
	request := make([]byte, 8+blocks(len(names))*setBlockSize)
	put(request, 0, unix.ETHTOOL_SFEATURES)
	put(request, 4, uint32(blocks(len(names))))
	for i, name := range names {
		on := mergesOnReceive(name)
		if !on && !cutsOnSend(name) {
			continue
		}
		at := 8 + i/32*setBlockSize
		bit := uint32(1) << (i % 32)
		put(request, at, get(request, at)|bit)
		if on {
			put(request, at+4, get(request, at+4)|bit)
		}
	}
	if err := e.call(request); err != nil {
		return fmt.Errorf("ethtool: set features of %s: %w", dev, err)
	}
	return e.checkWireLike(names)
}

// cutsOnSend tells the features that let a super-packet leave whole.
func cutsOnSend(name string) bool {
	return strings.HasPrefix(name, "tx-") && (strings.Contains(name, "segmentation") || strings.HasPrefix(name, "tx-gso"))
}

// mergesOnReceive tells GRO's feature.
func mergesOnReceive(name string) bool { return name == "rx-gro" }

// ethtool speaks the SIOCETHTOOL commands for one device.
type ethtool struct {
	fd  int
	dev string
}

// checkWireLike reads back what the kernel made of the request.
func (e ethtool) checkWireLike(names []string) error {
	answer := make([]byte, 8+blocks(len(names))*getBlockSize)
	put(answer, 0, unix.ETHTOOL_GFEATURES)
	put(answer, 4, uint32(blocks(len(names))))
	if err := e.call(answer); err != nil {
		return fmt.Errorf("ethtool: get features of %s: %w", e.dev, err)
	}
	for i, name := range names {
		active := get(answer, 8+i/32*getBlockSize+8)&(1<<(i%32)) != 0
		if active && cutsOnSend(name) {
			return fmt.Errorf("link wire: %s of %s stays on: this kernel cannot cut frames on veth", name, e.dev)
		}
		if !active && mergesOnReceive(name) {
			return fmt.Errorf("link wire: %s of %s stays off: this kernel has no GRO on veth", name, e.dev)
		}
	}
	return nil
}

// featureNames are the kernel's, in the order of their bits.
func (e ethtool) featureNames() ([]string, error) {
	info := make([]byte, 20) // struct ethtool_sset_info with one count
	put(info, 0, unix.ETHTOOL_GSSET_INFO)
	binary.NativeEndian.PutUint64(info[8:], 1<<stringSetFeatures)
	if err := e.call(info); err != nil {
		return nil, fmt.Errorf("ethtool: features of %s: %w", e.dev, err)
	}
	n := int(get(info, 16))
	text := make([]byte, 12+n*featureNameLength) // struct ethtool_gstrings
	put(text, 0, unix.ETHTOOL_GSTRINGS)
	put(text, 4, stringSetFeatures)
	put(text, 8, uint32(n))
	if err := e.call(text); err != nil {
		return nil, fmt.Errorf("ethtool: feature names of %s: %w", e.dev, err)
	}
	names := make([]string, n)
	for i := range names {
		at := 12 + i*featureNameLength
		names[i] = unix.ByteSliceToString(text[at : at+featureNameLength])
	}
	return names, nil
}

// call passes one command, which the kernel may answer in place.
func (e ethtool) call(command []byte) error {
	var request struct { // struct ifreq with ifr_data
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(request.name[:unix.IFNAMSIZ-1], e.dev)
	request.data = unsafe.Pointer(&command[0])
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(e.fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
	runtime.KeepAlive(command)
	if errno != 0 {
		return errno
	}
	return nil
}

// blocks is the number of 32-bit blocks n features take.
func blocks(n int) int { return (n + 31) / 32 }

func put(b []byte, at int, v uint32) { binary.NativeEndian.PutUint32(b[at:], v) }
func get(b []byte, at int) uint32    { return binary.NativeEndian.Uint32(b[at:]) }
