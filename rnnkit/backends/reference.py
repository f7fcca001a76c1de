"""Backend `reference`: the specification itself, in torch operators, on any device and in any floating dtype.

It also serves vmap, torch.func, forward mode and derivatives beyond the first, whatever backend is named. States
are carried and gates computed in float32 or wider.
"""

from __future__ import annotations

from torch import Tensor

from .. import masks
from ..cells import Cell, compute_dtype
from ..reference import STEPS, State, Weights, scan
from ..reference.scan import ScanGradients
from .base import Gradient
from .scan_backend import ScanBackend, bias_inside
from .spec import LayerInputs, LayerOptions, LayerOutputs, LayerSpec, Result


def _weights(cell: Cell, t: LayerInputs) -> Weights:
    return Weights(t.w_hh, bias_inside(cell, t), t.w_hr)


def _masking(t: LayerInputs) -> scan.LengthsAndResets:
    return scan.LengthsAndResets(t.lengths, t.reset, t.h_reset, t.c_reset)


class Reference(ScanBackend):
    name = "reference"

    def unsupported(self, spec: LayerSpec) -> list[str]:
        return []

    def formula(self, cell: Cell) -> scan.StepFunction:
        """One step; whoever wants to see them gives another function of the same numbers."""
        return STEPS[cell.name][0]

    def scan_forward(
        self, cell: Cell, gx: Tensor, h: Tensor, c: Tensor | None, t: LayerInputs, *, t0: int, reverse: bool, save: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        y, last, c_all, gates = scan.forward(
            self.formula(cell), gx, State(h, c), _weights(cell, t), _masking(t), t0=t0, reverse=reverse
        )
        if gates is None and cell.saved:  # no step was made
            gates = gx.new_zeros((0, gx.shape[1], cell.saved * t.w_hh.shape[0] // cell.gates))
        return y, last.h, last.c, c_all, gates

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
        return scan.backward(
            STEPS[cell.name][1],
            *grads,
            y,
            c_all,
            gates,
            State(t.h_0, t.c_0),
            _weights(cell, t),
            _masking(t),
            reverse=o.reverse,
        )

    def forward(self, cell: str, t: LayerInputs, o: LayerOptions, *, train: bool, graph: bool = False) -> Result:
        alive = masks.valid_mask(t.lengths, t.x.shape[0], t.x.device)
        if alive is not None:  # also for torch's own derivatives of this function
            t = t._replace(x=t.x.masked_fill(~alive, 0))
        wide = compute_dtype(t.x.dtype)
        outputs, saved, _ = super().forward(cell, t.cast(wide), o, train=train)
        if o.recompute:
            saved = tuple(v.to(t.x.dtype) for v in saved)
        return Result(LayerOutputs(*(None if v is None else v.to(t.x.dtype) for v in outputs)), saved)  # type: ignore[arg-type]

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
        wide = compute_dtype(t.x.dtype)
        upcast = LayerOutputs(*(None if g is None else g.to(wide) for g in grads))  # type: ignore[arg-type]
        if result is not None:
            result = result._replace(saved=tuple(v.to(wide) for v in result.saved))
        every = super().backward(cell, t.cast(wide), o, y.to(wide), result, upcast, needs)
        return [None if g is None else g.to(t.x.dtype) for g in every]
