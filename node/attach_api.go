package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"tweed/attach"
	"tweed/netns"
	"tweed/tun"
)

// maxAttachRequest bounds the body of a request to attach, in bytes.
const maxAttachRequest = 16 << 10

// attachOnlyName is what an engine without a TUN device is called: the name its
// device would have, a pattern without its number.
func attachOnlyName(tunName string) string {
	base, _ := cutPattern(tunName)
	return base
}

// checkAttachOnly refuses what needs the host to be part of the overlay.
func checkAttachOnly(c *Config) error {
	if !c.AttachOnly {
		return nil
	}
	for _, f := range []struct {
		name  string
		given bool
	}{
		{"--ip-masq", c.IPMasq}, {"--iptables-forward-rules", c.IPTablesForward}, {"--ip-blackhole-route", c.BlackholeRoute},
	} {
		if f.given {
			return fmt.Errorf("%s: with --attach-only the host is no part of the overlay, so there is nothing to do for it", f.name)
		}
	}
	return nil
}

// offload is the rung of the host's device, or what the attachments may use.
func (r *runner) offload() tun.Offload {
	if r.dev != nil {
		return r.dev.Offload()
	}
	return r.cfg.Offload
}

func (r *runner) plane() plane {
	return plane{
		eng: r.eng, subnet: r.own.Subnet, network: r.overlay.cfg.Network,
		mtu: r.overlay.mtu, gso: r.overlay.gso, offload: r.cfg.Offload,
	}
}

// Attach connects a container or a program to the overlay and returns what it
// was given. It fails with ErrNoSubnet before the node is ready, and with
// ErrAttached when container, name or address are attached already.
func (n *Node) Attach(ctx context.Context, r AttachRequest) (AttachmentStatus, error) {
	a := n.attached.Load()
	if a == nil {
		return AttachmentStatus{}, fmt.Errorf("the node has %w", ErrNoSubnet)
	}
	return a.attach(ctx, r)
}

// Detach lets go of an attachment and removes its interface. It fails with
// ErrNotAttached when there is none of that name.
func (n *Node) Detach(_ context.Context, name string) error {
	a := n.attached.Load()
	if a == nil {
		return fmt.Errorf("%w: %s", ErrNotAttached, name)
	}
	return a.detach(name)
}

// Attachments are the containers and programs connected now, in order of their
// addresses.
func (n *Node) Attachments() []AttachmentStatus {
	list, _ := n.attached.Load().snapshot()
	return list
}

// Attached is how many containers and programs are connected now, and how many
// were attached by request since the start. One that lived for a moment is
// found in the second figure only. It may be called at any time.
func (n *Node) Attached() (now, ever int) {
	a := n.attached.Load()
	if a == nil {
		return 0, 0
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.all), a.ever
}

// attachHandlers adds the calls of attachments to the API.
func (n *Node) attachHandlers(mux *http.ServeMux) {
	mux.HandleFunc("GET /v1/attachments", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, AttachmentsAnswer{Schema: Schema, Attachments: n.Attachments()})
	})
	mux.HandleFunc("POST /v1/attachments", requireAdmin(func(w http.ResponseWriter, r *http.Request) {
		var req AttachRequest
		d := json.NewDecoder(io.LimitReader(r.Body, maxAttachRequest))
		d.DisallowUnknownFields()
		if err := d.Decode(&req); err != nil {
			refuse(w, http.StatusBadRequest, "attach: "+err.Error())
			return
		}
		s, err := n.Attach(r.Context(), req)
		if err != nil {
			refuse(w, attachCode(err), err.Error())
			return
		}
		answer(w, AttachmentsAnswer{Schema: Schema, Attachments: []AttachmentStatus{s}})
	}))
	mux.HandleFunc("DELETE /v1/attachments/{name}", requireAdmin(func(w http.ResponseWriter, r *http.Request) {
		if err := n.Detach(r.Context(), r.PathValue("name")); err != nil {
			refuse(w, attachCode(err), err.Error())
			return
		}
		answer(w, AttachmentsAnswer{Schema: Schema, Attachments: []AttachmentStatus{}})
	}))
}

// attachCode is the HTTP status of an error.
func attachCode(err error) int {
	var made *attach.Error
	var join *netns.JoinError
	switch {
	case errors.Is(err, errBadRequest):
		return http.StatusBadRequest
	case errors.Is(err, ErrNotAttached), errors.Is(err, netns.ErrGone):
		return http.StatusNotFound
	case errors.Is(err, ErrAttached):
		return http.StatusConflict
	case errors.Is(err, ErrNoSubnet):
		return http.StatusServiceUnavailable
	case errors.As(err, &made), errors.As(err, &join):
		return http.StatusUnprocessableEntity
	}
	return http.StatusInternalServerError
}

// Attach asks the engine to attach a container or a program.
func (c *Client) Attach(ctx context.Context, r AttachRequest) (AttachmentStatus, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return AttachmentStatus{}, err
	}
	var a AttachmentsAnswer
	if err := c.change(ctx, http.MethodPost, "/v1/attachments", body, &a); err != nil {
		return AttachmentStatus{}, err
	}
	if len(a.Attachments) != 1 {
		return AttachmentStatus{}, fmt.Errorf("%s: the engine answered with %d attachments, expected 1", c.path, len(a.Attachments))
	}
	return a.Attachments[0], nil
}

// Detach asks the engine to let go of an attachment.
func (c *Client) Detach(ctx context.Context, name string) error {
	var a AttachmentsAnswer
	return c.change(ctx, http.MethodDelete, "/v1/attachments/"+url.PathEscape(name), nil, &a)
}

// Attachments returns the attachments in order of their addresses.
func (c *Client) Attachments(ctx context.Context) (AttachmentsAnswer, error) {
	var a AttachmentsAnswer
	return a, c.get(ctx, "/v1/attachments", &a)
}

// Status is everything the node knows about itself, as the API answers it.
func (n *Node) Status() Status { return n.status() }

// Peers is the number of other nodes packets can be sent to now.
func (n *Node) Peers() int {
	if t := n.view.Load().table; t != nil {
		return len(t.peers)
	}
	return 0
}
