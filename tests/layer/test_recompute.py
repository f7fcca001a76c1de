"""`recompute=True`: the backward goes in ranges of time, and makes the gates of each again from the state before it.

What it gives is held against the oracle of sequences.py with ranges of a few steps, in every backend; the memory it
asks for against what the shapes say.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from sequences import F64, KINDS, Case, check, compare, ours, truth, ways
from support import CELLS, Config, parity
from test_nan import assert_unseen, everything, unseen_places
from torch import Tensor, nn

import rnnkit
from rnnkit.backends import chunks
from rnnkit.backends.cpu import extension
from rnnkit.backends.triton import backend as triton
from rnnkit.benchmarks.speed import timing

RESETS = tuple((t, b) for t, b in ((0, 0), (2, 0), (3, 0), (4, 1), (6, 1), (1, 2), (2, 2), (3, 2), (5, 2), (6, 2)))
EXTRAS: list[dict[str, Any]] = [
    {},
    {"lengths": (7, 0, 4)},
    {"resets": RESETS},
    {"resets": RESETS, "lengths": (5, 7, 3), "reset_state": True, "states": True},
]
EVERYTHING = {"steps": 7, "rows": 3, "bidirectional": True, **EXTRAS[-1], "recompute": True}


@pytest.fixture(params=[3, 7, 1], ids=lambda most: f"ranges{most}")
def some_ranges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """So many ranges at most, however few rows they have: of 7 steps 3, 3 and 1; one each; all at once."""
    monkeypatch.setattr(chunks, "LEAST_ROWS", 1)
    monkeypatch.setattr(chunks, "MOST_CHUNKS", request.param)
    yield request.param


def test_spans_cover_time_once() -> None:
    for steps in (0, 1, 7, 16, 17, 1000, 70_001):
        for rows in (0, 1, 3, 64, 5000):
            found = list(chunks.chunk_bounds(steps, rows, last_first=False))
            assert [t for t0, t1 in found for t in range(t0, t1)] == list(range(steps))
            assert 1 <= len(found) <= chunks.MOST_CHUNKS
            assert all((t1 - t0) * rows >= min(chunks.LEAST_ROWS, steps * rows) for t0, t1 in found[:-1])
            assert list(chunks.chunk_bounds(steps, rows, last_first=True)) == found[::-1]


@ways([Case(kind, steps=7, bidirectional=True, recompute=True, **extra) for kind in KINDS for extra in EXTRAS])
def test_gradients_over_ranges(case: Case, backend: str, dtype: torch.dtype, some_ranges: int) -> None:
    check(case, backend, dtype)


@ways([Case(kind, steps=1, bidirectional=True, recompute=True, states=True) for kind in KINDS])
def test_one_step(case: Case, backend: str, dtype: torch.dtype, some_ranges: int) -> None:
    check(case, backend, dtype)


@ways(
    [
        Case(kind, layers=2, **{**EVERYTHING, "steps": 41, "rows": 6, "lengths": (41, 0, 40, 17, 5, 33)})
        for kind in KINDS
    ]
)
def test_ranges_as_they_come(case: Case, backend: str, dtype: torch.dtype) -> None:
    """The engine's own, of 16 rows and more."""
    check(case, backend, dtype)


@ways([Case(kind, **{**EVERYTHING, "lengths": (5, 0, 7), "bidirectional": False}) for kind in KINDS])
def test_nan_in_padding_is_not_seen(case: Case, backend: str, dtype: torch.dtype, some_ranges: int) -> None:
    """Nor in the initial state that a reset at the first step replaces."""

    assert_unseen(case, backend, dtype, unseen_places(case), everything, float("nan"))


@ways([Case(kind, **EVERYTHING) for kind in KINDS])
def test_sums_in_the_same_order_are_the_same(
    case: Case, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit: with one range, which is what the engine's two ways have in common, however many."""
    monkeypatch.setattr(chunks, "MOST_CHUNKS", 1)
    kept, again = ours(replace(case, recompute=False), backend, dtype), ours(case, backend, dtype)
    assert all(torch.equal(again[name], v) for name, v in kept.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_half_types(cell: str, dtype: torch.dtype, some_ranges: int) -> None:
    """A range starts from a state rounded to the layer's dtype. Within the budget of torch.nn."""

    def recomputing(module: nn.Module, call: Any, input: Any, hx: Any, x: Tensor) -> Any:
        module.recompute = True
        return module(input, hx)

    size = (7, 2, 3, 5) if triton.interpreted() else (33, 5, 6, 16)
    config = Config(cell, 1, True, dtype=dtype, size=size)
    backends = ["triton"] if triton.interpreted() else None
    assert parity(config, backends, how=recomputing) == []


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without: the reference's formulas over all time."""
    monkeypatch.setattr(chunks, "LEAST_ROWS", 1)
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        given = KINDS[kind]
        layer = getattr(rnnkit, given.layer)(3, 4, recompute=recompute, dtype=F64, **given.options)
        x = torch.randn(7, 2, 3, dtype=F64, requires_grad=True)
        (first,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, *layer.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Mutations: errors that these tests must see.


def mutate(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    monkeypatch.setattr(chunks, "LEAST_ROWS", 1)
    monkeypatch.setattr(chunks, "MOST_CHUNKS", 3)
    right = chunks.take_chunk

    def wrong(*given: Any, reverse: bool) -> chunks.Chunk:
        return change(right, given, reverse)

    monkeypatch.setattr(chunks, "take_chunk", wrong)


def forgets_what_comes_later(right: Any, given: tuple, reverse: bool) -> chunks.Chunk:
    found = right(*given, reverse=reverse)
    last = given[-1] == 7 if not reverse else given[-2] == 0
    return found if last else found._replace(grads=found.grads._replace(h_n=None))


def forgets_c(right: Any, given: tuple, reverse: bool) -> chunks.Chunk:
    found = right(*given, reverse=reverse)
    last = given[-1] == 7 if not reverse else given[-2] == 0
    return found if last else found._replace(grads=found.grads._replace(c_n=None))


def starts_a_step_off(right: Any, given: tuple, reverse: bool) -> chunks.Chunk:
    t, y, *rest = given
    return right(t, y.roll(1, 0), *rest, reverse=reverse)._replace(y=y[given[-2] : given[-1]])


def forgets_a_reset_between(right: Any, given: tuple, reverse: bool) -> chunks.Chunk:
    return right(*given, reverse=reverse)._replace(at_reset=None)


def takes_lengths_as_they_are(right: Any, given: tuple, reverse: bool) -> chunks.Chunk:
    found = right(*given, reverse=reverse)
    return found._replace(t=found.t._replace(lengths=given[0].lengths))


def starts_every_row_from_y(right: Any, given: tuple, reverse: bool) -> chunks.Chunk:
    t, *rest = given
    found = right(t._replace(lengths=None), *rest, reverse=reverse)
    return found._replace(t=found.t._replace(lengths=right(*given, reverse=reverse).t.lengths))


MUTATIONS = [
    (forgets_what_comes_later, "gru"),
    (forgets_what_comes_later, "rnn_tanh"),
    (forgets_c, "lstm"),
    (starts_a_step_off, "gru"),
    (forgets_a_reset_between, "gru"),
    (forgets_a_reset_between, "lstm"),
    (takes_lengths_as_they_are, "lstm"),
    (starts_every_row_from_y, "gru"),
]


@pytest.mark.parametrize(("error", "kind"), MUTATIONS)
def test_an_error_is_seen(error: Callable[..., Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(kind, **EVERYTHING)
    check(case, "reference", F64)
    mutate(monkeypatch, error)
    with pytest.raises(AssertionError, match=r"off by|budget"):
        compare(ours(case, "reference", F64), truth(case, F64))


# Memory. Counted exactly, by torch's profiler; in units of [T, B, H] of the layer's dtype, with I = H.


def step_of(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """Its own x, a gradient of y with memory, and the gradients of x and of the weights."""

    def work() -> None:
        own = x.clone().requires_grad_()
        y = layer(own)[0]
        torch.autograd.grad(y, [own, *layer.parameters()], torch.ones_like(y))

    return work


def peak(work: Callable[[], object]) -> float:
    work()
    return timing.peak_mib(work, "cpu") * 2**20


def kept_by(layer: nn.Module, x: Tensor) -> int:
    """Bytes saved for the backward beside what came in."""
    own = {v.untyped_storage().data_ptr() for v in (x, *layer.parameters())}
    found: dict[int, int] = {}

    def note(v: Tensor) -> Tensor:
        if v.untyped_storage().data_ptr() not in own:
            found[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(note, lambda v: v):
        y = layer(x.requires_grad_())
    del y
    return sum(found.values())


SAVED = {"RNN": 1, "LSTM": 2, "GRU": 1}  # y, and c
# What a range of the kernel backends holds at most: gates, and y and c that the scan gives with them; c and the state
# before each step once more; dgx, and dgh of a GRU; the gradient of x.
HELD = {"RNN": 1 + 1 + 1, "LSTM": 4 + 2 + 2 + 4 + 1, "GRU": 4 + 1 + 1 + 6 + 1}
# And of the engine: the same without the copies of states.
ENGINE = {"RNN": 1, "LSTM": 4 + 2 + 4, "GRU": 4 + 1 + 4}


def forget_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's objects refer to one another, and would hold the tensors of a launch until collected."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def forgetting(self: Any, *arguments: Any, **more: Any) -> None:
        launch(self, *arguments, **more)
        del arguments, more
        gc.collect()

    monkeypatch.setattr(GridExecutor, "__call__", forgetting)


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_what_is_held(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between forward and backward y, and c; at the peak x, y, c, their gradients, a range, and the weights' twice."""
    if backend == "triton" and not triton.interpreted():
        pytest.skip("runs where Triton interprets; tests/triton/test_triton.py sees to it")
    if backend == "cpu" and not extension.available():
        pytest.skip(extension.reason())
    if backend == "triton":
        forget_launches(monkeypatch)
    monkeypatch.setattr(chunks, "LEAST_ROWS", 1)
    monkeypatch.setattr(chunks, "MOST_CHUNKS", 8)
    steps, rows, size = 32 if backend == "triton" else 64, 16, 16
    share = 1 / 8  # the engine's too: an eighth of the rows, at least 16
    layer = getattr(rnnkit, name)(size, size, backend=backend, recompute=True)
    x = torch.randn(steps, rows, size)
    unit = x.nbytes
    small = 16 * rows * size * 4  # states and their gradients
    assert kept_by(layer, x.clone()) <= SAVED[name] * unit + small
    weights = 3 * sum(p.nbytes for p in layer.parameters())
    held = ENGINE if backend == "cpu" else HELD
    most = (3 + SAVED[name] + held[name] * share) * unit + weights + small
    found = peak(step_of(layer, x))
    assert found <= most, f"{found / unit:.2f} [T, B, H] at the peak, {most / unit:.2f} expected"


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@pytest.mark.skipif(not extension.available(), reason=extension.reason())
def test_training_needs_half_of_torch(name: str) -> None:
    """And an RNN's step has x, y and their gradients, four fifths of what torch takes, whoever runs it."""
    for rows, steps, size in ((32, 50, 64), (32, 128, 128)):
        x = torch.randn(steps, rows, size)
        theirs = peak(step_of(getattr(nn, name)(size, size), x))
        mine = peak(step_of(getattr(rnnkit, name)(size, size, backend="cpu", recompute=True), x))
        assert mine <= 0.5 * theirs, f"{mine / theirs:.2f} of torch.nn's peak"
