"""Weak long-term memory: on the adding problem and the copy task, how many answers each cell gets right after the same
number of training steps, against the length T over which it has to remember.

T are the steps of an adding problem and the pause of a copy task. An answer is right where a sum is within NEAR
(whoever always says 1 is right in 19 % of the cases), or where all copied symbols are. A tanh RNN, and an LSTM and a
GRU whose gates start with time scales up to T (`initialise.chrono_`), of the same width, with the same optimizer, rate
and clipping; a run ends early when the loss is a fiftieth of the memoryless one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import GRU, LSTM, RNN
from ..diagnostics import Adding, Copying, adding_problem, copy_task, initialise
from ..diagnostics.pictures import figure
from .common import STYLES, Finding, Show, listed, mean

CELLS = ("RNN tanh", "LSTM", "GRU")
TASKS = {"adding": "adding problem", "copying": "copy task"}
HIDDEN, ROWS, RATE = 32, 32, 1e-2
LENGTH, SYMBOLS = 3, 4  # what is copied
NEAR = 0.1
HELD = 500  # sequences on which a model is judged
LOOK = 50  # training steps between looks at them
SOLVED, ENOUGH = 1 / 10, 1 / 50  # of the memoryless loss


class Size(NamedTuple):
    """The lengths T, the most training steps that a model gets, and how many seeds."""

    lengths: tuple[int, ...]
    budget: int
    seeds: int


QUICK, FULL = Size((10, 30, 100), 1000, 1), Size((10, 25, 50, 100, 200, 300), 2000, 2)


class Trained(NamedTuple):
    """A model after its training, on sequences that it has not seen."""

    loss: float
    """Adding: mean squared error. Copying: cross-entropy of a step, nats."""
    baseline: float
    """The loss of whoever remembers nothing."""
    solved: float
    """Fraction of right answers."""
    steps: int
    """Of training."""


class Answerer(nn.Module):
    """A recurrent layer, and a linear answer from its state."""

    def __init__(self, cell: str, inputs: int, outputs: int, longest: int) -> None:
        super().__init__()
        kinds: dict[str, Any] = {"RNN tanh": RNN, "LSTM": LSTM, "GRU": GRU}
        self.rnn = kinds[cell](inputs, HIDDEN, batch_first=True)
        if cell != "RNN tanh":
            initialise.chrono_(self.rnn, longest)
        self.head = nn.Linear(HIDDEN, outputs)

    def judge(self, task: Adding | Copying) -> tuple[Tensor, Tensor]:
        """The loss, and [B] bool: which answers are right."""
        if isinstance(task, Adding):
            off = self.head(self.rnn(task.x)[0][:, -1])[:, 0] - task.target
            return off.square().mean(), off.abs() < NEAR
        logits = self.head(self.rnn(F.one_hot(task.x, SYMBOLS + 2).float())[0])
        right = (logits.argmax(2) == task.target)[:, -LENGTH:].all(1)
        return F.cross_entropy(logits.transpose(1, 2), task.target), right


def draw_task(task: str, rows: int, steps: int, generator: torch.Generator) -> Adding | Copying:
    """Sequences of a task."""
    if task == "adding":
        return adding_problem(rows, steps, generator=generator)
    return copy_task(rows, steps, length=LENGTH, symbols=SYMBOLS, generator=generator)


def train(task: str, cell: str, steps: int, budget: int, seed: int) -> Trained:
    """Train a model on a task of length `steps`, at most `budget` training steps."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    held = draw_task(task, HELD, steps, g)
    inputs, outputs = (2, 1) if task == "adding" else (SYMBOLS + 2, SYMBOLS + 1)
    model = Answerer(cell, inputs, outputs, held.x.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for k in range(1, budget + 1):
        loss, _ = model.judge(draw_task(task, ROWS, steps, g))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if k % LOOK == 0 or k == budget:
            with torch.no_grad():
                loss, right = model.judge(held)
            if loss < ENOUGH * held.baseline():
                break
    return Trained(float(loss), held.baseline(), float(right.float().mean()), k)


def run(size: Size, seed: int, show: Show) -> Finding:
    """Every cell on every task at every length."""
    rows: list[dict[str, Any]] = []
    total = len(TASKS) * len(size.lengths) * len(CELLS) * size.seeds
    for length in size.lengths:
        for task in TASKS:
            for cell in CELLS:
                for k in range(size.seeds):
                    found = train(task, cell, length, size.budget, seed + k)
                    same = {"task": task, "cell": cell, "T": length, "seed": seed + k, "budget": size.budget}
                    rows.append({**same, **found._asdict()})
                    show(len(rows), total, f"{task}, {cell}, T = {length}: {found.solved:.0%} right")
    return Finding(rows, sentences(rows), lambda: draw(rows))


def over_seeds(rows: list[dict[str, Any]], task: str, cell: str, length: int) -> tuple[float, float]:
    """Means of the solved fraction, and of the loss over the memoryless one."""
    mine = [row for row in rows if (row["task"], row["cell"], row["T"]) == (task, cell, length)]
    return mean(row["solved"] for row in mine), mean(row["loss"] / row["baseline"] for row in mine)


def sentences(rows: list[dict[str, Any]]) -> list[str]:
    """One on who solves each task at the greatest length, one on how far each gets."""
    lengths = sorted({row["T"] for row in rows})
    longest, budget = lengths[-1], rows[0]["budget"]

    def verdict(task: str) -> str:
        at = {cell: over_seeds(rows, task, cell, longest) for cell in CELLS}
        said = {cell: f"{cell} ({solved:.0%} right, {loss:.3f} of it)" for cell, (solved, loss) in at.items()}
        able = [said[cell] for cell, (_, loss) in at.items() if loss < SOLVED]
        unable = [said[cell] for cell in at if said[cell] not in able]
        within = f"came below {SOLVED:g} of the memoryless loss within {budget} training steps"
        if not able:
            return f"not one {within}: {listed(unable)}"
        return f"{listed(able)} {within}" + (f", {listed(unable)} did not" if unable else "")

    def reach(task: str) -> str:
        far = {cell: [t for t in lengths if over_seeds(rows, task, cell, t)[1] < SOLVED] for cell in CELLS}
        return listed(f"{cell} {f'up to T = {most[-1]}' if most else 'at no T'}" for cell, most in far.items())

    return [
        f"Adding two of {longest} numbers, {verdict('adding')}.",
        f"Copying {LENGTH} symbols over a pause of {longest}, {verdict('copying')}.",
        f"Of T from {lengths[0]} to {longest}, the adding problem was solved by {reach('adding')}, the copy task by "
        f"{reach('copying')}.",
    ]


def draw(rows: list[dict[str, Any]]) -> Any:
    """Solved fraction above, loss below, against T; a column for each task."""
    fig, axes = figure(2, 2, width=4.6, height=3.2)
    lengths = sorted({row["T"] for row in rows})
    for column, (task, name) in enumerate(TASKS.items()):
        above, below = axes[column], axes[2 + column]
        for cell, style in zip(CELLS, STYLES, strict=False):
            solved, loss = zip(*(over_seeds(rows, task, cell, t) for t in lengths), strict=True)
            above.plot(lengths, solved, label=cell, **style)
            below.plot(lengths, loss, label=cell, **style)
        above.set(title=name, ylabel="right answers, fraction", ylim=(-0.03, 1.05))
        below.axhline(SOLVED, color="0.5", linewidth=1, label="counts as solved")
        below.set(yscale="log", ylabel="loss / memoryless loss")
        for axis in (above, below):
            axis.set(xscale="log", xlabel="T, steps to remember over")
            axis.set_xticks(lengths, [str(t) for t in lengths])
            axis.minorticks_off()
    axes[2].legend()
    return fig
