// Package tun is the overlay side of tweed: a TUN device with its queues, the
// virtio-net header in front of every packet, the splitting of super-packets
// into segments and the coalescing of packets into super-packets.
//
// Splitter, Coalescer and the checksums are pure. The life of the device
// (name, up, down, MTU changes) is followed with
// golang.zx2c4.com/wireguard/tun; packets are read and written on the raw
// descriptors, because that package reads one packet at a time and copies every
// segment. tun knows nothing of leases, peers or framings.
package tun

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

const (
	cloneDevice = "/dev/net/tun"

	offloadsTSO  = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
	offloadsFull = offloadsTSO | unix.TUN_F_USO4 | unix.TUN_F_USO6
)

// Config says how a Device is opened.
type Config struct {
	// Name is the interface name, at most 15 bytes. A trailing %d takes the
	// first free number.
	Name string
	// MTU in bytes, set on the device.
	MTU int
	// Queues is the number of queues, at least 1.
	Queues int
	// Offload is the highest rung to use.
	Offload Offload
}

// Device is an open TUN device. It vanishes from the network namespace when it
// is closed.
type Device struct {
	name    string
	queues  []*Queue
	offload Offload
	why     string
	wg      wgtun.Device
	events  chan wgtun.Event
	pumped  sync.WaitGroup
	once    sync.Once
}

// Open creates a TUN device in the calling thread's network namespace. It
// sets the MTU, but neither addresses nor routes, and leaves the device down.
// The error names what is missing: the device node, the permission to use it,
// CAP_NET_ADMIN, or a free name.
func Open(cfg Config) (*Device, error) {
	flags := uint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if cfg.Queues > 1 {
		// A multi-queue device would let a second engine attach to it unnoticed.
		flags |= unix.IFF_MULTI_QUEUE | unix.IFF_TUN_EXCL
	}
	d := &Device{name: cfg.Name, events: make(chan wgtun.Event, 8)}
	for range max(cfg.Queues, 1) {
		// The first queue settles the name, the others join the device.
		q, name, err := openQueue(d.name, flags)
		if err != nil {
			d.closeQueues()
			return nil, err
		}
		d.queues, d.name = append(d.queues, q), name
		flags &^= unix.IFF_TUN_EXCL
	}
	if err := d.follow(cfg.MTU); err != nil {
		d.closeQueues()
		return nil, err
	}
	if err := d.setOffload(cfg.Offload); err != nil {
		d.Close()
		return nil, err
	}
	for _, q := range d.queues {
		if err := unix.SetNonblock(q.fd, true); err != nil {
			d.Close()
			return nil, fmt.Errorf("tun: %s: %w", d.name, err)
		}
	}
	return d, nil
}

func openQueue(name string, flags uint16) (*Queue, string, error) {
	fd, err := unix.Open(cloneDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, "", openError(err)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		unix.Close(fd)
		return nil, "", fmt.Errorf("tun: interface name %q: expected 1 to 15 bytes", name)
	}
	ifr.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		unix.Close(fd)
		return nil, "", createError(name, err)
	}
	return newQueue(fd, OffloadNone), ifr.Name(), nil
}

func openError(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return fmt.Errorf("tun: %s does not exist: load the tun module (modprobe tun), or give the container the device: %w", cloneDevice, err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("tun: %s may not be opened by uid %d: run as root, or chmod 0666 %s: %w", cloneDevice, os.Geteuid(), cloneDevice, err)
	}
	return fmt.Errorf("tun: open %s: %w", cloneDevice, err)
}

func createError(name string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("tun: %s may not be created: CAP_NET_ADMIN is missing in this network namespace (run as root, or grant the capability): %w", name, err)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("tun: %s is in use by another program: choose another --tun-name: %w", name, err)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("tun: %s exists and is no TUN device of this kind, or is no valid interface name: choose another --tun-name: %w", name, err)
	}
	return fmt.Errorf("tun: create %s: %w", name, err)
}

// follow hands a duplicate of the first queue to the wireguard package, which
// sets the MTU and reports what happens to the device. The descriptor still
// blocks at this point, which keeps it out of Go's network poller: there every
// packet would wake a second thread.
func (d *Device) follow(mtu int) error {
	dup, err := unix.FcntlInt(uintptr(d.queues[0].fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("tun: %s: %w", d.name, err)
	}
	f := os.NewFile(uintptr(dup), cloneDevice)
	wg, err := wgtun.CreateTUNFromFile(f, mtu)
	if err != nil {
		f.Close()
		return fmt.Errorf("tun: %s: set MTU %d and watch the device: %w", d.name, mtu, err)
	}
	d.wg = wg
	d.pumped.Go(func() {
		for ev := range wg.Events() {
			select {
			case d.events <- ev:
			default: // nobody listens: the next state matters, not the history
			}
		}
		close(d.events)
	})
	return nil
}

// setOffload takes the highest rung up to want that the kernel accepts.
func (d *Device) setOffload(want Offload) error {
	for _, q := range d.queues {
		rung, why, err := SetOffload(q.fd, want)
		if err != nil {
			return fmt.Errorf("tun: %s: %w", d.name, err)
		}
		q.rung, d.offload, d.why = rung, rung, why
	}
	return nil
}

// SetOffload takes the highest rung up to want that the kernel accepts for the
// TUN queue fd, and says why it is that one.
func SetOffload(fd int, want Offload) (rung Offload, why string, err error) {
	why = "asked for with --offload " + want.String()
	if want == OffloadAuto {
		why = "the kernel accepts every offload"
	}
	if want >= OffloadFull {
		err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloadsFull)
		if err == nil {
			return OffloadFull, why, nil
		}
		why = fmt.Sprintf("the kernel refuses UDP segmentation on TUN (%v; Linux 6.2 has it)", err)
	}
	if want >= OffloadTSO {
		err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloadsTSO)
		if err == nil {
			return OffloadTSO, why, nil
		}
		why = fmt.Sprintf("the kernel refuses TCP segmentation on TUN (%v)", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0); err != nil {
		return OffloadNone, "", fmt.Errorf("switch offloads off: %w", err)
	}
	return OffloadNone, why, nil
}

// Name returns the interface name.
func (d *Device) Name() string { return d.name }

// Queues returns the queues, one for each worker.
func (d *Device) Queues() []*Queue { return d.queues }

// Refused is how many of the writes to its queues the kernel counts in the
// device's rx_dropped, beside what it dropped itself.
func (d *Device) Refused() uint64 {
	n := uint64(0)
	for _, q := range d.queues {
		n += q.refused.Load()
	}
	return n
}

// Offload returns the rung in use.
func (d *Device) Offload() Offload { return d.offload }

// OffloadReason says in a few words why that rung is in use.
func (d *Device) OffloadReason() string { return d.why }

// Events reports that the device went up or down or changed its MTU. Events
// that nobody receives are dropped. The channel is closed by Close.
func (d *Device) Events() <-chan wgtun.Event { return d.events }

// Close removes the device. No read or write may be running or follow. Calls after the first do nothing.
func (d *Device) Close() error {
	var err error
	d.once.Do(func() {
		if d.wg != nil {
			err = d.wg.Close()
			d.pumped.Wait()
		}
		d.closeQueues()
	})
	return err
}

func (d *Device) closeQueues() {
	for _, q := range d.queues {
		_ = q.Close()
	}
	d.queues = nil
}
