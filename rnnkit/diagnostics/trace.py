"""What happens inside recurrent layers, step by step: every h, c and gate as tensors of torch's graph.

While `recorded` lasts, layers and cells are computed by the reference's formulas, one step after the other, whatever
backend they name: slowly, with the same numbers. torch.nn's layers are made ours meanwhile (`rnnkit.convert`) and
torch's again at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import ops
from ..backends import LayerInputs, LayerOptions, LayerOutputs
from ..backends.reference import Reference
from ..cells import CELLS, Cell
from ..convert import convert, revert
from ..nn.base import Recurrent
from ..reference import State, Step, Weights, scan

GATE_NAMES = {"lstm": "ifgo", "gru": "rzn", "gru_reset_before": "rzn"}
"""The gates of a cell, in the order of their blocks."""


@dataclass
class Trace:
    """One layer in one direction, or one cell, as it ran: lists in the order of time, [B, ·] each."""

    cell: str
    reverse: bool
    lengths: Tensor | None
    h: list[Tensor] = field(default_factory=list)
    c: list[Tensor] = field(default_factory=list)
    """Empty but for an LSTM."""
    gates: dict[str, list[Tensor]] = field(default_factory=dict)
    """By name, after their activation."""

    def add(self, steps: list[Step]) -> None:
        """Steps that follow."""
        for new in steps:
            self.h.append(new.h)
            if new.c is not None:
                self.c.append(new.c)
            names = GATE_NAMES.get(self.cell, "")
            if new.gates is not None:
                blocks = new.gates.chunk(CELLS[self.cell].saved, -1)
                for name, block in zip(names, blocks, strict=False):  # a GRU also saves W_hn h + b_hn
                    self.gates.setdefault(name, []).append(block)


class _StepRecorder(Reference):
    """The reference, which keeps what each step gave, in the order in which they were made."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def formula(self, cell: Cell) -> scan.StepFunction:
        self.steps = []
        formula = super().formula(cell)

        def recording(gx: Tensor, s: State, w: Weights) -> Step:
            self.steps.append(formula(gx, s, w))
            return self.steps[-1]

        return recording


@contextlib.contextmanager
def recorded(module: nn.Module) -> Iterator[dict[str, Trace]]:
    """While it lasts, what the recurrent layers and cells inside `module` do is added to the result, by name.

    A layer is called by its path in `module` and torch's name of the parameters: `encoder.l0`, `encoder.l0_reverse`;
    of `module` itself `l0`. A layer that runs again is `l0 (2)`; a cell's calls follow one another in one trace.
    """
    for name, m in module.named_modules():
        if isinstance(m, Recurrent) and m.heads != 1:
            raise NotImplementedError(
                f"{name or '(the module)'}: what a layer does is recorded of one head alone, and this one has "
                f"heads={m.heads}"
            )
    kinds = (nn.RNNBase, nn.RNNCellBase)
    theirs = [m for m in module.modules() if isinstance(m, kinds) and not isinstance(m, Recurrent)]
    for m in theirs:
        convert(m)
    found: dict[str, Trace] = {}
    names: dict[nn.Module, str] = {m: name for name, m in module.named_modules() if isinstance(m, Recurrent)}
    now: list[Any] = [None, 0, 0]  # the module that runs, its layers so far, the time that it runs
    recorder = _StepRecorder()

    def enter(m: nn.Module, _: Any) -> None:
        prefix = _label(names[m], "l0")
        times = 1 if isinstance(m, nn.RNNCellBase) else 1 + sum(key.partition(" ")[0] == prefix for key in found)
        now[:] = [m, 0, times]

    def run(cell: str, t: LayerInputs, o: LayerOptions) -> LayerOutputs:
        m, count, times = now
        outputs = recorder.forward(cell, t, o._replace(recompute=False), train=False).outputs
        if m is None:  # a layer by rnnkit.functional has no name
            return outputs
        if isinstance(m, nn.RNNCellBase):
            key = names[m] or type(m).__name__
        else:
            directions = 2 if m.bidirectional else 1
            key = _label(names[m], f"l{count // directions}{'_reverse' if o.reverse else ''}")
            key += f" ({times})" if times > 1 else ""
            now[1] = count + 1
        steps = recorder.steps[::-1] if o.reverse else recorder.steps
        found.setdefault(key, Trace(cell, o.reverse, t.lengths)).add(steps)
        return outputs

    handles = [m.register_forward_pre_hook(enter) for m in names]
    try:
        with ops.override_layer(run):
            yield found
    finally:
        for handle in handles:
            handle.remove()
        for m in theirs:
            if isinstance(m, Recurrent):
                revert(m)


def _label(path: str, layer: str) -> str:
    return f"{path}.{layer}" if path else layer
