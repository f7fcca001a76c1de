"""What the gates do: a small LSTM learns characters of Python's standard library; then its forget and input gates over
a piece of held-out text, what it keeps after each kind of character, and what a reset takes away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import LSTM
from ..demo import text
from ..diagnostics import Gates, initialise
from ..diagnostics import gates as look
from ..sequence import LatentAutoregressiveModel
from .characters import bits_of, learn
from .common import Finding, Show

SHOWN = 60  # characters in the picture
UNITS = 24  # units in the picture
CUT = 30  # the step before which the state is reset


def run(quick: bool, seed: int, show: Show) -> Finding:
    hidden, updates = (64, 400) if quick else (256, 4000)
    torch.manual_seed(seed)
    corpus = text.load(None)
    model = LatentAutoregressiveModel(
        initialise.forget_bias_(LSTM(16, hidden, batch_first=True)), vocabulary=len(corpus.letters)
    )
    learn(model, corpus.train, updates, seed, lambda done, loss: show(done, updates, f"loss {loss:.3f}"))
    held = corpus.held_out.long()
    start = int(torch.randint(len(held) - 20000, (1,), generator=torch.Generator().manual_seed(seed)))
    piece = held[start : start + 2000]
    inside = look(model, piece[None])["rnn.l0"]
    letters = [corpus.letters[k] for k in piece.tolist()]
    apart = after_reset(model, piece[:SHOWN])
    rows = rows_of(inside, letters, apart)
    bits = bits_of(model, held[start : start + 20000])
    return Finding(rows, sentences(rows, apart, bits), lambda: draw(inside, letters))


def after_reset(model: LatentAutoregressiveModel, piece: Tensor) -> list[float]:
    """‖h without - h with a reset before step CUT‖ over ‖h without‖, for each step."""
    inputs = model._after_start(piece[None])[:, :-1]
    reset = torch.zeros(1, len(piece), dtype=torch.bool)
    reset[0, CUT] = True
    with torch.no_grad():
        plain, cut = model.rnn(inputs)[0][0], model.rnn(inputs, reset=reset)[0][0]
    return ((plain - cut).norm(dim=1) / plain.norm(dim=1)).tolist()


def kind(letter: str) -> str:
    """The character that the gates have just read."""
    if letter == "\n":
        return "line end"
    if letter == " ":
        return "space"
    return "letter or digit" if letter.isalnum() or letter == "_" else "punctuation"


def rows_of(inside: dict[str, Tensor], letters: list[str], apart: list[float]) -> list[dict[str, Any]]:
    """At step t the layer reads letter t - 1, and a start before the first."""
    f, i, o = (inside[name][:, 0].mean(1).tolist() for name in "fio")
    return [
        {
            "t": t + 1,
            "read": "start" if t == 0 else letters[t - 1].encode("unicode_escape").decode(),
            "kind": "start" if t == 0 else kind(letters[t - 1]),
            "forget": f[t],
            "input": i[t],
            "output": o[t],
            "changed_by_reset": apart[t] if t < len(apart) else "",
        }
        for t in range(len(letters))
    ]


def sentences(rows: list[dict[str, Any]], apart: list[float], bits: float) -> list[str]:
    def mean(name: str, of: str) -> float:
        some = [row[name] for row in rows if row["kind"] == of]
        return sum(some) / max(1, len(some))

    kinds = [k for k in ("letter or digit", "space", "punctuation", "line end") if any(r["kind"] == k for r in rows)]
    keeps = sorted(kinds, key=lambda k: mean("forget", k))
    writes = sorted(kinds, key=lambda k: mean("input", k))
    gone = next((k for k in range(CUT, len(apart)) if apart[k] < 0.1), None)
    return [
        f"The LSTM predicts held-out text at {bits:.2f} bits a character. Its forget gate is lowest, on average, after a "
        f"{keeps[0]} ({mean('forget', keeps[0]):.2f}) and highest after a {keeps[-1]} ({mean('forget', keeps[-1]):.2f}).",
        f"Its input gate writes most after a {writes[-1]} ({mean('input', writes[-1]):.2f}) and least after a {writes[0]} "
        f"({mean('input', writes[0]):.2f}).",
        f"A reset before character {CUT + 1} changes the state there by {apart[CUT]:.0%}; "
        + (
            f"{gone - CUT} characters later the difference is below 10 %: what was before is forgotten by itself."
            if gone is not None
            else f"{len(apart) - CUT - 1} characters later it is still {apart[-1]:.0%}: so long the past matters."
        ),
    ]


def draw(inside: dict[str, Tensor], letters: list[str]) -> Any:
    shown = {name: inside[name][:SHOWN, :, :UNITS] for name in "fi"}
    fig = Gates({"LSTM": shown}).plot(labels=["^", *(mark(x) for x in letters[: SHOWN - 1])])
    fig.axes[0].set_title("gates over the characters read (^: start, ⏎: line end, ␣: space)")
    return fig


def mark(letter: str) -> str:
    """A character as it stands under a picture."""
    return {"\n": "⏎", " ": "␣"}.get(letter, letter if letter.isprintable() else "?")
