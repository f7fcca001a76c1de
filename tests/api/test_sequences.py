"""Whole problems drawn by Hypothesis: every cell, stack, layout, length, reset and state together, on every backend
that can run them, against the one plain loop of `sequences`. What no list of cases thinks of is found here."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sequences import F32, F64, KINDS, Case, check, ours, reasons

from rnnkit.backends import BACKENDS


@st.composite
def problems(draw) -> Case:
    layout = draw(st.sampled_from(["time", "batch", "one", "packed"]))
    steps = draw(st.integers(1, 6))
    rows = 1 if layout == "one" else draw(st.integers(1, 4))
    lengths = None
    if layout == "packed":
        lengths = draw(st.lists(st.integers(1, steps), min_size=rows, max_size=rows))
        lengths[draw(st.integers(0, rows - 1))] = steps  # a packed sequence is as long as its longest row
    elif draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, steps), min_size=rows, max_size=rows))
    marks = st.tuples(st.integers(0, steps - 1), st.integers(0, rows - 1))
    resets = draw(st.none() | st.sets(marks, max_size=steps * rows).map(lambda s: tuple(sorted(s))))
    return Case(
        kind=draw(st.sampled_from(sorted(KINDS))),
        layers=draw(st.integers(1, 3)),
        bidirectional=draw(st.booleans()),
        layout=layout,
        bias=draw(st.booleans()),
        steps=steps,
        rows=rows,
        inputs=draw(st.integers(1, 4)),
        hidden=draw(st.integers(4, 6)),
        lengths=None if lengths is None else tuple(lengths),
        resets=resets,
        reset_state=resets is not None and draw(st.booleans()),
        hx=draw(st.booleans()),
        states=draw(st.booleans()),
        recompute=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


fixed = settings(
    derandomize=True, deadline=None, database=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow]
)


@fixed
@given(problems())
@example(Case("lstm", lengths=(0, 0), rows=2, resets=((0, 0), (5, 1)), reset_state=True, bidirectional=True))
def test_every_backend_gives_what_the_loop_gives(case):
    """In float64 throughout: where a backend has it, it is held to the last digits."""
    for backend in BACKENDS:
        if not reasons(case, backend.name, F64):
            check(case, backend.name, F64)


@fixed
@given(problems())
def test_every_backend_in_float32(case):
    for backend in BACKENDS:
        if not reasons(case, backend.name, F32):
            check(case, backend.name, F32)


@settings(fixed, max_examples=60)
@given(problems())
def test_what_is_chosen_and_what_is_kept_change_no_number(case):
    """`auto` runs every problem, with every gradient; recompute gives the very same numbers."""
    check(case, "auto", F64)
    kept, again = (ours(replace(case, recompute=r), "reference", F64) for r in (False, True))
    assert all(torch.equal(kept[name], again[name]) for name in kept)
