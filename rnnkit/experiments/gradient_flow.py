"""Vanishing and exploding gradients: ‖∂L_T/∂h_t‖ against T − t for the vanilla RNN (tanh, relu), LSTM and GRU, with
recurrent weights of small, critical and large spectral radius.

In float64, since what vanishes soon leaves float32. The LSTM starts with a forget-gate bias of FORGET, as one would for
long memories: sigmoid(5) = 0.9933, of which 0.26 is left after 200 steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import GRU, LSTM, RNN
from ..diagnostics import gradient_flow, initialise
from ..diagnostics.pictures import figure
from .common import STYLES, Finding, Show, listed, mean

STEPS, ROWS, INPUTS = 200, 8, 16
SCALES = {"small": 0.5, "critical": 1.0, "large": 2.0}
FORGET = 5.0
CELLS = ("RNN tanh", "RNN relu", "LSTM", "GRU")
BAND = 2.0  # powers of ten, within which a gradient counts as kept
STRAIGHT = 0.98  # R² of the line through the logarithms, from which on a gradient moves exponentially


class Size(NamedTuple):
    """Width of the layers, and how many seeds."""

    hidden: int
    seeds: int


QUICK, FULL = Size(32, 3), Size(128, 5)


class Flow(NamedTuple):
    """How one gradient fared."""

    powers: Tensor
    """[T]: log₁₀ of its norm at h_t over that at h_T, t from 1 to T."""

    def moved(self) -> float:
        """Powers of ten from h_T to h_1: below 0 it fell."""
        return float(self.powers[0])

    def strayed(self) -> float:
        """Powers of ten, the most in either direction at any step."""
        return float(self.powers.abs().max())

    def rate(self) -> float:
        """The factor of each step, on the way from h_T to h_1."""
        return 10 ** (self.moved() / (len(self.powers) - 1))

    def straight(self) -> float:
        """R² of the straight line (least squares) through `powers`: 1 where it moves exponentially."""
        steps = torch.arange(len(self.powers), dtype=self.powers.dtype)
        return float(torch.corrcoef(torch.stack([steps, self.powers]))[0, 1] ** 2)


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


def measure(cell: str, radius: float, hidden: int, seed: int) -> Flow:
    """The gradient of the sum of h_T, on random inputs."""
    torch.manual_seed(seed)
    found = gradient_flow(layer(cell, radius, hidden), torch.randn(STEPS, ROWS, INPUTS, dtype=torch.float64))
    norm = found.norms["l0"].clamp_min(torch.finfo(torch.float64).tiny)
    return Flow((norm / norm[-1]).log10())


Found = dict[tuple[str, str], list[Flow]]
"""By cell and scale, one for each seed."""


def run(size: Size, seed: int, show: Show) -> Finding:
    """Every cell at every scale."""
    found: Found = {}
    rows = []
    for cell in CELLS:
        for scale, radius in SCALES.items():
            found[cell, scale] = [measure(cell, radius, size.hidden, seed + k) for k in range(size.seeds)]
            show(len(found), len(CELLS) * len(SCALES), f"{cell}, radius {radius}")
            same = {"cell": cell, "scale": scale, "spectral_radius": radius, "hidden": size.hidden}
            for k, flow in enumerate(found[cell, scale]):
                rows += [
                    {**same, "seed": seed + k, "steps_back": STEPS - t, "log10_of_norm": power}
                    for t, power in enumerate(flow.powers.tolist(), 1)
                ]
    return Finding(rows, sentences(found), lambda: draw(found))


def sentences(found: Found) -> list[str]:
    """Means over the seeds, and of what must hold for each the worst."""

    def moves(cell: str, scale: str) -> str:
        flows = found[cell, scale]
        powers = mean(flow.moved() for flow in flows)
        how = " exponentially" if min(flow.straight() for flow in flows) > STRAIGHT else ""
        rate = 10 ** (powers / (STEPS - 1))
        verb = "falls" if powers < 0 else "grows"
        return f"{verb}{how}, by {abs(powers):.1f} powers of ten over {STEPS - 1} steps (× {rate:.3f} a step)"

    def worst(cell: str, scale: str) -> float:
        return max(flow.strayed() for flow in found[cell, scale])

    def radii(scales: list[str]) -> str:
        strays = listed(f"{worst('LSTM', scale):.1f}" for scale in scales)
        return f"at radius {listed(str(SCALES[scale]) for scale in scales)} (it strays by {strays})"

    kept = [scale for scale in SCALES if worst("LSTM", scale) <= BAND]
    lost = [scale for scale in SCALES if scale not in kept]
    verdicts = [f"stays within {BAND:g} powers of ten at every step {radii(kept)}"] if kept else []
    verdicts += [f"does not stay within {BAND:g} powers of ten {radii(lost)}"] if lost else []
    others = [f"{max(worst(cell, scale) for scale in SCALES):.1f} ({cell})" for cell in CELLS if cell != "LSTM"]
    return [
        f"At spectral radius {SCALES['small']} the tanh RNN's gradient {moves('RNN tanh', 'small')}, and the relu "
        f"RNN's {moves('RNN relu', 'small')}.",
        f"At spectral radius {SCALES['large']} the relu RNN's gradient {moves('RNN relu', 'large')}, and the tanh "
        f"RNN's {moves('RNN tanh', 'large')}.",
        f"The LSTM with forget bias {FORGET:g} {listed(verdicts)}; the others stray by up to {listed(others)}.",
    ]


def draw(found: Found) -> Any:
    """The mean of the logarithms over the seeds, a panel for each scale."""
    fig, axes = figure(1, len(SCALES), width=4.2)
    for axis, (scale, radius) in zip(axes, SCALES.items(), strict=True):
        axis.axhspan(-BAND, BAND, color="0.85", label=f"within {BAND:g} powers of ten")
        for cell, style in zip(CELLS, STYLES, strict=True):
            powers = torch.stack([flow.powers for flow in found[cell, scale]]).mean(0)
            axis.plot(range(STEPS - 1, -1, -1), powers, markevery=25, label=cell, **style)
        axis.set(title=f"{scale}: spectral radius {radius} of W_hh", xlabel="steps back, T − t")
        axis.sharey(axes[0])
    axes[0].set_ylabel(r"$\log_{10}$ of $\|\partial L_T/\partial h_t\|\,/\,\|\partial L_T/\partial h_T\|$")
    axes[-1].legend()
    return fig
