package main

import (
	"context"
	"errors"
)

func (r *runner) withProxy(ctx context.Context, why string) error {
	return errors.New("run: " + why)
}
