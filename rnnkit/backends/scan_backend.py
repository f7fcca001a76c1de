"""The base class of backends that bring two scans, and the matrix products around them, written once.

Before the scan: gx = x W_ihᵀ with the biases. After the backward scan: one product for each weight gradient. What
lies beyond a row's length, or belongs to steps that no gradient reached, is masked by selection, never by
multiplication: 0 · NaN is NaN. With `recompute` all of this goes chunk by chunk of time (chunks.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import masks
from ..cells import CELLS, Cell, compute_dtype
from ..reference import lstm
from ..reference.scan import ScanGradients
from . import chunks
from .base import Backend, Gradient
from .spec import LayerInputs, LayerOptions, LayerOutputs, Result


def project(cell: Cell, t: LayerInputs) -> Tensor:
    """gx [T, B, G·H]: the input projection with every bias that the recurrence does not multiply."""
    bias = t.b_ih
    if t.b_ih is not None and t.b_hh is not None:
        if cell.reset_after:  # b_hn stays inside the reset gate's product
            inside = t.b_ih.shape[0] // 3 * 2
            bias = torch.cat([t.b_ih[:inside] + t.b_hh[:inside], t.b_ih[inside:]])
        else:
            bias = t.b_ih + t.b_hh
    return F.linear(t.x, t.w_ih, bias)


def bias_inside(cell: Cell, t: LayerInputs) -> Tensor | None:
    """b_hn [H], the bias that the reset gate of `gru` multiplies."""
    return t.b_hh[t.b_hh.shape[0] // 3 * 2 :] if cell.reset_after and t.b_hh is not None else None


def gemm_tn(gradient: Tensor, value: Tensor) -> Tensor:
    """Σ over time and rows of gradientᵀ value: [T, B, M], [T, B, N] -> [M, N]."""
    count = gradient.shape[0] * gradient.shape[1]  # flatten has no rule for autograd.grad(is_grads_batched=True)
    return gradient.reshape(count, gradient.shape[2]).T @ value.reshape(count, value.shape[2])


def weight_gradients(
    cell: Cell, g: ScanGradients, t: LayerInputs, y: Tensor, c_all: Tensor | None, gates: Tensor | None, o: LayerOptions
) -> list[Gradient]:
    """Gradients of every tensor of `LayerInputs`, in its order, from those of the scan. All in the scan's type."""
    x = t.x
    alive = masks.valid_mask(t.lengths, x.shape[0], x.device)
    at = masks.reset_mask(t.reset, alive, o.reverse)
    h = masks.previous(y, t.h_0, t.lengths, at, t.h_reset, o.reverse)
    dead = None
    if alive is not None or at is not None:  # no gradient came here, so nothing that stands here may pass on NaN
        dead = (g.dgx == 0).all(-1, keepdim=True)
        x, h = x.masked_fill(dead, 0), h.masked_fill(dead, 0)

    if cell.reset_before and gates is not None:
        rz = g.dgh.shape[-1] // 3 * 2
        r = gates.chunk(3, -1)[0]
        r = r if dead is None else r.masked_fill(dead, 0)
        dw_hh = torch.cat([gemm_tn(g.dgh[..., :rz], h), gemm_tn(g.dgh[..., rz:], r * h)])
    else:
        dw_hh = gemm_tn(g.dgh, h)
    dw_hr = None
    if t.w_hr is not None and g.dp is not None and gates is not None and c_all is not None:
        m = lstm.before_projection(gates, c_all)
        if dead is not None:
            m = m.masked_fill((g.dp == 0).all(-1, keepdim=True), 0)
        dw_hr = gemm_tn(g.dp, m)
    biased = t.b_ih is not None
    return [
        g.dgx @ t.w_ih,
        g.dh_0,
        g.dc_0,
        gemm_tn(g.dgx, x),
        dw_hh,
        g.dgx.sum((0, 1)) if biased else None,
        g.dgh.sum((0, 1)) if biased else None,
        dw_hr,
        None,
        None,
        g.dh_reset if t.h_reset is not None else None,
        g.dc_reset if t.c_reset is not None else None,
    ]


class ScanBackend(Backend):
    """A backend that brings a forward and a backward scan; the matrix products are those of this file."""

    def scan_forward(
        self, cell: Cell, gx: Tensor, h: Tensor, c: Tensor | None, t: LayerInputs, *, t0: int, reverse: bool, save: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """States of the steps [t0, t0 + n): y, h_n, c_n, c_all, gates; the last two only with `save`."""
        raise NotImplementedError(self.name)

    def scan_backward(
        self,
        cell: Cell,
        grads: LayerOutputs,
        y: Tensor,
        c_all: Tensor | None,
        gates: Tensor | None,
        t: LayerInputs,
        o: LayerOptions,
    ) -> ScanGradients:
        """Gradients of the scan over all of `t`, which may be a chunk of a longer layer: those of its h_0 and c_0 have
        their dtypes, and so have those of h_reset and c_reset."""
        raise NotImplementedError(self.name)

    def forward(self, cell: str, t: LayerInputs, o: LayerOptions, *, train: bool, graph: bool = False) -> Result:
        kind = CELLS[cell]
        if train and o.recompute:
            return self._forward_in_chunks(kind, t, o)
        save = train or (o.all_states and kind.has_c)
        y, h_n, c_n, c_all, gates = self.scan_forward(
            kind, project(kind, t), t.h_0, t.c_0, t, t0=0, reverse=o.reverse, save=save
        )
        saved = tuple(v for v in (gates, c_all) if v is not None) if train else ()
        return Result(LayerOutputs(y, h_n, c_n, c_all if o.all_states else None), saved)

    def _forward_in_chunks(self, cell: Cell, t: LayerInputs, o: LayerOptions) -> Result:
        """gx and gates for a chunk at a time; what is kept is c of an LSTM. The state passes in the compute type."""
        steps, rows = t.x.shape[:2]
        wide = compute_dtype(t.x.dtype)
        h, c = t.h_0.to(wide), None if t.c_0 is None else t.c_0.to(wide)
        y = c_all = None
        for t0, t1 in chunks.chunk_bounds(steps, rows, last_first=o.reverse):
            here = t._replace(x=t.x[t0:t1])
            y_chunk, h, c, c_chunk = self.scan_forward(
                cell, project(cell, here), h, c, t, t0=t0, reverse=o.reverse, save=cell.has_c
            )[:4]
            y, c_all = write_time_slice(y, y_chunk, t0, steps), write_time_slice(c_all, c_chunk, t0, steps)
        h_n, c_n = h.to(t.x.dtype), None if c is None else c.to(t.x.dtype)
        outputs = LayerOutputs(y, h_n, c_n, c_all if o.all_states else None)  # type: ignore[arg-type]
        return Result(outputs, () if c_all is None else (c_all,))

    def backward(
        self,
        cell: str,
        t: LayerInputs,
        o: LayerOptions,
        y: Tensor,
        result: Result | None,
        grads: LayerOutputs,
        needs: list[bool],
    ) -> list[Gradient]:
        kind = CELLS[cell]
        saved = self.kept(cell, t, o, result)
        if o.recompute:
            return self._backward_in_chunks(kind, t, o, y, saved[0] if kind.has_c else None, grads, needs)
        gates = saved[0] if kind.saved else None
        c_all = saved[1] if kind.has_c else None
        scan = self.scan_backward(kind, grads, y, c_all, gates, t, o)
        every = weight_gradients(kind, scan, t, y, c_all, gates, o)
        return [g if need else None for g, need in zip(every, needs, strict=True)]

    def _backward_in_chunks(
        self,
        cell: Cell,
        t: LayerInputs,
        o: LayerOptions,
        y: Tensor,
        c_all: Tensor | None,
        grads: LayerOutputs,
        needs: list[bool],
    ) -> list[Gradient]:
        """Chunk by chunk, the last first: the gates again, the scan back, a share of every weight's gradient. Those of
        the state pass from chunk to chunk in the compute type, and shares are summed in it."""
        wide = compute_dtype(t.x.dtype)
        steps, rows = t.x.shape[:2]
        dh, dc = (None if v is None else v.to(wide) for v in (grads.h_n, grads.c_n))
        grads = LayerOutputs(grads.y, dh, dc, grads.c_all)  # type: ignore[arg-type]
        dx: Gradient = None
        sums: list[Gradient] = [None] * (len(t) - 3)
        for t0, t1 in chunks.chunk_bounds(steps, rows, last_first=not o.reverse):
            found = self._backward_of_chunk(
                cell, chunks.take_chunk(t, y, c_all, grads, t0, t1, reverse=o.reverse), o, wide
            )
            grads = LayerOutputs(grads.y, found[1], found[2], grads.c_all)  # type: ignore[arg-type]
            sums = [_sum(v, share, wide) for v, share in zip(sums, found[3:], strict=True)]
            dx = write_time_slice(dx, found[0] if needs[0] else None, t0, steps)
            found.clear()  # nothing of a chunk is held while the next one runs
        every = zip((dx, grads.h_n, grads.c_n, *sums), t, needs, strict=True)
        return [g.to(v.dtype) if need and g is not None and v is not None else None for g, v, need in every]

    def _backward_of_chunk(self, cell: Cell, chunk: chunks.Chunk, o: LayerOptions, wide: torch.dtype) -> list[Gradient]:
        t, gates = chunk.with_state_dtype(wide), None
        if cell.saved:
            gates = self.scan_forward(cell, project(cell, t), t.h_0, t.c_0, t, t0=0, reverse=o.reverse, save=True)[4]
        scan = self.scan_backward(cell, chunk.grads, chunk.y, chunk.c_all, gates, t, o)
        return weight_gradients(cell, chunk.route_reset_grad(scan), chunk.t, chunk.y, chunk.c_all, gates, o)


def write_time_slice(full: Gradient, chunk: Gradient, t0: int, steps: int) -> Gradient:
    """`full` [T, ...] with the steps of `chunk` from t0 on; allocated for the first one; the chunk where it is all."""
    if chunk is None or chunk.shape[0] == steps:
        return chunk
    if full is None:
        full = chunk.new_empty((steps, *chunk.shape[1:]))
    full[t0 : t0 + chunk.shape[0]] = chunk
    return full


def _sum(so_far: Gradient, share: Gradient, dtype: torch.dtype) -> Gradient:
    """`so_far` is ours, and written over."""
    if so_far is None or share is None:
        return None if share is None else share.to(dtype)
    return so_far.add_(share)
