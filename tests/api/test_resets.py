"""A reset must act as if the sequence had been cut there: forward, backward in time, in every layer and for every
gradient. Held against the oracle's plain loop, and against torch.nn run on each segment by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sequences import (
    F64,
    KINDS,
    KNOWN_TO_TORCH,
    Case,
    build,
    call,
    check,
    draw,
    ours,
    put,
    ways,
)
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkit

# Steps 0 and T - 1, neighbours, a row without any, and at, before and beyond every length.
RESETS = ((0, 0), (3, 0), (4, 0), (5, 0), (5, 1), (0, 2), (1, 2), (2, 2))
DEEP = {"layers": 2, "bidirectional": True}
SHAPES = [
    {},
    {"reset_state": True},
    {"reset_state": True, "bidirectional": True, "bias": False},
    {"hx": False, "layers": 2},
    {**DEEP, "layout": "batch"},
    {**DEEP, "reset_state": True},
    {**DEEP, "reset_state": True, "lengths": (4, 6, 0)},
    {**DEEP, "lengths": (5, 5, 2), "layout": "batch"},
    {**DEEP, "reset_state": True, "lengths": (4, 6, 1), "layout": "packed"},
    {"lengths": (3, 6, 2), "layout": "packed", "hx": False},
    {"lengths": (6, 6, 6), "layout": "packed", "bidirectional": True},
    {"rows": 1, "layout": "one", "resets": ((0, 0), (2, 0), (5, 0)), "reset_state": True, **DEEP},
    {"rows": 1, "layout": "one", "resets": ((0, 0), (2, 0), (5, 0)), "lengths": (5,), "bidirectional": True},
]


def cases(**more):
    return [Case(kind, **{"resets": RESETS, **more}) for kind in KINDS]


@ways([Case(kind, **{"resets": RESETS, **shape}) for kind in KINDS for shape in SHAPES])
def test_equals_the_oracle(case, backend, dtype):
    check(case, backend, dtype)


@pytest.mark.parametrize("bidirectional", [False, True])
@ways([Case(kind, steps=4, rows=16, hidden=4, resets=()) for kind in KINDS], dtypes=(F64,))
def test_every_pattern_of_four_steps(case, backend, dtype, bidirectional):
    every = tuple((t, b) for b in range(16) for t in range(4) if b >> t & 1)
    case = replace(case, resets=every, bidirectional=bidirectional, reset_state=True)
    check(case, backend, dtype)
    check(replace(case, lengths=(3, 2, 1, 0) * 4), backend, dtype)


@ways([Case(kind, **DEEP, resets=((2, 0), (5, 0)), rows=1, steps=8) for kind in KNOWN_TO_TORCH], dtypes=(F64,))
def test_equals_torch_on_each_segment(case, backend, dtype):
    """Forwards only the first segment sees hx, backwards only the last; a neighbour is never seen."""
    given = draw(case, dtype)
    got = call(case, put(build(case, dtype=dtype, backend=backend), given.weights), given)
    plain = put(build(case, nn, dtype=dtype), given.weights)
    parts, states = [], []
    for first, end in ((0, 2), (2, 5), (5, 8)):
        sees = torch.tensor([first == 0, end == 8] * case.layers, dtype=dtype).view(-1, 1, 1)
        start = [given.leaves[name] * sees for name in ("h_0", "c_0") if name in given.leaves]
        y, last = plain(given.leaves["x"][first:end], tuple(start) if len(start) == 2 else start[0])
        parts.append(y)
        states.append(last if isinstance(last, tuple) else (last,))
    torch.testing.assert_close(got["y"], torch.cat(parts), rtol=0, atol=1e-14)
    for k, name in enumerate(("h_n", "c_n")[: len(states[0])]):
        torch.testing.assert_close(got[name][0::2], states[-1][k][0::2], rtol=0, atol=1e-14)
        torch.testing.assert_close(got[name][1::2], states[0][k][1::2], rtol=0, atol=1e-14)


@ways(cases(**DEEP, lengths=(5, 5, 3)))
def test_no_reset_changes_nothing(case, backend, dtype):
    given = draw(case, dtype)
    layer = put(build(case, dtype=dtype, backend=backend), given.weights)
    none = call(replace(case, resets=()), layer, given)
    assert all(torch.equal(none[k], v) for k, v in call(replace(case, resets=None), layer, given).items())
    beyond = tuple((t, b) for b, valid in enumerate(case.lengths) for t in range(valid, case.steps))
    assert all(torch.equal(none[k], v) for k, v in call(replace(case, resets=beyond), layer, given).items())


@ways(cases(lengths=(0, 0, 0), reset_state=True, bidirectional=True))
def test_a_reset_of_an_empty_row_does_nothing(case, backend, dtype):
    got = check(case, backend, dtype)
    given = draw(case, dtype)
    assert torch.equal(got["h_n"], given.leaves["h_0"])
    assert not got["d h_r"].any()


@ways(cases(layers=2, reset_state=True, resets=((3, 0), (3, 1), (3, 2))))
def test_no_gradient_passes_a_reset(case, backend, dtype):
    given = draw(case, dtype)
    layer = put(build(case, dtype=dtype, backend=backend), given.weights)
    results = call(case, layer, given)
    after = results["y"][3:].sum() + sum(results[name].sum() for name in ("h_n", "c_n") if name in results)
    leaves = given.leaves
    found = dict(zip(leaves, torch.autograd.grad(after, list(leaves.values())), strict=True))
    assert not found["x"][:3].any() and found["x"][3:].any(-1).all()
    for name in set(found) - {"x"}:
        reached = found[name].flatten(1).any(1)
        assert reached.all() if name.endswith("_r") else not reached.any(), name


@ways(cases(bidirectional=True, reset_state=True, resets=((3, 0), (3, 1), (3, 2))))
def test_no_gradient_passes_a_reset_backwards_in_time(case, backend, dtype):
    given = draw(case, dtype)
    layer = put(build(case, dtype=dtype, backend=backend), given.weights)
    y = call(case, layer, given)["y"]
    before = y[:3, :, y.shape[-1] // 2 :].sum()  # the reverse direction of the first segment
    x, h_0, h_r = torch.autograd.grad(before, [given.leaves[name] for name in ("x", "h_0", "h_r")])
    assert not x[3:].any() and x[:3].any(-1).all()
    assert not h_0.any() and h_r[1].any() and not h_r[0].any()


@ways(cases(bidirectional=True, reset_state=True, resets=((0, 0), (0, 1), (0, 2))))
def test_a_reset_at_the_first_step(case, backend, dtype):
    """Forwards it replaces hx; backwards there is no step on the other side, so it does nothing."""
    got = check(case, backend, dtype)
    given = draw(case, dtype)
    assert not got["d h_0"][0].any() and got["d h_0"][1].any()
    assert got["d h_r"][0].any() and not got["d h_r"][1].any()
    layer = put(build(case, dtype=dtype, backend=backend), given.weights)
    plain = call(replace(case, resets=None, reset_state=False), layer, given)
    if backend == "reference":  # its products are torch's, which may round otherwise elsewhere in memory
        torch.testing.assert_close(plain["h_n"][1], got["h_n"][1])
    else:
        assert torch.equal(plain["h_n"][1], got["h_n"][1])


@ways(cases(reset_state=True, resets=tuple((t, b) for t in range(6) for b in range(3)), **DEEP))
def test_a_reset_at_every_step_makes_steps_of_their_own(case, backend, dtype):
    got = check(case, backend, dtype)
    for k in range(2):
        assert not got["d h_0"][2 * k].any() and got["d h_0"][2 * k + 1].any()


@ways(cases(reset_state=True, lengths=(4, 0, 6), recompute=True, **DEEP))
def test_recompute_gives_the_same_numbers(case, backend, dtype):
    got = check(case, backend, dtype)
    kept = ours(replace(case, recompute=False), backend, dtype)
    assert all(torch.equal(got[name], kept[name]) for name in got)


def episodes(layer, x, reset, state=None):
    """The loop that recurrent PPO and TorchRL write by hand: `episode_starts`, `is_init`."""
    outputs = []
    for t in range(x.shape[0]):
        keep = (1 - reset[t].to(x.dtype)).view(1, -1, 1)
        state = None if state is None else tuple(s * keep for s in state)
        y, state = layer(x[t : t + 1], state)
        outputs.append(y)
    return torch.cat(outputs), state


def test_is_the_episode_loop_of_reinforcement_learning():
    layer, x = rnnkit.LSTM(4, 5, num_layers=2, dtype=F64), torch.randn(9, 3, 4, dtype=F64)
    reset = torch.rand(9, 3) < 0.3
    start = (torch.randn(2, 3, 5, dtype=F64), torch.randn(2, 3, 5, dtype=F64))
    expected, (h_n, c_n) = episodes(put(nn.LSTM(4, 5, 2, dtype=F64), dict(layer.named_parameters())), x, reset, start)
    got = layer(x, start, reset=reset)
    torch.testing.assert_close(got, (expected, (h_n, c_n)), rtol=0, atol=1e-14)


DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)


@pytest.mark.parametrize("trailing", [False, True], ids=["", "trailing"])
@pytest.mark.parametrize("layout", ["time", "batch", "one", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype_that_holds_0_and_1_in_every_layout(dtype, layout, trailing):
    case = Case("gru", resets=RESETS, layout=layout, bidirectional=True, lengths=(4, 6, 2))
    if layout == "one":
        case = replace(case, rows=1, resets=RESETS[:4], lengths=(4,))
    marks = case.reset_tensor().to(dtype)
    if layout == "packed":
        bits = pack_padded_sequence(case.reset_tensor(), case.lengths_tensor(), enforce_sorted=False)
        data = bits.data.to(dtype)
        marks = bits._replace(data=data.unsqueeze(-1) if trailing else data)
    else:
        marks = marks.squeeze(1) if layout == "one" else marks.transpose(0, 1) if layout == "batch" else marks
        marks = marks.unsqueeze(-1) if trailing else marks
    check(case, "reference", F64, reset=marks)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_reset_must_fit_the_input(kind):
    case = Case(kind, lengths=(3, 6, 2), layout="packed", resets=RESETS)
    marks = case.reset_tensor()
    with pytest.raises(TypeError, match="with a PackedSequence, reset must be one too"):
        ours(case, "auto", F64, reset=marks)
    other = pack_padded_sequence(marks, torch.tensor([3, 6, 1]), enforce_sorted=False)
    with pytest.raises(ValueError, match="batch_sizes"):
        ours(case, "auto", F64, reset=other)
    swapped = pack_padded_sequence(marks, torch.tensor([6, 3, 2]), enforce_sorted=False)
    with pytest.raises(ValueError, match="sorted_indices"):
        ours(case, "auto", F64, reset=swapped)


def test_a_reset_changed_in_place_before_backward():
    layer, x = rnnkit.GRU(2, 3, dtype=F64), torch.randn(6, 2, 2, dtype=F64, requires_grad=True)
    reset = torch.zeros(6, 2, dtype=torch.bool)
    expected = torch.autograd.grad(layer(x, reset=reset)[0].sum(), x)[0]
    loss = layer(x, reset=reset)[0].sum()
    reset.fill_(True)
    try:
        assert torch.equal(torch.autograd.grad(loss, x)[0], expected)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)


def test_reset_state_alone_is_a_mistake():
    with pytest.raises(ValueError, match="needs reset"):
        rnnkit.GRU(2, 3)(torch.randn(4, 1, 2), reset_state=torch.zeros(1, 1, 3))
