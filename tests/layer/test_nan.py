"""What a row does not depend on must not reach it, not even as 0 · NaN: padding, what lies on the far side of a reset,
an initial state that was replaced, rows without a step. A program that leaves NaN there must see neither an output
that follows nor a gradient change by one bit. Without lengths and resets, NaN spreads exactly as in torch.nn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sequences import F64, KINDS, KNOWN_TO_TORCH, Case, build, call, draw, pair, put, ways, with_gradients
from torch import nn

import rnnkit

POISON = pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "-inf"])
DEEP = {"layers": 2, "bidirectional": True}


def evaluate(case, backend, dtype, spoil, follows, poison):
    """What follows, and every gradient of a loss on it. `spoil(leaves, value)` writes where nothing may be seen."""
    given = draw(case, dtype)
    layer = put(build(case, dtype=dtype, backend=backend, recompute=case.recompute), given.weights)
    with torch.no_grad():
        spoil(given.leaves, poison)
    results = follows(call(case, layer, given))
    return with_gradients(case, results, {**given.leaves, **dict(layer.named_parameters())})


def assert_unseen(case, backend, dtype, spoil, follows, poison):
    clean = evaluate(case, backend, dtype, spoil, follows, 0.5)
    got = evaluate(case, backend, dtype, spoil, follows, poison)
    for name, v in clean.items():
        assert v.isfinite().all()
        assert torch.equal(got[name], v), name
    return got


def unseen_places(case):
    """A `spoil` that writes into padding and, for a case whose row 0 is reset at the first step, its initial state."""

    def spoil(leaves, value):
        for b, valid in enumerate(case.lengths or ()):
            leaves["x"][valid:, b] = value
        for name in ("h_0", "c_0"):
            if name in leaves:
                leaves[name][:, 0] = value

    return spoil


def everything(results):
    return results


def variants(**more):
    """Each kind with and without recompute, with and without reset_state where there are resets."""
    given = [False, True] if more.get("resets") else [False]
    return [Case(kind, recompute=r, reset_state=s, **more) for kind in KINDS for r, s in zip((False, True), given * 2)]


@POISON
@ways(variants(**DEEP, lengths=(4, 0, 6), states=True))
def test_in_padding(case, backend, dtype, poison):
    def spoil(leaves, value):
        for b, valid in enumerate(case.lengths):
            leaves["x"][valid:, b] = value

    assert_unseen(case, backend, dtype, spoil, everything, poison)


@POISON
@ways(variants(**DEEP, lengths=(4, 0, 6), resets=((2, 0), (5, 0), (3, 1), (3, 2))))
def test_in_padding_with_resets(case, backend, dtype, poison):
    def spoil(leaves, value):
        for b, valid in enumerate(case.lengths):
            leaves["x"][valid:, b] = value

    assert_unseen(case, backend, dtype, spoil, everything, poison)


@POISON
@ways(variants(**DEEP, resets=((3, 0), (1, 1))) + variants(**DEEP, lengths=(6, 2, 3), resets=((3, 0), (1, 1))))
def test_before_a_reset(case, backend, dtype, poison):
    """The steps from 3 on, in both directions, the final state forwards, and the other rows."""

    def spoil(leaves, value):
        leaves["x"][:3, 0] = value
        for name in {"h_0", "c_0"} & leaves.keys():
            leaves[name][0::2, 0] = value

    def follows(results):
        found = {"later": results["y"][3:, 0], "others": results["y"][:, 1:]}
        return {**found, **{name: results[name][0::2] for name in ("h_n", "c_n") if name in results}}

    got = assert_unseen(case, backend, dtype, spoil, follows, poison)
    assert not got["d x"][:3, 0].any() and not got["d h_0"][0::2, 0].any()


@POISON
@ways(variants(**DEEP, resets=((3, 0), (1, 1))) + variants(**DEEP, lengths=(5, 2, 3), resets=((3, 0), (1, 1))))
def test_behind_a_reset_for_what_runs_backwards(case, backend, dtype, poison):
    """The steps before 3, in both directions, the final state backwards, and the other rows."""

    def spoil(leaves, value):
        leaves["x"][3:, 0] = value
        for name in {"h_0", "c_0"} & leaves.keys():
            leaves[name][1::2, 0] = value

    def follows(results):
        found = {"earlier": results["y"][:3, 0], "others": results["y"][:, 1:]}
        return {**found, **{name: results[name][1::2] for name in ("h_n", "c_n") if name in results}}

    got = assert_unseen(case, backend, dtype, spoil, follows, poison)
    assert not got["d x"][3:, 0].any() and not got["d h_0"][1::2, 0].any()


@POISON
@ways(variants(layers=2, states=True, resets=((0, 0), (0, 2), (4, 1))))
def test_in_an_initial_state_that_the_first_step_replaces(case, backend, dtype, poison):
    def spoil(leaves, value):
        for name in {"h_0", "c_0"} & leaves.keys():
            leaves[name][:, [0, 2]] = value

    got = assert_unseen(case, backend, dtype, spoil, everything, poison)
    assert not got["d h_0"][:, [0, 2]].any() and got["d h_0"][:, 1].any()


@POISON
@ways(variants(**DEEP, states=True, lengths=(4, 0, 6)) + variants(**DEEP, lengths=(4, 0, 6), resets=((0, 1), (2, 2))))
def test_in_rows_without_a_step(case, backend, dtype, poison):
    """Such a row's final state is its initial one, NaN or not, and the gradient passes between the two untouched."""

    def spoil(leaves, value):
        for name in {"x", "h_0", "c_0", "h_r", "c_r"} & leaves.keys():
            leaves[name][:, 1] = value

    def follows(results):
        return {name: v if name == "y" or "all" in name else v[:, [0, 2]] for name, v in results.items()}

    assert_unseen(case, backend, dtype, spoil, follows, poison)
    clean, got = (evaluate(case, backend, dtype, spoil, everything, v) for v in (0.5, poison))
    assert all(torch.equal(got[name], v) for name, v in clean.items() if name.startswith("d "))
    assert not got["h_n"][:, 1].isfinite().any()


@POISON
@ways([Case(kind, **DEEP, lengths=(4, 0, 6), resets=((2, 0), (4, 0), (3, 1)), reset_state=True) for kind in KINDS])
def test_in_a_reset_state_that_never_serves(case, backend, dtype, poison):
    def spoil(leaves, value):
        for name in {"h_r", "c_r"} & leaves.keys():
            leaves[name][:, 1:] = value

    got = assert_unseen(case, backend, dtype, spoil, everything, poison)
    assert not got["d h_r"][:, 1:].any() and got["d h_r"][:, 0].any()


@ways([Case(kind, **DEEP, lengths=(4, 2, 6), resets=((3, 0),)) for kind in KINDS], dtypes=(F64,))
def test_where_a_row_does_depend_on_it_it_is_seen(case, backend, dtype):
    given = draw(case, dtype)
    with torch.no_grad():
        given.leaves["x"][3, 0] = float("nan")
    y = call(case, put(build(case, dtype=dtype, backend=backend), given.weights), given)["y"]
    assert y[3, 0].isnan().all() and y[:, 1:].isfinite().all() and y[:3, 0].isfinite().all()


@POISON
@pytest.mark.parametrize("where", ["x", "h_0", "c_0"])
@ways([Case(kind, **shape) for kind in KNOWN_TO_TORCH for shape in ({}, DEEP)])
def test_a_plain_problem_behaves_as_torch(case, backend, dtype, where, poison):
    """Outputs and gradients have their NaN and inf in the same places, and the same numbers elsewhere."""
    given = draw(replace(case, hx=True), dtype)
    if where not in given.leaves:
        assert where == "c_0"
        return
    with torch.no_grad():
        given.leaves[where][2 if where == "x" else 0, 1, 0] = poison
    layer, theirs = (
        put(build(case, m, dtype=dtype, **how), given.weights) for m, how in ((rnnkit, {"backend": backend}), (nn, {}))
    )
    y, last = theirs(given.leaves["x"], pair(case, given, "0"))
    expected = {"y": y, **dict(zip(("h_n", "c_n"), last if isinstance(last, tuple) else (last,), strict=False))}
    a, b = (
        with_gradients(case, results, {**given.leaves, **dict(by.named_parameters())})
        for results, by in ((call(case, layer, given), layer), (expected, theirs))
    )
    for name, v in b.items():
        assert torch.equal(a[name].isnan(), v.isnan()), name
        close = 1e-13 if dtype == F64 else 1e-5  # what is at stake is where NaN and inf stand; numbers: test_lengths
        torch.testing.assert_close(a[name], v, rtol=close, atol=close, equal_nan=True)


def further(case, backend, poison, after):
    """Derivatives beyond the plain backward, of a loss that sees neither padding nor rows without a step: by
    torch.func, and the second derivatives; with resets, those of the steps from `after` on."""
    given = draw(case, F64)
    layer = put(build(case, dtype=F64, backend=backend), given.weights)
    with torch.no_grad():
        for b, valid in enumerate(case.lengths or ()):
            given.leaves["x"][valid:, b] = poison
            for name in {"h_0", "c_0"} & given.leaves.keys():
                given.leaves[name][:, b] = given.leaves[name][:, b] if valid else poison
        given.leaves["x"][:after] = poison
    leaves, names = {**given.leaves, **dict(layer.named_parameters())}, list(given.leaves)

    def loss(every):
        weights = {name: v for name, v in every.items() if name not in names}
        given_now = replace(given, leaves={name: every[name] for name in names})

        def run(x, hx, **how):
            return torch.func.functional_call(layer, weights, (x, hx), how)

        return call(case, run, given_now)["y"][after:].square().sum()

    first = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    if after:
        return dict(zip(leaves, first, strict=True))
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))
    functional = torch.func.grad(loss)({name: v.detach() for name, v in leaves.items()})
    return {**{f"d² {n}": v for n, v in zip(leaves, second, strict=True)}, **functional}


@POISON
@ways([Case(kind, **DEEP, lengths=(4, 0, 6)) for kind in KINDS], dtypes=(F64,))
def test_nor_any_other_derivative_sees_padding_and_rows_without_a_step(case, backend, dtype, poison):
    clean, got = (further(case, backend, v, after=0) for v in (0.5, poison))
    for name, v in clean.items():
        assert v.isfinite().all() and torch.equal(got[name], v), name


@POISON
@ways([Case(kind, layers=2, resets=((3, 0), (3, 1), (3, 2))) for kind in KINDS], dtypes=(F64,))
def test_nor_does_a_gradient_with_a_graph_see_what_lies_before_a_reset(case, backend, dtype, poison):
    clean, got = (further(case, backend, v, after=3) for v in (0.5, poison))
    for name, v in clean.items():
        assert v.isfinite().all() and torch.equal(got[name], v), name
