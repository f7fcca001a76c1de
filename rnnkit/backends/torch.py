"""Backend `torch`: torch's own layer operators (cuDNN, oneDNN, or its plain loop) for what torch.nn can do.

One layer, one direction at a time, called exactly as torch.nn calls them, so `torch.backends.mkldnn.flags` and
`torch.backends.cudnn.flags` are obeyed. First derivatives are torch's own; beyond them the reference's formulas
serve. Where torch's operator is a chain of small ones (GRU and RNN on a CPU) its autograd graph is kept, and freed
when autograd frees the layer's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Backend, Gradient
from .spec import LayerInputs, LayerOptions, LayerOutputs, LayerSpec, Result


def _call(cell: str, t: LayerInputs, reverse: bool, train: bool) -> LayerOutputs:
    run = getattr(torch._VF, cell)  # of the same names
    weights = [w for w in (t.w_ih, t.w_hh, t.b_ih, t.b_hh, t.w_hr) if w is not None]
    h_0 = t.h_0[None]
    hx = h_0 if t.c_0 is None else (h_0, t.c_0[None])
    x = t.x.flip(0) if reverse else t.x
    y, *last = run(x, hx, weights, t.b_ih is not None, 1, 0.0, train, False, False)
    return LayerOutputs(y.flip(0) if reverse else y, last[0][0], last[1][0] if len(last) > 1 else None, None)


class Torch(Backend):
    name = "torch"

    def unsupported(self, spec: LayerSpec) -> list[str]:
        reasons = [f"torch.nn's layers do not know {extra}" for extra in spec.extras]
        if spec.steps == 0:
            reasons.append("torch's layers need at least one step, got T=0")
        if spec.hidden_size == 0:
            reasons.append("torch's layers need at least one unit, got H=0")
        return reasons

    def forward(self, cell: str, t: LayerInputs, o: LayerOptions, *, train: bool, graph: bool = False) -> Result:
        if not (train and graph):
            return Result(_owned(_call(cell, t, o.reverse, train)))
        inner = LayerInputs(*(v if v is None else v.detach().requires_grad_(v.requires_grad) for v in t))  # type: ignore[arg-type]
        with torch.enable_grad():
            outputs = _call(cell, inner, o.reverse, train)
        outer = LayerOutputs(*(None if v is None else v.detach() for v in outputs))  # type: ignore[arg-type]
        return Result(outer, graph=(inner, outputs))

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
        if result is not None and result.graph is not None:
            inner, outputs = result.graph
            keep = torch._C._autograd._get_current_graph_task_keep_graph()
        else:
            wanted = zip(t, needs, strict=True)
            inner = LayerInputs(*(v if v is None else v.detach().requires_grad_(need) for v, need in wanted))  # type: ignore[arg-type]
            with torch.enable_grad():
                outputs = _call(cell, inner, o.reverse, True)
            keep = False
        reached = [(v, g) for v, g in zip(outputs, grads, strict=True) if g is not None and v.requires_grad]
        found = iter(
            torch.autograd.grad(
                [v for v, _ in reached],
                [v for v, need in zip(inner, needs, strict=True) if need],
                [g for _, g in reached],
                retain_graph=keep,
                allow_unused=True,
            )
        )
        every = [next(found) if need else None for need in needs]
        return [_zeros(v, need) if g is None else g for g, v, need in zip(every, t, needs, strict=True)]


def _owned(outputs: LayerOutputs) -> LayerOutputs:
    """The same in memory of their own: an operator's results may not be views of one another."""
    return LayerOutputs(*(None if v is None else v.contiguous() if v._base is None else v.clone() for v in outputs))  # type: ignore[arg-type]


def _zeros(like: Tensor | None, need: bool) -> Gradient:
    return torch.zeros_like(like) if need and like is not None else None
