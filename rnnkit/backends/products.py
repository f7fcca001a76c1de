"""The large products around a scan, written once for every kernel backend, and the base class that uses them.

Before the scan: gx = x W_ihᵀ with the biases. After the backward scan: one product for each weight gradient. What
lies beyond a row's length, or belongs to steps that no gradient reached, is masked by selection, never by
multiplication: 0 · NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import masks
from ..cells import CELLS, Cell
from ..reference import lstm
from ..reference.scan import ScanGradients
from .problem import Options, Outputs, Problem, Result, Tensors

Gradient = Tensor | None


def project(cell: Cell, t: Tensors) -> Tensor:
    """gx [T, B, G·H]: the input projection with every bias that the recurrence does not multiply."""
    bias = t.b_ih
    if t.b_ih is not None and t.b_hh is not None:
        if cell.reset_after:  # b_hn stays inside the reset gate's product
            inside = t.b_ih.shape[0] // 3 * 2
            bias = torch.cat([t.b_ih[:inside] + t.b_hh[:inside], t.b_ih[inside:]])
        else:
            bias = t.b_ih + t.b_hh
    return F.linear(t.x, t.w_ih, bias)


def bias_inside(cell: Cell, t: Tensors) -> Tensor | None:
    """b_hn [H], the bias that the reset gate of `gru` multiplies."""
    return t.b_hh[t.b_hh.shape[0] // 3 * 2 :] if cell.reset_after and t.b_hh is not None else None


def outer(gradient: Tensor, value: Tensor) -> Tensor:
    """Σ over time and rows of gradientᵀ value: [T, B, M], [T, B, N] -> [M, N]."""
    count = gradient.shape[0] * gradient.shape[1]  # flatten has no rule for autograd.grad(is_grads_batched=True)
    return gradient.reshape(count, gradient.shape[2]).T @ value.reshape(count, value.shape[2])


def weight_gradients(
    cell: Cell, g: ScanGradients, t: Tensors, y: Tensor, c_all: Tensor | None, gates: Tensor | None, o: Options
) -> list[Gradient]:
    """Gradients of every tensor of `Tensors`, in its order, from those of the scan. All in the scan's type."""
    x = t.x
    alive = masks.live(t.lengths, x.shape[0], x.device)
    at = masks.cut(t.reset, alive, o.reverse)
    h = masks.previous(y, t.h_0, t.lengths, at, t.h_r, o.reverse)
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
        g.dh_r if t.h_r is not None else None,
        g.dc_r if t.c_r is not None else None,
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
    """Whether what it saves for a backward has the layer's dtype, where others save float32 or wider."""

    def available(self) -> str | None:
        """Why it cannot run anything on this machine; None where it can."""
        return None

    def unsupported(self, problem: Problem) -> list[str]:
        """Why it cannot run this problem; empty where it can."""
        raise NotImplementedError(self.name)

    def reluctant(self, problem: Problem) -> str | None:
        """Why `auto` leaves to others what this backend could run; None where it does not."""
        return None

    def detail(self, problem: Problem) -> str | None:
        """How it runs this problem, for `explain`; None where there is one way only."""
        return None

    def forward(self, cell: str, t: Tensors, o: Options, *, train: bool, graph: bool = False) -> Result:
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
        self, cell: str, t: Tensors, o: Options, y: Tensor, result: Result | None, grads: Outputs, needs: list[bool]
    ) -> list[Gradient]:
        """Gradients of `t`, in its order (None where not needed), given those of the outputs (None: zeros)."""
        raise NotImplementedError(self.name)


class KernelBackend(Backend):
    """A backend that brings a forward and a backward scan; the products are those of this file."""

    def scan_forward(
        self, cell: Cell, gx: Tensor, h: Tensor, c: Tensor | None, t: Tensors, *, t0: int, reverse: bool, save: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """States of the steps [t0, t0 + n): y, h_n, c_n, c_all, gates; the last two only with `save`."""
        raise NotImplementedError(self.name)

    def scan_backward(
        self, cell: Cell, grads: Outputs, y: Tensor, c_all: Tensor | None, gates: Tensor | None, t: Tensors, o: Options
    ) -> ScanGradients:
        """Gradients of the scan over all T."""
        raise NotImplementedError(self.name)

    def forward(self, cell: str, t: Tensors, o: Options, *, train: bool, graph: bool = False) -> Result:
        kind = CELLS[cell]
        save = train and not o.recompute
        y, h_n, c_n, c_all, gates = self.scan_forward(
            kind, project(kind, t), t.h_0, t.c_0, t, t0=0, reverse=o.reverse, save=save or (o.all_states and kind.has_c)
        )
        saved = tuple(v for v in (gates, c_all) if v is not None) if save else ()
        return Result(Outputs(y, h_n, c_n, c_all if o.all_states else None), saved)

    def backward(
        self, cell: str, t: Tensors, o: Options, y: Tensor, result: Result | None, grads: Outputs, needs: list[bool]
    ) -> list[Gradient]:
        kind = CELLS[cell]
        saved = () if result is None else result.saved
        if kind.saved and not saved:
            saved = self.forward(cell, t, o._replace(recompute=False), train=True).saved
        gates = saved[0] if kind.saved else None
        c_all = saved[1] if kind.has_c else None
        scan = self.scan_backward(kind, grads, y, c_all, gates, t, o)
        every = weight_gradients(kind, scan, t, y, c_all, gates, o)
        return [g if need else None for g, need in zip(every, needs, strict=True)]
