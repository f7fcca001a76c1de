"""`rnnkit.ops.layer` called directly: one layer in one direction. What a stack never shows: no steps, no rows, time in
chunks with the state carried from one to the next, and what it means to leave an argument out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sequences import F32, F64, KINDS, Case, Given, compare, draw, one_layer, ways, with_gradients

from rnnkit import checks, ops
from rnnkit.backends import BACKENDS, BY_NAME, describe
from rnnkit.backends.scan_backend import ScanBackend, project
from rnnkit.cells import CELLS

RESETS = ((0, 0), (3, 0), (4, 0), (5, 1), (1, 2), (2, 2))
EXTRAS = [{}, {"lengths": (4, 6, 0)}, {"resets": RESETS}, {"lengths": (4, 6, 2), "resets": RESETS, "reset_state": True}]


def run(case: Case, given: Given, reverse: bool, **options):
    """`ops.layer` on a case with one layer; results by name."""
    kind = KINDS[case.kind]
    first = {name: v[0] for name, v in given.leaves.items() if name != "x"}
    again = tuple(first[n] for n in ("h_r", "c_r") if n in first)
    results = ops.layer(
        kind.cell,
        given.leaves["x"],
        first.get("h_0"),
        first.get("c_0"),
        list(given.weights.values()),
        lengths=case.lengths_tensor(),
        reset=case.reset_tensor(),
        reset_state=None if not again else again if kind.has_c else again[0],
        reverse=reverse,
        all_states=case.states,
        recompute=case.recompute,
        **options,
    )
    return {name: v for name, v in zip(("y", "h_n", "c_n", "c_all"), results, strict=True) if v is not None}


def oracle(case: Case, given: Given, reverse: bool):
    zeros = [given.leaves["x"].new_zeros(case.rows, n) for n in (KINDS[case.kind].proj or case.hidden, case.hidden)]
    names = ("h", "c") if KINDS[case.kind].has_c else ("h",)
    start, again = (
        [given.leaves[f"{n}_{which}"][0] if f"{n}_{which}" in given.leaves else z for n, z in zip(names, zeros)]
        for which in ("0", "r")
    )
    everything, last = one_layer(case, given.leaves["x"], list(given.weights.values()), start, again, reverse)
    results = {"y": everything[0], **dict(zip(("h_n", "c_n"), last))}
    if case.states and KINDS[case.kind].has_c:
        results["c_all"] = everything[1]
    return results


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@ways([Case(kind, **extra, states=s) for kind in KINDS for extra in EXTRAS for s in (False, True)])
def test_equals_the_oracle(case, backend, dtype, reverse):
    given = draw(case, dtype)
    got = with_gradients(case, run(case, given, reverse, backend=backend), given.every())
    exact = [draw(case, d) for d in (F64, F32)]
    wide, narrow = (with_gradients(case, oracle(case, g, reverse), g.every()) for g in exact)
    compare(got, wide, narrow)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@ways(
    [
        Case(kind, **sizes, **extra, states=True, recompute=r)
        for kind in KINDS
        for sizes, extra in [
            ({"steps": 0}, {}),
            ({"steps": 0}, {"lengths": (0, 0, 0), "resets": ()}),
            ({"steps": 0}, {"resets": (), "reset_state": True}),
            ({"rows": 0}, {}),
            ({"rows": 0}, {"lengths": (), "resets": (), "reset_state": True}),
            ({"rows": 0, "steps": 0}, {"lengths": (), "resets": ()}),
        ]
        for r in (False, True)
    ]
)
def test_no_steps_and_no_rows(case, backend, dtype, reverse):
    """Nothing moves: the final state is the first, weights get zeros."""
    given = draw(case, dtype)
    results = run(case, given, reverse, backend=backend)
    size = KINDS[case.kind].proj or case.hidden
    assert results["y"].shape == (case.steps, case.rows, size) and results["y"].dtype == dtype
    got = with_gradients(case, results, given.every())
    for n in ("h", "c")[: 2 if KINDS[case.kind].has_c else 1]:
        assert torch.equal(got[f"{n}_n"], given.leaves[f"{n}_0"][0])
        assert got[f"{n}_n"].data_ptr() != given.leaves[f"{n}_0"].data_ptr() or case.rows == 0
    if KINDS[case.kind].has_c:
        assert got["c_all"].shape == (case.steps, case.rows, case.hidden)
    for name, v in given.every().items():
        assert got[f"d {name}"].shape == v.shape
        if name not in ("h_0", "c_0"):
            assert not got[f"d {name}"].any(), name
    assert got["d h_0"].any() or case.rows == 0


@ways([Case(kind, steps=0, recompute=r) for kind in KINDS for r in (False, True)])
def test_no_steps_without_a_gradient(case, backend, dtype):
    given = draw(case, dtype)
    with torch.no_grad():
        results = run(case, given, False, backend=backend)
    results["h_n"].zero_()
    assert given.leaves["h_0"].any()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@ways([Case(kind, hx=False, lengths=(4, 6, 0), resets=RESETS) for kind in KINDS])
def test_what_is_left_out_is_zeros(case, backend, dtype, reverse):
    case = replace(case, hx=True, reset_state=True)
    given = draw(case, dtype)
    with torch.no_grad():
        for name in ("h_0", "c_0", "h_r", "c_r"):
            if name in given.leaves:
                given.leaves[name].zero_()
    spelled = run(case, given, reverse, backend=backend)
    for name in ("h_0", "c_0", "h_r", "c_r"):
        given.leaves.pop(name, None)
    left_out = run(case, given, reverse, backend=backend)
    assert all(torch.equal(spelled[name], v) for name, v in left_out.items())


def scans(cases: list[Case]):
    """Every kernel backend's bare scan on every case, in every type that it computes in, whether built or not."""
    every = []
    for case in cases:
        for dtype in (F32, F64):
            t, o = problem(case, dtype)
            for backend in BACKENDS:
                able = not backend.unsupported(describe(KINDS[case.kind].cell, t, o, train=False))
                if isinstance(backend, ScanBackend) and able:
                    every.append(pytest.param(case, backend.name, dtype, id=f"{case}-{backend.name}-{str(dtype)[6:]}"))
    return pytest.mark.parametrize(("case", "backend", "dtype"), every)


def problem(case: Case, dtype: torch.dtype):
    given = draw(case, dtype)
    first = {name: v[0] for name, v in given.leaves.items() if name != "x"}
    again = tuple(first[n] for n in ("h_r", "c_r") if n in first)
    return checks.layer(
        KINDS[case.kind].cell,
        given.leaves["x"],
        first["h_0"],
        first.get("c_0"),
        list(given.weights.values()),
        case.lengths_tensor(),
        case.reset_tensor(),
        None if not again else again if KINDS[case.kind].has_c else again[0],
    )


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@scans([Case(kind, **extra) for kind in KINDS for extra in EXTRAS])
@torch.no_grad()
def test_time_in_chunks_is_bitwise_the_same(case, backend, dtype, reverse):
    """[0, T) at once, cut in two at every place, and step by step; lengths and resets are absolute in time."""
    t, _ = problem(case, dtype)
    kind, kernel = CELLS[KINDS[case.kind].cell], BY_NAME[backend]
    gx = project(kind, t)

    def scan(*borders):
        spans = list(zip((0, *borders), (*borders, case.steps), strict=True))
        h, c, parts = t.h_0, t.c_0, []
        for first, end in reversed(spans) if reverse else spans:
            part = gx[first:end].contiguous()
            y, h, c, c_all, _ = kernel.scan_forward(kind, part, h, c, t, t0=first, reverse=reverse, save=True)
            parts.append((y, c_all))
        if reverse:
            parts.reverse()
        return [torch.cat([y for y, _ in parts]), h, c, torch.cat([c for _, c in parts]) if kind.has_c else None]

    whole = scan()
    for borders in [(k,) for k in range(case.steps + 1)] + [tuple(range(1, case.steps))]:
        for a, b in zip(scan(*borders), whole, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), borders
