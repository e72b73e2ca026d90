package lease

import (
	"fmt"
	"strings"
)

// applyConfig looks at a newer value of the config key, nil if the key is gone. A
// network that grew is put in force; anything that cannot be changed under a
// running node leaves the last good configuration in force and says why. It
// returns what is worth a log line. Called under the lock.
func (m *Manager) applyConfig(data []byte, rev int64) (note string) {
	m.configRev = rev
	now := m.state.Config
	pending := ""
	switch cfg, err := ParseNetworkConfig(data); {
	case data == nil:
		pending = fmt.Sprintf("the config key %s was deleted: the last good one stays in force; write it again with: tweed network set %s",
			m.reg.config, now.Network)
	case err != nil:
		pending = fmt.Sprintf("the newest network config is not valid, the last good one stays in force: %s",
			strings.TrimPrefix(err.Error(), "lease: network config: "))
	case cfg == now:
	default:
		if obstacle := m.obstacle(now, cfg); obstacle != "" {
			pending = fmt.Sprintf("the network config changed (%s): %s", configDiff(now, cfg), obstacle)
			break
		}
		m.state.Config = cfg
		note = "applied: " + configDiff(now, cfg)
	}
	if pending != m.state.PendingConfig {
		m.state.PendingConfig = pending
		switch {
		case pending != "":
			note = pending
		case note == "":
			note = "the last good configuration is the newest one again"
		}
	}
	return note
}

// obstacle says why a new configuration cannot be put in force under a running
// node, or nothing. Called under the lock.
func (m *Manager) obstacle(now, next NetworkConfig) string {
	const restart = "it takes effect when this node is restarted"
	switch {
	case next.Backend != now.Backend, next.EnableNFTables != now.EnableNFTables:
		return restart
	case next.SubnetLen != now.SubnetLen, !m.fits(next):
		return restart + ", with another subnet than " + m.state.Own.Subnet.String()
	case next.Network.Bits() > now.Network.Bits() || !next.Network.Contains(now.Network.Addr()):
		return "the network can only grow while nodes run; " + restart
	}
	if err := checkNetwork(next, m.publicIP); err != nil {
		return strings.TrimPrefix(err.Error(), "lease: network config: ")
	}
	for _, r := range m.table.records {
		if r.usable && next.Network.Contains(r.lease.PublicIP) && !now.Network.Contains(r.lease.PublicIP) {
			return fmt.Sprintf("it would cover the public IP %s of the node that holds %s, which could not be reached any more",
				r.lease.PublicIP, r.lease.Subnet)
		}
	}
	return ""
}

// fits reports whether the own subnet may be kept under a configuration.
func (m *Manager) fits(cfg NetworkConfig) bool {
	return m.state.OwnStatus == "" || cfg.Compatible(m.state.Own.Subnet)
}

// configDiff lists the fields in which two configurations differ, old -> new.
func configDiff(a, b NetworkConfig) string {
	var diff []string
	add := func(field string, old, new any) {
		if old != new {
			diff = append(diff, fmt.Sprintf("%s %v -> %v", field, old, new))
		}
	}
	add("Network", a.Network, b.Network)
	add("SubnetLen", a.SubnetLen, b.SubnetLen)
	add("SubnetMin", a.SubnetMin, b.SubnetMin)
	add("SubnetMax", a.SubnetMax, b.SubnetMax)
	add("EnableNFTables", a.EnableNFTables, b.EnableNFTables)
	add("Backend.Type", a.Backend.Type, b.Backend.Type)
	add("Backend.Port", a.Backend.Port, b.Backend.Port)
	add("Backend.VNI", a.Backend.VNI, b.Backend.VNI)
	add("Backend.MTU", a.Backend.MTU, b.Backend.MTU)
	add("Backend.GBP", a.Backend.GBP, b.Backend.GBP)
	add("Backend.Learning", a.Backend.Learning, b.Backend.Learning)
	add("Backend.DirectRouting", a.Backend.DirectRouting, b.Backend.DirectRouting)
	return strings.Join(diff, ", ")
}
