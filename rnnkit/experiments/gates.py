"""What the gates do: an LSTM and a GRU learn characters of Python's standard library on the same batches; then their
gates and the cell state over held-out text, what they do after each kind of character, and what a reset of the LSTM's
state costs.

At step t the layer reads character t − 1 and predicts character t.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import GRU, LSTM
from ..demo import text
from ..diagnostics import gates as look
from ..diagnostics import initialise
from ..diagnostics.pictures import figure, heat_map
from ..sequence import LatentAutoregressiveModel
from .characters import bits_of, learn
from .common import Finding, Show, mean

EMBEDDED = 32
LENGTH = 2000  # characters over which gates are looked at
SHOWN, UNITS = 70, 12  # characters, and units of a layer, in the picture
CUT = 100  # characters before a reset
AFTER = 60  # characters for which it is followed
FORGOTTEN = 0.1  # of the state, below which what was before a reset counts as gone
APART = 0.02  # between means of gates, below which they count as alike
KINDS = ("letter or digit", "space", "punctuation mark", "line end")


GATES = {
    "forget": ("LSTM", "f"),
    "input": ("LSTM", "i"),
    "output": ("LSTM", "o"),
    "cell": ("LSTM", "c"),
    "reset": ("GRU", "r"),
    "update": ("GRU", "z"),
}
"""What is shown of which layer: the CSV's columns and the picture's panels. Of the cell state the columns hold |c|."""


class Size(NamedTuple):
    """Width of both layers, their training steps, the held-out windows in which a reset is followed."""

    hidden: int
    updates: int
    windows: int


QUICK, FULL = Size(96, 800, 200), Size(256, 3000, 1000)


class Reset(NamedTuple):
    """What a reset of the state changes, means over windows; [AFTER], from the step on before which it is made."""

    bits: Tensor
    """More bits for the character predicted there than without the reset."""
    state: Tensor
    """‖h with − h without‖ / ‖h without‖."""


def run(size: Size, seed: int, show: Show) -> Finding:
    """Train, look at the gates, reset."""
    torch.manual_seed(seed)
    corpus = text.load(None)
    models: dict[str, LatentAutoregressiveModel] = {}
    for name, made in (("LSTM", LSTM), ("GRU", GRU)):
        layer: Any = made(EMBEDDED, size.hidden, batch_first=True)
        if name == "LSTM":
            initialise.forget_bias_(layer)
        models[name] = LatentAutoregressiveModel(layer, vocabulary=len(corpus.letters))
    learn(
        [*models.values()], corpus.train, size.updates, seed, lambda k, loss: show(k, size.updates, f"loss {loss:.3f}")
    )
    g = torch.Generator().manual_seed(seed)
    held = corpus.held_out.long()
    start = int(torch.randint(len(held) - 2 * LENGTH, (1,), generator=g))
    start += int((held[start:] == corpus.letters.index("\n")).nonzero()[0]) + 1  # a line begins there
    piece = held[start : start + LENGTH]
    every = {name: look(model, piece[None])["rnn.l0"] for name, model in models.items()}
    inside = {gate: every[name][letter][:, 0] for gate, (name, letter) in GATES.items()}  # each [T, H]
    begin = torch.randint(len(held) - CUT - AFTER, (size.windows, 1), generator=g)
    reset = after_reset(models["LSTM"], held[begin + torch.arange(CUT + AFTER)])
    letters = [corpus.letters[k] for k in piece.tolist()]
    rows = rows_of(inside, letters, reset)
    bits = {name: bits_of(model, held) for name, model in models.items()}
    return Finding(rows, sentences(rows, reset, bits), lambda: draw(inside, letters, reset))


def after_reset(model: LatentAutoregressiveModel, x: Tensor) -> Reset:
    """x: tokens [B, CUT + AFTER]."""
    start = model.start.expand(x.shape[0], 1, -1)
    cut = torch.zeros(x.shape, dtype=torch.bool)
    cut[:, CUT] = True
    with torch.no_grad():
        inputs = torch.cat([start, model.embedding(x[:, :-1])], 1)
        states = [model.rnn(inputs, reset=reset)[0] for reset in (None, cut)]
        plain, other = (model.observations.distribution(model.head(h)).log_prob(x) for h in states)
        apart = (states[1] - states[0]).norm(dim=2) / states[0].norm(dim=2)
    return Reset(((plain - other) / math.log(2)).mean(0)[CUT:], apart.mean(0)[CUT:])


def kind(letter: str) -> str:
    """Of a character that the gates have just read."""
    if letter == "\n":
        return "line end"
    if letter == " ":
        return "space"
    return "letter or digit" if letter.isalnum() or letter == "_" else "punctuation mark"


def rows_of(inside: dict[str, Tensor], letters: list[str], reset: Reset) -> list[dict[str, Any]]:
    """Means over the units at each step of the text; then, by the steps since, what a reset changes."""
    means = {gate: v.abs().mean(1).tolist() for gate, v in inside.items()}
    keys = ("part", "step", "read", "kind", *GATES, "bits_more", "state_changed")
    rows: list[dict[str, Any]] = [
        {
            "part": "gates",
            "step": t + 1,
            "read": "start" if t == 0 else letters[t - 1].encode("unicode_escape").decode(),
            "kind": "start" if t == 0 else kind(letters[t - 1]),
            **{gate: v[t] for gate, v in means.items()},
        }
        for t in range(len(letters))
    ]
    rows += [
        {"part": "reset", "step": k, "bits_more": bits, "state_changed": state}
        for k, (bits, state) in enumerate(zip(reset.bits.tolist(), reset.state.tolist(), strict=True), 1)
    ]
    return [{key: row.get(key, "") for key in keys} for row in rows]


def sentences(rows: list[dict[str, Any]], reset: Reset, bits: dict[str, float]) -> list[str]:
    """Where the LSTM's gates open and close, where the GRU's, and how long a reset is felt; bits by layer."""

    def extremes(gate: str) -> str:
        by_kind = {k: [row[gate] for row in rows if row["kind"] == k] for k in KINDS}
        means = sorted((mean(values), k) for k, values in by_kind.items() if values)
        (low, where), (high, other) = means[0], means[-1]
        if high - low < APART:
            return f"is about the same whatever was read ({low:.2f} to {high:.2f})"
        return f"is lowest after a {where} ({low:.2f}) and highest after a {other} ({high:.2f})"

    gone = next((k for k, left in enumerate(reset.state.tolist()) if left < FORGOTTEN), None)
    state = f"the state, changed by {float(reset.state[0]):.0%} at first,"
    if gone is None:
        left = f"still differs by {float(reset.state[-1]):.0%} after {AFTER} characters"
    else:
        left = f"is within {FORGOTTEN:.0%} of what it would have been {gone} characters later"
    return [
        f"The LSTM spends {bits['LSTM']:.2f} bits on a character of held-out text; on average over its units the "
        f"forget gate {extremes('forget')}, the input gate {extremes('input')}, the output gate "
        f"{extremes('output')} and the size of the cell state |c| {extremes('cell')}.",
        f"The GRU spends {bits['GRU']:.2f} bits; its update gate, the weight of the past, {extremes('update')}, and "
        f"its reset gate {extremes('reset')}.",
        f"A reset of the LSTM makes the next character cost {more(reset.bits[0])} and the {AFTER}th "
        f"{more(reset.bits[-1])}; "
        f"{state} {left}.",
    ]


def more(bits: Tensor) -> str:
    """A difference, in words."""
    return f"{abs(float(bits)):.2f} bits {'more' if bits > 0 else 'less'}"


def draw(inside: dict[str, Tensor], letters: list[str], reset: Reset) -> Any:
    """The units of each layer whose forget or update gate varies most, the slowest on top; below them the reset."""
    fig, axes = figure(len(GATES) + 1, 1, width=11, height=1.7)
    read = ["^", *(mark(letter) for letter in letters[: SHOWN - 1])]
    for axis, (gate, (name, letter)) in zip(axes, GATES.items(), strict=False):
        past = inside["forget" if name == "LSTM" else "update"][:SHOWN]
        chosen = past.std(0).topk(min(UNITS, past.shape[1])).indices
        chosen = chosen[past[:, chosen].mean(0).argsort(descending=True)]
        shown = inside[gate][:SHOWN, chosen]
        most = float(shown.abs().max()) if gate == "cell" else 1.0
        words = "cell state c" if gate == "cell" else f"{gate} gate {letter}"
        heat_map(fig, axis, shown, f"{name}\n{words}", -most if gate == "cell" else 0.0, most)
        axis.set_xticks(range(len(read)), read, family="monospace", fontsize=8)
    axes[0].set_title(
        f"gates: 0 closed (black), 1 open (white); cell state: 0 is mid-grey; {len(chosen)} units a layer, "
        "the slowest to forget on top",
        fontsize=10,
    )
    axes[len(GATES) - 1].set_xlabel("step t: the character just read (^ start, ⏎ line end, ␣ space)")
    last = axes[-1]
    steps = range(1, AFTER + 1)
    (cost,) = last.plot(steps, reset.bits, color="black", marker="o", markersize=3, label="cost, bits (left)")
    last.axhline(0, color="0.7", linewidth=1)
    last.set(xlabel="characters after a reset of the LSTM's state", ylabel="bits more\na character")
    right = last.twinx()
    (moved,) = right.plot(
        steps, reset.state, "--", color="0.4", marker="s", markersize=3, label="state, ‖change‖ / ‖h‖ (right)"
    )
    ratio = float(reset.state.max() / reset.bits.abs().max())
    right.set(ylabel="change of the state", ylim=tuple(ratio * v for v in last.get_ylim()))  # one zero for both
    last.legend(handles=[cost, moved])
    return fig


def mark(letter: str) -> str:
    """A character as it stands under a picture."""
    return {"\n": "⏎", " ": "␣"}.get(letter, letter if letter.isprintable() else "?")
