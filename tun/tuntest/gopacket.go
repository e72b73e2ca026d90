package tuntest

import (
	"bytes"
	"fmt"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
)

// CheckDecoded decodes the packet with gopacket, encodes the layers again with
// lengths and checksums computed, and returns an error unless the same bytes
// come out.
func CheckDecoded(b []byte) error {
	pkt := gopacket.NewPacket(b, layers.LayerTypeIPv4, gopacket.DecodeOptions{NoCopy: true})
	if e := pkt.ErrorLayer(); e != nil {
		return fmt.Errorf("gopacket: %w", e.Error())
	}
	ip, ok := pkt.NetworkLayer().(*layers.IPv4)
	if !ok {
		return fmt.Errorf("gopacket: no IPv4 layer in % x", b[:min(len(b), 20)])
	}
	list := []gopacket.SerializableLayer{ip}
	switch l := pkt.TransportLayer().(type) {
	case *layers.TCP:
		_ = l.SetNetworkLayerForChecksum(ip)
		list = append(list, l, gopacket.Payload(l.Payload))
	case *layers.UDP:
		_ = l.SetNetworkLayerForChecksum(ip)
		list = append(list, l, gopacket.Payload(l.Payload))
	default:
		list = append(list, gopacket.Payload(ip.Payload))
	}
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, list...); err != nil {
		return fmt.Errorf("gopacket: %w", err)
	}
	if !bytes.Equal(buf.Bytes(), b) {
		n := min(len(b), 60)
		return fmt.Errorf("gopacket encodes it differently:\n have % x\n want % x", b[:n], buf.Bytes()[:min(len(buf.Bytes()), n)])
	}
	return nil
}
