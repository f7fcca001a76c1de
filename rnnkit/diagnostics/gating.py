"""What the gates of a layer do: every gate and state at every step, by name, as tensors and as heat maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .pictures import figure, heat_map
from .trace import recorded

FULL = {
    "i": "input gate i",
    "f": "forget gate f",
    "g": "candidate g",
    "o": "output gate o",
    "r": "reset gate r",
    "z": "update gate z",
    "n": "candidate n",
    "c": "cell state c",
    "h": "state h",
}
SIGMOID = "iforz"


class Gates(dict[str, dict[str, Tensor]]):
    """What `gates` gives: by layer, then by name, tensors [T, B, H]; `gates` says which."""

    def plot(
        self, layer: str | None = None, row: int = 0, names: str | None = None, labels: list[str] | None = None
    ) -> Any:
        """A matplotlib figure: a heat map of units over time for each gate of one layer and row.

        Args:
            layer: its name; the first where None.
            row: of the batch.
            names: which gates, as letters; all where None.
            labels: what stands at each step, for instance the characters of a text; T of them.
        """
        layer = next(iter(self)) if layer is None else layer
        if layer not in self:
            raise ValueError(f"there is no layer {layer!r}; there are {', '.join(self)}")
        every = self[layer]
        unknown = [name for name in names or "" if name not in every]
        if unknown:
            raise ValueError(f"{layer} has no {', '.join(unknown)}; it has {', '.join(every)}")
        steps, rows = every["h"].shape[:2]
        if not 0 <= row < rows:
            raise ValueError(f"row must lie in 0 to {rows - 1}, the rows of the batch, got {row}")
        if labels is not None and len(labels) != steps:
            raise ValueError(f"labels must be {steps}, one for each step, got {len(labels)}")
        chosen = list(names or every)
        fig, axes = figure(len(chosen), 1, height=1.1)
        for axis, name in zip(axes, chosen, strict=True):
            v = every[name][:, row]
            most = 1.0 if name in SIGMOID else float(v.abs().max()) or 1.0
            heat_map(fig, axis, v, FULL[name], 0.0 if name in SIGMOID else -most, most)
        if labels is not None:
            axes[-1].set_xticks(range(len(labels)), labels)
        axes[-1].set_xlabel("step t")
        return fig


def gates(module: nn.Module, input: Any, *args: Any, **kwargs: Any) -> Gates:
    """Run `module(input, *args, **kwargs)` without gradients and give every gate and state at every step.

    Args:
        module: rnnkit's or torch.nn's recurrent layer or cell, or any module with some inside.

    Returns:
        By layer (`encoder.l0`, `encoder.l0_reverse`; a cell by its path), then by name, tensors [T, B, H] in the order
        of time, gates after their activation. Beyond a row's length they mean nothing.
        LSTM: `i` input, `f` forget, `g` candidate, `o` output gate, `c` cell state, `h` (with a projection [T, B, P]).
        GRU: `r` reset, `z` update gate (its weight of the past; 1 - z weighs the candidate), `n` candidate, `h`.
        RNN: `h`.

    Raises:
        ValueError: no recurrent layer or cell ran.
    """
    with torch.no_grad(), recorded(module) as traces:
        module(input, *args, **kwargs)
    if not traces:
        raise ValueError(f"no recurrent layer or cell ran in this {type(module).__name__}")
    found = Gates()
    for name, trace in traces.items():
        every = dict(trace.gates)
        if trace.c:
            every["c"] = trace.c
        every["h"] = trace.h
        found[name] = {key: torch.stack(steps) for key, steps in every.items() if steps}
    return found
