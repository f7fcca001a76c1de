"""The tests of the kernels can fail: an error planted in the text of each kernel turns the comparison red.

A copy of rnnkit/kernels with one line changed takes the place of the package; Triton reads the source of what it runs.
Without a change the same comparison is silent.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from sequences import F32, KINDS, Case, check

import rnnkit.kernels
from rnnkit.backends.triton import backend as triton

SOURCE = Path(rnnkit.kernels.__path__[0])


class Mutation(NamedTuple):
    """`right` in the function `where` (file.function) becomes `wrong`."""

    where: str
    right: str
    wrong: str
    kind: str
    regime: str


GATES = [  # a wrong gate, or a wrong derivative of one; both regimes call these
    ("rnn.step", "relu(x + hh) if RELU else tanh(x + hh)", "relu(x - hh) if RELU else tanh(x - hh)", "rnn_tanh"),
    ("rnn.step_vjp", "da = dh * (1 - h * h)", "da = dh * (1 - h)", "rnn_tanh"),
    ("rnn.step_vjp", "tl.where(h <= 0, 0.0, dh)", "tl.where(h < 0, 0.0, dh)", "rnn_relu"),
    ("lstm.step", "c = f * c + i * g", "c = i * c + f * g", "lstm"),
    ("lstm.step_vjp", "dai = dc * g * i * (1 - i)", "dai = dc * g * i", "lstm"),
    ("lstm.step_vjp", "daf = dc * c_before", "daf = dc * c", "lstm_proj"),
    ("gru.after_step", "(1 - z) * n + z * h", "(1 - z) * h + z * n", "gru"),
    ("gru.after_step_vjp", "dn * r, dh * z", "dn, dh * z", "gru"),
    ("gru.before_step", "(1 - z) * n + z * h", "(1 - z) * h + z * n", "gru_reset_before"),
    ("gru.before_step_vjp", "dh * z + drh * r", "dh * z + drh", "gru_reset_before"),
]
RESET = ("if reset is not None:", "if False:")
BEFORE = ("is_cut(reset, t, row", "is_cut(reset, t - 1, row")
KERNELS = [  # a missing reset, one at the wrong step, a row that lives one step too long
    *[("rnn.forward", *e, "rnn_tanh", "persistent") for e in (RESET, BEFORE, ("t < length", "t <= length"))],
    *[("rnn.backward", *e, "rnn_tanh", "persistent") for e in (RESET, BEFORE, ("t < length", "t <= length"))],
    *[("lstm.forward", *e, "lstm", "persistent") for e in (RESET, BEFORE, ("t < length", "t <= length"))],
    *[("lstm.backward", *e, "lstm", "persistent") for e in (RESET, BEFORE, ("t < length", "t <= length"))],
    *[("gru.forward", *e, "gru", "persistent") for e in (RESET, BEFORE, ("t < length", "t <= length"))],
    *[("gru.backward", *e, "gru", "persistent") for e in (RESET, BEFORE, ("t < length", "t <= length"))],
    ("rnn.forward_step", "t0 + j < length", "t0 + j <= length", "rnn_tanh", "step"),
    ("rnn.backward_step", "t < length_of", "t <= length_of", "rnn_tanh", "step"),
    ("lstm.forward_step", "t < length", "t <= length", "lstm", "step"),
    ("lstm.backward_step", "lives = t < length", "lives = t <= length", "lstm", "step"),
    ("lstm.backward_step", *RESET, "lstm", "step"),
    ("gru.forward_step", "t0 + j < length", "t0 + j <= length", "gru", "step"),
    ("gru.backward_step", "t < length", "t <= length", "gru", "step"),
    ("gru.reset_step", "sigmoid(ar)", "(1 - sigmoid(ar))", "gru_reset_before", "step"),
    ("gru.candidate_back", "t < length_of", "t < 0 * length_of", "gru_reset_before", "step"),
    ("product.product", "row, a_width, w", "row, a_width - 1, w", "lstm", "step"),
    ("product.carry", *RESET, "gru", "step"),
    ("product.carry", "t < length", "t <= length", "gru", "step"),
    ("product.settle", "t0 + j < length", "t0 + j + 1 < length", "lstm_proj", "step"),
    ("product.arrive", "j < length_of", "j + 1 < length_of", "lstm_proj", "step"),
    ("product.product_back", *RESET, "gru", "step"),
    ("product.product_back", "j < length", "j <= length", "gru", "step"),
    ("product.is_idle_row", "return busy == 0", "return busy >= 0", "gru", "step"),
    ("shared.is_idle", "axis=1) == 0", "axis=1) >= 0", "lstm", "persistent"),
    ("shared.previous_state", *RESET, "lstm", "persistent"),
    ("shared.previous_state", "before >= length", "before > length", "gru", "persistent"),
    ("shared.time_index", "j + reverse", "j + (1 - reverse)", "rnn_tanh", "persistent"),
    ("shared.is_cut", "t + reverse", "t", "gru", "persistent"),
    ("product.carry", "t + 1 - 2 * reverse", "t + 1", "gru", "step"),
    ("shared.dot", "acc + tl.dot", "tl.dot", "gru", "persistent"),
    ("shared.matrix", "(k < K)", "(k < K - 1)", "gru", "persistent"),
    ("shared.matrix", "(unit < N)", "(unit < N - 1)", "rnn_tanh", "persistent"),
    ("product.sums", "(k < K)", "(k < K - 1)", "lstm", "step"),
    ("lstm.forward", "dot(m, wr", "dot(c, wr", "lstm_proj", "persistent"),
    ("lstm.backward", "dot(d, wr", "-dot(d, wr", "lstm_proj", "persistent"),
    ("lstm.backward", "N, valid_h, d)", "N, valid_h, dh)", "lstm_proj", "persistent"),
]
MUTATIONS = [Mutation(*e, regime) for e in GATES for regime in ("persistent", "step")] + [Mutation(*e) for e in KERNELS]


def compare(kind: str, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions, so that a backward's own backward is there too."""
    monkeypatch.setattr(triton.regimes, "only", regime)
    resets = ((0, 0), (2, 0), (1, 2), (3, 2), (2, 1))
    check(
        Case(kind, bidirectional=True, steps=4, rows=3, lengths=(4, 2, 3), resets=resets, reset_state=True),
        "triton",
        F32,
    )


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package that the next scan imports."""
    copy = tmp_path / "kernels"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name in [name for name in sys.modules if name.startswith("rnnkit.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(rnnkit.kernels, name.rpartition(".")[2])
    monkeypatch.setattr(rnnkit.kernels, "__path__", [str(copy)])
    return copy


def mutate(kernels: Path, error: Mutation) -> None:
    file, function = error.where.split(".")
    path = kernels / f"{file}.py"
    text = path.read_text(encoding="utf-8")
    start = text.index(f"def {function}(")
    end = text.find("\n\n\n", start)
    end = len(text) if end < 0 else end
    body = text[start:end]
    assert error.right in body, f"{error.where} has no {error.right!r}"
    path.write_text(text[:start] + body.replace(error.right, error.wrong) + text[end:], encoding="utf-8")


@pytest.mark.parametrize("regime", ["persistent", "step"])
@pytest.mark.parametrize("kind", KINDS)
def test_silent_without_an_error(kind: str, regime: str, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(kind, regime, monkeypatch)
    assert sys.modules["rnnkit.kernels.shared"].__file__ == str(kernels / "shared.py")


@pytest.mark.parametrize("error", MUTATIONS, ids=lambda e: f"{e.where}-{e.wrong}-{e.regime}")
def test_red(error: Mutation, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(kernels, error)
    with pytest.raises(AssertionError, match=r"off by|budget"):
        compare(error.kind, error.regime, monkeypatch)


def test_every_kernel_has_an_error() -> None:
    """Each function that is launched, or that all of them call for a mask, stands in the lists above."""
    mutated = {error.where for error in MUTATIONS}
    for path in SOURCE.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for piece in text.split("@triton.jit(")[1:]:
            name = piece.partition("def ")[2].partition("(")[0]
            assert f"{path.stem}.{name}" in mutated
