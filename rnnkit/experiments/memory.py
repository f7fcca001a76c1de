"""Weak long-term memory: on the adding problem, how many answers each cell gets right after the same number of training
steps, against the length of the sequences.

An answer is right within a tenth; whoever always says 1 is right in 19 % of the cases. A tanh RNN, an LSTM with forget
bias 1 and a GRU of the same width, the same optimizer and clipping for each; a run ends early when the error is
a fiftieth of the memoryless one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import GRU, LSTM, RNN
from ..diagnostics import Adding, adding_problem, initialise
from ..diagnostics.pictures import figure
from .common import DASHES, MARKS, Finding, Show, listed

CELLS = ("RNN tanh", "LSTM", "GRU")
HIDDEN, ROWS, RATE = 64, 64, 3e-3
NEAR = 0.1
LOOK = 50  # steps between looks at the held-out error
TENTH = Adding.baseline() / 10


class Adder(nn.Module):
    """A recurrent layer that answers from its last state."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        if cell == "LSTM":
            self.rnn: Any = initialise.forget_bias_(LSTM(2, HIDDEN, batch_first=True))
        else:
            self.rnn = (RNN if cell.startswith("RNN") else GRU)(2, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])[:, 0]


def train(cell: str, steps: int, budget: int, seed: int) -> tuple[float, float, int]:
    """The held-out mean squared error and the solved fraction, and how many steps of training were made."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model = Adder(cell)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    held = adding_problem(500, steps, generator=g)
    error, solved = float("nan"), float("nan")
    for k in range(1, budget + 1):
        task = adding_problem(ROWS, steps, generator=g)
        optimizer.zero_grad()
        (model(task.x) - task.target).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if k % LOOK == 0 or k == budget:
            with torch.no_grad():
                off = model(held.x) - held.target
            error, solved = float(off.square().mean()), float((off.abs() < NEAR).float().mean())
            if error < Adding.baseline() / 50:
                break
    return error, solved, k


def run(quick: bool, seed: int, show: Show) -> Finding:
    lengths, budget = ((25, 50, 100), 1500) if quick else ((50, 100, 200, 400), 6000)
    rows: list[dict[str, Any]] = []
    for length in lengths:
        for cell in CELLS:
            error, solved, made = train(cell, length, budget, seed)
            row = {"cell": cell, "T": length, "error": error, "baseline": Adding.baseline(), "solved": solved}
            rows.append({**row, "steps": made, "budget": budget, "seed": seed})
            show(len(rows), len(lengths) * len(CELLS), f"{cell}, T = {length}, error {error:.4f}")
    return Finding(rows, sentences(rows), lambda: draw(rows))


def sentences(rows: list[dict[str, Any]]) -> list[str]:
    longest = max(row["T"] for row in rows)
    at = {row["cell"]: row for row in rows if row["T"] == longest}
    remembers = [cell for cell, row in at.items() if row["error"] < TENTH]
    not_ = [cell for cell in at if cell not in remembers]
    reach = {cell: max((r["T"] for r in rows if r["cell"] == cell and r["error"] < TENTH), default=0) for cell in CELLS}
    return [
        f"At T = {longest}, {listed(remembers) if remembers else 'no cell'} came below a tenth of the memoryless error "
        f"{Adding.baseline():.3f}; {listed(not_) if not_ else 'none'} did not, after the same "
        f"{rows[0]['budget']} steps at most.",
        "The longest sequences that each solved: "
        + listed([f"{cell} {reach[cell] or 'none'}" for cell in CELLS])
        + ".",
        f"Errors at T = {longest}: "
        + listed([f"{cell} {row['error']:.4f} ({row['solved']:.0%} right)" for cell, row in at.items()])
        + ".",
    ]


def draw(rows: list[dict[str, Any]]) -> Any:
    fig, axes = figure(1, 2, width=4.6)
    for cell, dash, mark in zip(CELLS, DASHES, MARKS, strict=False):
        mine = [row for row in rows if row["cell"] == cell]
        lengths = [row["T"] for row in mine]
        style = {"linestyle": dash, "marker": mark, "color": "black", "markerfacecolor": "white", "label": cell}
        axes[0].plot(lengths, [row["solved"] for row in mine], **style)
        axes[1].semilogy(lengths, [row["error"] for row in mine], **style)
    axes[0].set(xlabel="length T, steps", ylabel=f"answers within {NEAR}, fraction", ylim=(0, 1.05))
    axes[1].axhline(Adding.baseline(), color="gray", linewidth=1)
    axes[1].annotate("remembers nothing", (min(r["T"] for r in rows), Adding.baseline() * 1.1), color="gray")
    axes[1].set(xlabel="length T, steps", ylabel="mean squared error")
    axes[0].legend()
    return fig
