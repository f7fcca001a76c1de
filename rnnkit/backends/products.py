"""The large products around a scan, written once for every kernel backend, and the base class that uses them.

Before the scan: gx = x W_ihᵀ with the biases. After the backward scan: one product for each weight gradient. What
lies beyond a row's length, or belongs to steps that no gradient reached, is masked by selection, never by
multiplication: 0 · NaN is NaN. With `recompute` all of this goes range by range of time (ranges.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import masks
from ..cells import CELLS, Cell, compute_dtype
from ..reference import lstm
from ..reference.scan import ScanGradients
from . import ranges
from .spec import LayerInputs, LayerOptions, LayerOutputs, LayerSpec, Result

Gradient = Tensor | None


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


def outer(gradient: Tensor, value: Tensor) -> Tensor:
    """Σ over time and rows of gradientᵀ value: [T, B, M], [T, B, N] -> [M, N]."""
    count = gradient.shape[0] * gradient.shape[1]  # flatten has no rule for autograd.grad(is_grads_batched=True)
    return gradient.reshape(count, gradient.shape[2]).T @ value.reshape(count, value.shape[2])


def weight_gradients(
    cell: Cell, g: ScanGradients, t: LayerInputs, y: Tensor, c_all: Tensor | None, gates: Tensor | None, o: LayerOptions
) -> list[Gradient]:
    """Gradients of every tensor of `LayerInputs`, in its order, from those of the scan. All in the scan's type."""
    x = t.x
    alive = masks.live(t.lengths, x.shape[0], x.device)
    at = masks.cut(t.reset, alive, o.reverse)
    h = masks.previous(y, t.h_0, t.lengths, at, t.h_reset, o.reverse)
    dead = None
    if alive is not None or at is not None:  # no gradient came here, so nothing that stands here may pass on NaN
        dead = (g.dgx == 0).all(-1, keepdim=True)
        x, h = x.masked_fill(dead, 0), h.masked_fill(dead, 0)

    if cell.reset_before and gates is not None:
        rz = g.dgh.shape[-1] // 3 * 2
        r = gates.chunk(3, -1)[0]
        r = r if dead is None else r.masked_fill(dead, 0)
        dw_hh = torch.cat([outer(g.dgh[..., :rz], h), outer(g.dgh[..., rz:], r * h)])
    else:
        dw_hh = outer(g.dgh, h)
    dw_hr = None
    if t.w_hr is not None and g.dp is not None and gates is not None and c_all is not None:
        m = lstm.before_projection(gates, c_all)
        if dead is not None:
            m = m.masked_fill((g.dp == 0).all(-1, keepdim=True), 0)
        dw_hr = outer(g.dp, m)
    biased = t.b_ih is not None
    return [
        g.dgx @ t.w_ih,
        g.dh_0,
        g.dc_0,
        outer(g.dgx, x),
        dw_hh,
        g.dgx.sum((0, 1)) if biased else None,
        g.dgh.sum((0, 1)) if biased else None,
        dw_hr,
        None,
        None,
        g.dh_reset if t.h_reset is not None else None,
        g.dc_reset if t.c_reset is not None else None,
    ]


class Backend:
    """One way to run a layer. Knows plain tensors; nothing of autograd, stacks, packing or layouts."""

    name = ""
    singles = False
    """Whether it has `single` and `single_backward`."""
    takes_none_states = False
    """Whether its operators check all that they are given: it then gets plain tensors unchecked, h_0 and c_0 None for
    zeros, and raises RuntimeError for what it does not take."""
    saves_narrow = False
    """Whether what it saves for a backward has the layer's dtype, where others save float32 or wider. With `recompute`
    it has in all."""

    overlaps = False
    """Whether both directions of a layer may run at once, on two streams of a GPU: no kernel waits for blocks that may
    have no multiprocessor yet."""

    def available(self) -> str | None:
        """Why it cannot run anything on this machine; None where it can."""
        return None

    def unsupported(self, spec: LayerSpec) -> list[str]:
        """Why it cannot run this layer; empty where it can."""
        raise NotImplementedError(self.name)

    def reluctant(self, spec: LayerSpec) -> str | None:
        """Why `auto` leaves to others what this backend could run; None where it does not."""
        return None

    def detail(self, spec: LayerSpec) -> str | None:
        """How it runs this layer, for `explain`; None where there is one way only."""
        return None

    def forward(self, cell: str, t: LayerInputs, o: LayerOptions, *, train: bool, graph: bool = False) -> Result:
        """Run the layer. `train`: keep what `backward` needs; `graph`: an autograd graph may be kept for it."""
        raise NotImplementedError(self.name)

    def single(
        self,
        cell: str,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        batch_first: bool,
        save: bool,
    ) -> list[Tensor] | None:
        """A module's only layer in the module's layouts, where `singles`: x and y [T, B, ·], or [B, T, ·] where
        batch_first, states [1, B, ·] or None for zeros -> y, h_n, c_n of an LSTM, and what is saved.

        None for tensors that are not plain. Raises RuntimeError for what it does not take.
        """
        raise NotImplementedError(self.name)

    def single_backward(
        self,
        cell: str,
        inputs: Sequence[Tensor | None],
        batch_first: bool,
        y: Tensor,
        saved: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        needs: tuple[bool, ...],
    ) -> list[Gradient] | None:
        """Gradients of the seven `inputs` of `single`, given those of y, h_n and c_n; None as there."""
        raise NotImplementedError(self.name)

    def step(
        self,
        cell: str,
        x: Tensor,
        h: Tensor | None,
        c: Tensor | None,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
    ) -> tuple[Tensor, Tensor | None] | None:
        """One step of a cell without gradients: x [B, I], h and c [B, H] or None for zeros -> h and, for an LSTM, c.

        None where the backend has no shorter way than `forward`.
        """
        return None

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
        """Gradients of `t`, in its order (None where not needed), given those of the outputs (None: zeros)."""
        raise NotImplementedError(self.name)


class KernelBackend(Backend):
    """A backend that brings a forward and a backward scan; the products are those of this file."""

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
        """Gradients of the scan over all of `t`, which may be a range of a longer layer: those of its h_0 and c_0 have
        their dtypes, and so have those of h_reset and c_reset."""
        raise NotImplementedError(self.name)

    def forward(self, cell: str, t: LayerInputs, o: LayerOptions, *, train: bool, graph: bool = False) -> Result:
        kind = CELLS[cell]
        if train and o.recompute:
            return self._forward_in_ranges(kind, t, o)
        save = train or (o.all_states and kind.has_c)
        y, h_n, c_n, c_all, gates = self.scan_forward(
            kind, project(kind, t), t.h_0, t.c_0, t, t0=0, reverse=o.reverse, save=save
        )
        saved = tuple(v for v in (gates, c_all) if v is not None) if train else ()
        return Result(LayerOutputs(y, h_n, c_n, c_all if o.all_states else None), saved)

    def _forward_in_ranges(self, cell: Cell, t: LayerInputs, o: LayerOptions) -> Result:
        """gx and gates for a range at a time; what is kept is c of an LSTM. The state passes in the compute type."""
        steps, rows = t.x.shape[:2]
        wide = compute_dtype(t.x.dtype)
        h, c = t.h_0.to(wide), None if t.c_0 is None else t.c_0.to(wide)
        y = c_all = None
        for t0, t1 in ranges.spans(steps, rows, last_first=o.reverse):
            here = t._replace(x=t.x[t0:t1])
            y_range, h, c, c_range = self.scan_forward(
                cell, project(cell, here), h, c, t, t0=t0, reverse=o.reverse, save=cell.has_c
            )[:4]
            y, c_all = _place(y, y_range, t0, steps), _place(c_all, c_range, t0, steps)
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
        saved = () if result is None else result.saved
        if not saved and (kind.has_c if o.recompute else kind.saved):
            saved = self.forward(cell, t, o, train=True).saved
        if o.recompute:
            return self._backward_in_ranges(kind, t, o, y, saved[0] if kind.has_c else None, grads, needs)
        gates = saved[0] if kind.saved else None
        c_all = saved[1] if kind.has_c else None
        scan = self.scan_backward(kind, grads, y, c_all, gates, t, o)
        every = weight_gradients(kind, scan, t, y, c_all, gates, o)
        return [g if need else None for g, need in zip(every, needs, strict=True)]

    def _backward_in_ranges(
        self,
        cell: Cell,
        t: LayerInputs,
        o: LayerOptions,
        y: Tensor,
        c_all: Tensor | None,
        grads: LayerOutputs,
        needs: list[bool],
    ) -> list[Gradient]:
        """Range by range, the last first: the gates again, the scan back, a share of every weight's gradient. Those of
        the state pass from range to range in the compute type, and shares are summed in it."""
        wide = compute_dtype(t.x.dtype)
        steps, rows = t.x.shape[:2]
        dh, dc = (None if v is None else v.to(wide) for v in (grads.h_n, grads.c_n))
        grads = LayerOutputs(grads.y, dh, dc, grads.c_all)  # type: ignore[arg-type]
        dx: Gradient = None
        sums: list[Gradient] = [None] * (len(t) - 3)
        for t0, t1 in ranges.spans(steps, rows, last_first=not o.reverse):
            found = self._backward_of_range(cell, ranges.part(t, y, c_all, grads, t0, t1, reverse=o.reverse), o, wide)
            grads = LayerOutputs(grads.y, found[1], found[2], grads.c_all)  # type: ignore[arg-type]
            sums = [_sum(v, share, wide) for v, share in zip(sums, found[3:], strict=True)]
            dx = _place(dx, found[0] if needs[0] else None, t0, steps)
            found.clear()  # nothing of a range is held while the next one runs
        every = zip((dx, grads.h_n, grads.c_n, *sums), t, needs, strict=True)
        return [g.to(v.dtype) if need and g is not None and v is not None else None for g, v, need in every]

    def _backward_of_range(self, cell: Cell, part: ranges.Range, o: LayerOptions, wide: torch.dtype) -> list[Gradient]:
        t, gates = part.carrying(wide), None
        if cell.saved:
            gates = self.scan_forward(cell, project(cell, t), t.h_0, t.c_0, t, t0=0, reverse=o.reverse, save=True)[4]
        scan = self.scan_backward(cell, part.grads, part.y, part.c_all, gates, t, o)
        return weight_gradients(cell, part.sent(scan), part.t, part.y, part.c_all, gates, o)


def _place(whole: Gradient, part: Gradient, t0: int, steps: int) -> Gradient:
    """`whole` [T, ...] with the steps of `part` from t0 on; made for the first part, or that part where it is all."""
    if part is None or part.shape[0] == steps:
        return part
    if whole is None:
        whole = part.new_empty((steps, *part.shape[1:]))
    whole[t0 : t0 + part.shape[0]] = part
    return whole


def _sum(so_far: Gradient, share: Gradient, dtype: torch.dtype) -> Gradient:
    """`so_far` is ours, and written over."""
    if so_far is None or share is None:
        return None if share is None else share.to(dtype)
    return so_far.add_(share)
