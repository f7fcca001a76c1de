"""GRU against LSTM on the characters of Python's standard library: parameters, time of a training step and held-out loss,
at equal width and at equal parameters.

A GRU has three blocks where an LSTM has four; at equal parameters it is wider by about 15 %.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import GRU, LSTM
from ..demo import text
from ..diagnostics import initialise
from ..diagnostics.pictures import figure
from ..sequence import LatentAutoregressiveModel
from .characters import bits_of, learn
from .common import Finding, Show

EMBEDDED = 32


def width_of_gru(lstm: int) -> int:
    """The GRU's width whose layer has as many parameters as an LSTM's of this width, as near as it gets."""

    def parameters(gates: int, hidden: int) -> int:
        return gates * hidden * (EMBEDDED + hidden + 2)

    return min(range(lstm, 2 * lstm), key=lambda h: abs(parameters(3, h) - parameters(4, lstm)))


def run(quick: bool, seed: int, show: Show) -> Finding:
    hidden, updates, seeds = (96, 350, 1) if quick else (256, 2500, 2)
    corpus = text.load(None)
    contenders = [("LSTM", hidden), ("GRU", hidden), ("GRU", width_of_gru(hidden))]
    names = ["LSTM", "GRU, equal width", "GRU, equal parameters"]
    rows: list[dict[str, Any]] = []
    for k in range(seeds):
        for (cell, width), name in zip(contenders, names, strict=True):
            torch.manual_seed(seed + k)
            layer: Any = (LSTM if cell == "LSTM" else GRU)(EMBEDDED, width, batch_first=True)
            if cell == "LSTM":
                initialise.forget_bias_(layer)
            model = LatentAutoregressiveModel(layer, vocabulary=len(corpus.letters))
            done = len(rows) * updates
            learned = learn(model, corpus.train, updates, seed + k,
                            lambda n, loss, done=done, name=name: show(  # type: ignore[misc]
                                done + n, seeds * len(names) * updates, f"{name}, loss {loss:.3f}"))  # fmt: skip
            bits = bits_of(model, corpus.held_out[:50_000])
            size = sum(p.numel() for p in layer.parameters())
            row = {"model": name, "cell": cell, "width": width, "layer_parameters": size}
            row |= {"model_parameters": sum(p.numel() for p in model.parameters()), "ms_per_step": learned.ms}
            rows.append({**row, "held_out_bits": bits, "updates": updates, "seed": seed + k})
    return Finding(rows, sentences(rows), lambda: draw(rows))


def mean(rows: list[dict[str, Any]], model: str, what: str) -> float:
    some = [row[what] for row in rows if row["model"] == model]
    return sum(some) / len(some)


def sentences(rows: list[dict[str, Any]]) -> list[str]:
    def of(model: str) -> tuple[float, float, float]:
        size, ms, bits = (mean(rows, model, what) for what in ("layer_parameters", "ms_per_step", "held_out_bits"))
        return size, ms, bits

    lstm, equal, same = of("LSTM"), of("GRU, equal width"), of("GRU, equal parameters")

    def better(other: tuple[float, float, float]) -> str:
        gap = other[2] - lstm[2]
        return f"{abs(gap):.3f} bits a character {'worse' if gap > 0 else 'better'} than the LSTM"

    return [
        f"At equal width the GRU's layer has {equal[0] / lstm[0]:.0%} of the LSTM's {lstm[0]:,.0f} parameters, takes "
        f"{equal[1] / lstm[1]:.0%} of its time a step and is {better(equal)} ({equal[2]:.3f} and {lstm[2]:.3f}).",
        f"At equal parameters it takes {same[1] / lstm[1]:.0%} of its time and is {better(same)} ({same[2]:.3f}).",
        f"Both after {rows[0]['updates']} steps of the same batches; the differences are those of this budget, not of the "
        "cells for ever.",
    ]


def draw(rows: list[dict[str, Any]]) -> Any:
    fig, axes = figure(1, 3, width=3.4)
    names = list(dict.fromkeys(row["model"] for row in rows))
    for axis, (what, words) in zip(axes, (("layer_parameters", "parameters of the layer"), ("ms_per_step", "ms a step"),
                                          ("held_out_bits", "held-out bits a character")), strict=True):  # fmt: skip
        values = [mean(rows, name, what) for name in names]
        bars = axis.bar(range(len(names)), values, color=["0.25", "0.55", "0.8"], edgecolor="black")
        axis.bar_label(bars, [f"{v:,.0f}" if v > 1000 else f"{v:.3g}" for v in values])
        axis.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=8)
        axis.set_ylabel(words)
    low = min(mean(rows, name, "held_out_bits") for name in names)
    axes[2].set_ylim(0.9 * low)
    return fig
