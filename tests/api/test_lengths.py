"""`lengths` must equal packing, running torch.nn and unpacking, so a program can drop its packing without a change in
any number or gradient. Held against torch.nn itself where it knows the layer, and against the oracle everywhere."""

from __future__ import annotations

import pytest
import torch
from sequences import (
    F64,
    KINDS,
    KNOWN_TO_TORCH,
    Case,
    Results,
    build,
    call,
    check,
    compare,
    draw,
    ours,
    pair,
    put,
    ways,
    with_gradients,
)
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkit

SHAPES = [
    {"lengths": (2, 6, 4), "rows": 3},
    {"lengths": (5, 0, 1, 6, 0), "rows": 5, "bidirectional": True},
    {"lengths": (3, 0, 5), "layers": 2},  # no row reaches T
    {"lengths": (6, 2, 0, 3), "rows": 4, "layers": 2, "bidirectional": True, "layout": "batch"},
    {"lengths": (0, 0, 0), "bidirectional": True},
    {"lengths": (6, 6, 6), "layers": 2, "bidirectional": True},
    {"lengths": (4, 1), "rows": 2, "hx": False, "bidirectional": True},
    {"lengths": (4, 1), "rows": 2, "bias": False, "layout": "batch"},
    {"lengths": (4,), "rows": 1, "layout": "one", "layers": 2, "bidirectional": True},
    {"lengths": (0,), "rows": 1, "layout": "one"},
    {"lengths": (3, 6, 1, 4), "rows": 4, "layout": "packed", "layers": 2, "bidirectional": True},
    {"lengths": (6, 6, 6), "layout": "packed", "bidirectional": True},
]


def through_packing(case: Case) -> Results:
    """Pack the rows that have a step, run torch.nn's layer, unpack; rows without one keep their initial state."""
    given = draw(case, F64)
    layer = put(build(case, nn, dtype=F64), given.weights)
    there = [b for b in range(case.rows) if case.valid(b)]
    x = given.leaves["x"]
    hx = pair(Case(**{**vars(case), "layout": "time"}), given, "0")
    starts = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
    y = x.new_zeros(case.steps, case.rows, case.directions * (KINDS[case.kind].proj or case.hidden))
    sizes = [KINDS[case.kind].proj or case.hidden, case.hidden][: 2 if KINDS[case.kind].has_c else 1]
    finals = list(starts) or [x.new_zeros(case.count, case.rows, n) for n in sizes]
    if there:
        some = tuple(s[:, there] for s in starts)
        state = None if not some else some if KINDS[case.kind].has_c else some[0]
        rows = x[:, there].transpose(0, 1) if layer.batch_first else x[:, there]
        packed = pack_padded_sequence(
            rows, torch.tensor([case.valid(b) for b in there]), layer.batch_first, enforce_sorted=False
        )
        out, last = layer(packed, state)
        out = pad_packed_sequence(out, total_length=case.steps)[0]
        index = torch.tensor(there)
        y = y.index_copy(1, index, out)
        last = last if isinstance(last, tuple) else (last,)
        finals = [f.index_copy(1, index, v) for f, v in zip(finals, last, strict=True)]
    results = {"y": y, **dict(zip(("h_n", "c_n"), finals, strict=False))}
    return with_gradients(case, results, {**given.leaves, **dict(layer.named_parameters())})


@ways([Case(kind, **shape) for kind in KNOWN_TO_TORCH for shape in SHAPES], dtypes=(F64,))
def test_equals_packing_running_torch_and_unpacking(case, backend, dtype):
    compare(ours(case, backend, dtype), through_packing(case))


@ways([Case(kind, **shape) for kind in KINDS for shape in SHAPES])
def test_equals_the_oracle(case, backend, dtype):
    check(case, backend, dtype)


@ways([Case(kind, lengths=(4, 0, 6), layers=2, bidirectional=True) for kind in KINDS])
def test_beyond_the_length_is_exactly_zero_and_an_empty_row_keeps_its_state(case, backend, dtype):
    given = draw(case, dtype)
    results = call(case, put(build(case, dtype=dtype, backend=backend), given.weights), given)
    for b, valid in enumerate(case.lengths):
        assert not results["y"][valid:, b].any()
        assert results["y"][:valid, b].all(-1).all() or case.kind == "rnn_relu"
    for name in ("h", "c")[: 2 if KINDS[case.kind].has_c else 1]:
        assert torch.equal(results[f"{name}_n"][:, 1], given.leaves[f"{name}_0"][:, 1])


@ways([Case(kind, lengths=(4, 0, 6), layers=2, bidirectional=True) for kind in KINDS])
def test_what_stands_in_the_padding_is_never_read(case, backend, dtype):
    given = draw(case, dtype)
    layer = put(build(case, dtype=dtype, backend=backend), given.weights)
    before = call(case, layer, given)
    with torch.no_grad():
        for b, valid in enumerate(case.lengths):
            given.leaves["x"][valid:, b] = 1e4
    after = call(case, layer, given)
    assert all(torch.equal(before[name], after[name]) for name in before)


@ways([Case(kind, lengths=(2, 6, 0)) for kind in KINDS])
def test_the_last_valid_output_is_the_final_state(case, backend, dtype):
    got = ours(case, backend, dtype)
    for b, valid in enumerate(case.lengths):
        assert valid == 0 or torch.equal(got["y"][valid - 1, b], got["h_n"][0, b])


INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("steps", [6, 150, 300])  # beyond what int8 and uint8 hold
def test_any_integer_dtype(dtype, steps):
    x = torch.randn(steps, 3, 2, dtype=F64)
    layer = rnnkit.GRU(2, 3, bidirectional=True, dtype=F64)
    lengths = torch.tensor([5, 0, 6])
    expected = layer(x, lengths=lengths)
    got = layer(x, lengths=lengths.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_beyond_t_is_an_error_in_any_dtype(dtype):
    layer, x = rnnkit.GRU(2, 3), torch.randn(6, 2, 2)
    for bad in (7, -1):
        with pytest.raises(ValueError, match=rf"lengths must lie in \[0, T=6\], got {bad} at row 1"):
            layer(x, lengths=torch.tensor([6, bad], dtype=dtype))


@ways([Case(kind, rows=1, layout="one", lengths=(4,), bidirectional=True) for kind in KINDS], dtypes=(F64,))
@pytest.mark.parametrize("lengths", [torch.tensor(4), torch.tensor([4]), torch.tensor(4, dtype=torch.int16)])
def test_unbatched_lengths_are_0d_or_one(case, backend, dtype, lengths):
    check(case, backend, dtype, lengths=lengths)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_changed_in_place_before_backward(dtype):
    layer, x = rnnkit.LSTM(2, 3, dtype=F64), torch.randn(6, 2, 2, dtype=F64, requires_grad=True)
    lengths = torch.tensor([[4, 9], [1, 9]], dtype=dtype)[:, 0]  # not contiguous either
    expected = torch.autograd.grad(layer(x, lengths=torch.tensor([4, 1]))[0].sum(), x)[0]
    loss = layer(x, lengths=lengths)[0].sum()
    lengths.fill_(6)
    try:
        assert torch.equal(torch.autograd.grad(loss, x)[0], expected)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_sequence_brings_its_own_lengths(kind):
    case = Case(kind, lengths=(3, 6, 1), layout="packed")
    with pytest.raises(ValueError, match="lengths must be None with a PackedSequence"):
        ours(case, "auto", F64, lengths=torch.tensor([3, 6, 1]))


@ways([Case(kind, lengths=(4, 0, 6), layers=2, bidirectional=True, states=True, recompute=True) for kind in KINDS])
def test_recompute_gives_the_same_numbers(case, backend, dtype):
    got = check(case, backend, dtype)
    kept = ours(Case(**{**vars(case), "recompute": False}), backend, dtype)
    assert all(torch.equal(got[name], kept[name]) for name in got)


PLAIN = [
    {"layers": 2},
    {"layers": 2, "bidirectional": True, "layout": "batch"},
    {"rows": 1, "layout": "one", "bias": False},
]


@ways([Case(kind, **shape) for kind in KINDS for shape in PLAIN])
def test_plain_problems_equal_the_oracle(case, backend, dtype):
    check(case, backend, dtype)
