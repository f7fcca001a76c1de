"""GRU against LSTM on the characters of Python's standard library: parameters, time of a training step and held-out
loss, at equal width and at equal parameters.

A GRU has three blocks where an LSTM has four; at equal parameters it is wider by about 15 %. The three models of a seed
are trained in turns on the same batches, so that what else the machine does slows all alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import GRU, LSTM
from ..demo import text
from ..diagnostics import initialise
from ..diagnostics.pictures import figure
from ..sequence import LatentAutoregressiveModel
from .characters import bits_of, learn
from .common import STYLES, Finding, Show, mean

EMBEDDED = 32
NAMES = ("LSTM", "GRU, equal width", "GRU, equal parameters")


class Size(NamedTuple):
    """Width of the LSTM, training steps of each model, and how many seeds."""

    hidden: int
    updates: int
    seeds: int


QUICK, FULL = Size(64, 500, 2), Size(192, 1500, 2)


def width_of_gru(lstm: int) -> int:
    """The GRU's width whose layer has as many parameters as an LSTM's of this width, as near as it gets."""

    def parameters(gates: int, hidden: int) -> int:
        return gates * hidden * (EMBEDDED + hidden + 2)

    return min(range(lstm, 2 * lstm), key=lambda h: abs(parameters(3, h) - parameters(4, lstm)))


def run(size: Size, seed: int, show: Show) -> Finding:
    """Train the three models, for each seed."""
    corpus = text.load(None)
    rows: list[dict[str, Any]] = []
    widths = (size.hidden, size.hidden, width_of_gru(size.hidden))
    for k in range(size.seeds):
        torch.manual_seed(seed + k)
        layers: list[Any] = [initialise.forget_bias_(LSTM(EMBEDDED, widths[0], batch_first=True))]
        layers += [GRU(EMBEDDED, width, batch_first=True) for width in widths[1:]]
        models = [LatentAutoregressiveModel(layer, vocabulary=len(corpus.letters)) for layer in layers]

        def shown(n: int, loss: float, k: int = k) -> None:
            show(k * size.updates + n, size.seeds * size.updates, f"seed {seed + k}, {NAMES[0]}'s loss {loss:.3f}")

        learned = learn(models, corpus.train, size.updates, seed + k, shown)
        for name, model, width, how in zip(NAMES, models, widths, learned, strict=True):
            sizes = [sum(p.numel() for p in module.parameters()) for module in (model.rnn, model)]
            row = {"model": name, "seed": seed + k, "width": width, "updates": size.updates, "ms_per_step": how.ms}
            row |= {"layer_parameters": sizes[0], "model_parameters": sizes[1], "training_nats": how.loss}
            rows.append({**row, "threads": torch.get_num_threads(), "held_out_bits": bits_of(model, corpus.held_out)})
    return Finding(rows, sentences(rows), lambda: draw(rows))


def over_seeds(rows: list[dict[str, Any]], model: str, what: str) -> float:
    return mean(row[what] for row in rows if row["model"] == model)


def sentences(rows: list[dict[str, Any]]) -> list[str]:
    """One for each way to be equal, one on what seeds alone do."""

    def against(model: str) -> str:
        ms, size = (
            over_seeds(rows, model, what) / over_seeds(rows, "LSTM", what)
            for what in ("ms_per_step", "layer_parameters")
        )
        bits = over_seeds(rows, model, "held_out_bits")
        gap = bits - over_seeds(rows, "LSTM", "held_out_bits")
        return (
            f"the GRU has {size:.0%} of the LSTM's parameters, takes {ms:.0%} of its time for a training step and "
            f"spends {bits:.3f} bits on a held-out character, {abs(gap):.3f} {'more' if gap > 0 else 'fewer'} than the "
            "LSTM"
        )

    seeds = sorted({row["seed"] for row in rows})
    bits = {name: [row["held_out_bits"] for row in rows if row["model"] == name] for name in NAMES}
    spread = max(max(some) - min(some) for some in bits.values())
    wins = [sum(a < b for a, b in zip(bits[name], bits["LSTM"], strict=True)) for name in NAMES[1:]]
    luck = (
        f"a change of seed alone moved a model by up to {spread:.3f} bits" if len(seeds) > 1 else "one seed is one draw"
    )
    return [
        f"At equal width ({rows[0]['width']}) {against(NAMES[1])}.",
        f"At equal parameters (width {rows[2]['width']}) {against(NAMES[2])}.",
        f"After {rows[0]['updates']} training steps the GRU was ahead of the LSTM in {wins[0]} of {len(seeds)} seeds "
        f"at equal width and in {wins[1]} at equal parameters, and {luck}.",
    ]


def draw(rows: list[dict[str, Any]]) -> Any:
    """Three panels: parameters and time as bars, the loss as a mark for each seed."""
    fig, axes = figure(1, 3, width=3.6, height=3.4)
    panels = (
        ("layer_parameters", "parameters of the layer, thousands", 1e-3),
        ("ms_per_step", "training step, ms", 1.0),
    )
    for axis, (what, words, unit) in zip(axes, panels, strict=False):
        values = [unit * over_seeds(rows, name, what) for name in NAMES]
        bars = axis.bar(range(3), values, color=["0.3", "0.6", "0.85"], edgecolor="black")
        axis.bar_label(bars, [f"{v:.3g}" for v in values])
        axis.set(ylabel=words)
    for k, seed in enumerate(sorted({row["seed"] for row in rows})):
        bits = [row["held_out_bits"] for row in rows if row["seed"] == seed]
        axes[2].plot(range(3), bits, label=f"seed {seed}", **{**STYLES[k % len(STYLES)], "linestyle": ""})
    axes[2].set(ylabel="held-out loss, bits a character", xlim=(-0.5, 2.5))
    axes[2].legend()
    for axis in axes:
        axis.set_xticks(range(3), [name.replace(", ", "\n") for name in NAMES], fontsize=8)
    return fig
