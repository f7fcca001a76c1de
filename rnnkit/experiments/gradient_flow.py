"""Vanishing and exploding gradients: ‖∂L_T/∂h_t‖ against T - t for the vanilla RNN (tanh, relu), LSTM and GRU, with
recurrent weights of small, critical and large spectral radius.

In float64, since what vanishes soon leaves float32. The LSTM starts with a forget-gate bias of FORGET, as one would for
long memories: sigmoid(5) = 0.9933, of which 0.26 is left after 200 steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import GRU, LSTM, RNN
from ..diagnostics import GradientFlow, gradient_flow, initialise
from ..diagnostics.pictures import figure
from .common import DASHES, Finding, Show, listed

STEPS, ROWS, INPUTS = 200, 8, 16
SCALES = {"small": 0.5, "critical": 1.0, "large": 2.0}
FORGET = 5.0
CELLS = ("RNN tanh", "RNN relu", "LSTM", "GRU")


def layer(cell: str, radius: float, hidden: int) -> torch.nn.Module:
    """A layer in float64 whose blocks of W_hh have this spectral radius."""
    made: Any
    if cell.startswith("RNN"):
        made = RNN(INPUTS, hidden, nonlinearity=cell[4:], dtype=torch.float64)
    elif cell == "LSTM":
        made = initialise.forget_bias_(LSTM(INPUTS, hidden, dtype=torch.float64), FORGET)
    else:
        made = GRU(INPUTS, hidden, dtype=torch.float64)
    return initialise.spectral_radius_(made, radius)


def measure(cell: str, radius: float, hidden: int, seed: int) -> GradientFlow:
    """The gradient of the sum of h_T."""
    torch.manual_seed(seed)
    return gradient_flow(layer(cell, radius, hidden), torch.randn(STEPS, ROWS, INPUTS, dtype=torch.float64))


def orders(flow: GradientFlow) -> float:
    """By how many powers of ten the norm of h_1 differs from that of h_T; negative where it fell."""
    norm = flow.norms["l0"]
    return math.log10(max(float(norm[0]), 1e-300) / float(norm[-1]))


def run(quick: bool, seed: int, show: Show) -> Finding:
    hidden, seeds = (32, 1) if quick else (128, 3)
    found: dict[tuple[str, str], list[GradientFlow]] = {}
    rows = []
    for cell in CELLS:
        for name, radius in SCALES.items():
            flows = [measure(cell, radius, hidden, seed + k) for k in range(seeds)]
            found[cell, name] = flows
            show(len(found), len(CELLS) * len(SCALES), f"{cell}, radius {radius}")
            for k, flow in enumerate(flows):
                for t, norm in enumerate(flow.norms["l0"].tolist(), 1):
                    row = {"cell": cell, "scale": name, "spectral_radius": radius, "hidden": hidden, "seed": seed + k}
                    rows.append({**row, "t": t, "distance": STEPS - t, "norm": norm, "decay": flow.decay["l0"]})
    return Finding(rows, sentences(found), lambda: draw(found))


def sentences(found: dict[tuple[str, str], list[GradientFlow]]) -> list[str]:
    def rate(cell: str, scale: str) -> float:
        return sum(flow.decay["l0"] for flow in found[cell, scale]) / len(found[cell, scale])

    def lost(cell: str, scale: str) -> float:
        return -sum(map(orders, found[cell, scale])) / len(found[cell, scale])

    def moved(cell: str, scale: str) -> str:
        powers = lost(cell, scale)
        return f"{'falls' if powers > 0 else 'grows'} by {abs(powers):.1f} powers of ten over {STEPS - 1} steps"

    small, large = SCALES["small"], SCALES["large"]
    return [
        f"At spectral radius {small} the gradient of the tanh RNN {moved('RNN tanh', 'small')} (× "
        f"{rate('RNN tanh', 'small'):.3f} a step), that of the relu RNN {moved('RNN relu', 'small')}.",
        f"At spectral radius {large} the gradient of the relu RNN {moved('RNN relu', 'large')} (× "
        f"{rate('RNN relu', 'large'):.3f} a step), that of the tanh RNN {moved('RNN tanh', 'large')}.",
        f"The LSTM with forget bias {FORGET:g} stays within "
        f"{max(abs(lost('LSTM', scale)) for scale in SCALES):.1f} powers of ten at "
        f"{listed([f'radius {radius}' for radius in SCALES.values()])}; the GRU, which starts with z near one half, "
        f"{moved('GRU', 'critical')} at radius {SCALES['critical']}.",
    ]


def draw(found: dict[tuple[str, str], list[GradientFlow]]) -> Any:
    fig, axes = figure(1, len(SCALES), width=4.2)
    for axis, (name, radius) in zip(axes, SCALES.items(), strict=True):
        for cell, dash in zip(CELLS, DASHES, strict=False):
            norm = torch.stack([flow.norms["l0"] for flow in found[cell, name]]).clamp_min(1e-300).log10().mean(0)
            axis.plot(range(STEPS - 1, -1, -1), norm, linestyle=dash, color="black", label=cell)
        axis.set(title=f"spectral radius {radius} ({name})", xlabel="distance T − t, steps", ylim=(-62, 32))
    axes[0].set_ylabel("log₁₀ ‖∂L_T/∂h_t‖")
    axes[0].legend()
    return fig
