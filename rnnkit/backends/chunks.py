"""A layer's time in chunks, for `recompute=True`: each chunk is a layer of its own, whose state at its start is known.

The forward keeps y and, of an LSTM, c, H numbers a step each, where the gates would be 4 H. So the scan makes the gates
of any chunk again from the state before it, and what a backward holds beside its inputs and results is a chunk's, not
all time's. Of c the steps at which chunks start would do; all of them cost H of the 6 H a step that an LSTM with I = H
has at its peak (x, y, c, their gradients, a chunk), and in return the backward's chunks need not be the forward's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import masks
from ..reference.scan import ScanGradients
from .spec import LayerInputs, LayerOutputs

MOST_CHUNKS = 16
"""At most. A chunk holds a sixteenth of the gates and of their gradients, some 10 H a step for an LSTM or a GRU: less
than one of x, y and c."""
LEAST_ROWS = 512
"""At least, of the products (steps times batch): with fewer they do not pay, and their memory is small."""


def chunk_bounds(steps: int, rows: int, *, last_first: bool) -> Iterable[tuple[int, int]]:
    """[t0, t1) in turn; one, without a step, where there is none."""
    most = max(1, -(-steps // MOST_CHUNKS), -(-LEAST_ROWS // max(1, rows)))
    found = [(t0, min(steps, t0 + most)) for t0 in range(0, steps, most)] or [(0, 0)]
    return reversed(found) if last_first else found


class Chunk(NamedTuple):
    """The steps [t0, t1) of a layer as a layer of its own."""

    t: LayerInputs
    """x, lengths and reset of these steps; h_0 and c_0 are the states before the first that is processed."""
    y: Tensor
    c_all: Tensor | None
    grads: LayerOutputs
    """Of y and c_all at these steps, and of the state after the last that is processed."""
    at_reset: Tensor | None
    """[B, 1]: where h_0 and c_0 are those of a reset, one at t1 in reverse. Others are the scan's own affair."""

    def with_state_dtype(self, dtype: torch.dtype) -> LayerInputs:
        """The tensors, with states of `dtype`: so come their gradients."""
        h, c = self.t.h_0.to(dtype), None if self.t.c_0 is None else self.t.c_0.to(dtype)
        return self.t._replace(h_0=h, c_0=c)

    def route_reset_grad(self, g: ScanGradients) -> ScanGradients:
        """Where the first state was a reset's, its gradient goes there and no further."""
        if self.at_reset is None:
            return g
        dh, dc, dh_reset, dc_reset = g.dh_0, g.dc_0, g.dh_reset, g.dc_reset
        dh_reset = None if dh_reset is None else dh_reset + dh.masked_fill(~self.at_reset, 0)
        if dc is not None:
            dc_reset = None if dc_reset is None else dc_reset + dc.masked_fill(~self.at_reset, 0)
            dc = dc.masked_fill(self.at_reset, 0)
        return g._replace(dh_0=dh.masked_fill(self.at_reset, 0), dc_0=dc, dh_reset=dh_reset, dc_reset=dc_reset)


def take_chunk(
    t: LayerInputs, y: Tensor, c_all: Tensor | None, grads: LayerOutputs, t0: int, t1: int, *, reverse: bool
) -> Chunk:
    """One chunk, given the states after every step. `grads`: of y and c_all at all steps; of the state at this chunk's
    end."""
    steps = y.shape[0]
    lengths = None if t.lengths is None else (t.lengths - t0).clamp(0, t1 - t0)
    reset = None if t.reset is None else t.reset[t0:t1]
    h, c, at_reset = t.h_0, t.c_0, None
    before = t1 if reverse else t0 - 1
    if 0 <= before < steps:
        first = h, c
        h, c = y[before], None if c_all is None else c_all[before]
        begun = None
        if reverse and t.lengths is not None:  # the others begin within this chunk, or in a later one
            begun = (t.lengths > t1).unsqueeze(-1)
            h = torch.where(begun, h, first[0])
            c = None if c is None or first[1] is None else torch.where(begun, c, first[1])
        if reverse and t.reset is not None:
            at_reset = t.reset[t1].unsqueeze(-1)
            at_reset = at_reset if begun is None else at_reset & begun
            h = masks.replace(h, at_reset, t.h_reset)
            c = None if c is None else masks.replace(c, at_reset, t.c_reset)
    own = t._replace(x=t.x[t0:t1], h_0=h, c_0=c, lengths=lengths, reset=reset)
    gy, gc_all = (None if g is None else g[t0:t1] for g in (grads.y, grads.c_all))
    return Chunk(
        own,
        y[t0:t1],
        None if c_all is None else c_all[t0:t1],
        LayerOutputs(gy, grads.h_n, grads.c_n, gc_all),  # type: ignore[arg-type]
        at_reset,
    )
