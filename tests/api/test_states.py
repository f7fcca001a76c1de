"""`return_all_states` must give each layer's state after each step: what the reference loop holds in its hands there,
in every layout, before dropout, zero in padding, and with gradients. Nothing else about the call may change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sequences import F64, KINDS, Case, build, call, check, draw, ours, put, ways
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnkit

DEEP = {"layers": 3, "bidirectional": True, "states": True}
RESETS = ((0, 0), (3, 0), (5, 1), (1, 2))
SHAPES = [
    {"states": True},
    {**DEEP},
    {**DEEP, "layout": "batch", "hx": False},
    {**DEEP, "rows": 1, "layout": "one"},
    {**DEEP, "lengths": (4, 0, 6)},
    {**DEEP, "lengths": (4, 0, 5), "layout": "batch", "resets": RESETS},
    {**DEEP, "lengths": (2, 6, 4), "layout": "packed"},
    {"states": True, "lengths": (2, 6, 4), "layout": "packed", "resets": RESETS, "reset_state": True},
    {**DEEP, "rows": 1, "layout": "one", "lengths": (4,), "resets": RESETS[:2]},
]


@ways([Case(kind, **shape) for kind in KINDS for shape in SHAPES])
def test_equals_the_oracle(case, backend, dtype):
    """Forward and gradients; a loss on h_all and c_all reaches every leaf."""
    check(case, backend, dtype)


@ways([Case(kind, **shape) for kind in KINDS for shape in SHAPES])
def test_the_rest_of_the_result_is_the_same_without(case, backend, dtype):
    given = draw(case, dtype)
    layer = put(build(case, dtype=dtype, backend=backend), given.weights)
    got = call(case, layer, given)
    for name, v in call(replace(case, states=False), layer, given).items():
        assert torch.equal(got[name], v), name


@ways([Case(kind, **DEEP, lengths=(4, 0, 6)) for kind in KINDS])
def test_the_last_layer_is_the_output_and_the_last_step_the_final_state(case, backend, dtype):
    got = ours(case, backend, dtype)
    assert torch.equal(torch.cat([got["h_all"][-2], got["h_all"][-1]], -1), got["y"])
    for name in ("h", "c")[: 2 if KINDS[case.kind].has_c else 1]:
        for b, valid in enumerate(case.lengths):
            every, last = got[f"{name}_all"][:, :, b], got[f"{name}_n"][:, b]
            assert not every[:, valid:].any()
            if valid:
                assert torch.equal(every[0::2, valid - 1], last[0::2])
                assert torch.equal(every[1::2, 0], last[1::2])


@pytest.mark.parametrize("name", KINDS)
def test_forms(name):
    """[L·D, T, B, N], [L·D, B, T, N] with batch_first, [L·D, T, N] unbatched; padded, in the caller's order, packed."""
    kind, x = KINDS[name], torch.randn(6, 3, 4, dtype=F64)
    size, options = kind.proj or 5, {"num_layers": 2, "bidirectional": True, "dtype": F64, **kind.options}
    layer = getattr(rnnkit, kind.layer)(4, 5, **options)
    batched = put(getattr(rnnkit, kind.layer)(4, 5, batch_first=True, **options), dict(layer.named_parameters()))

    def states(*args, by=layer, **more):
        result = by(*args, return_all_states=True, **more)
        assert len(result) == 3
        return result[2] if kind.has_c else (result[2],)

    sizes = (size, 5)[: 2 if kind.has_c else 1]
    assert [tuple(s.shape) for s in states(x)] == [(4, 6, 3, n) for n in sizes]
    assert [tuple(s.shape) for s in states(x.transpose(0, 1), by=batched)] == [(4, 3, 6, n) for n in sizes]
    assert [tuple(s.shape) for s in states(x[:, 0])] == [(4, 6, n) for n in sizes]
    assert [tuple(s.shape) for s in states(x[:, 0], by=batched)] == [(4, 6, n) for n in sizes]

    lengths = torch.tensor([2, 6, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    for s, expected in zip(states(packed), states(x, lengths=lengths), strict=True):
        torch.testing.assert_close(s, expected, rtol=0, atol=1e-14)
    for s, expected in zip(states(packed, by=batched), states(x, lengths=lengths), strict=True):
        torch.testing.assert_close(s, expected.transpose(1, 2), rtol=0, atol=1e-14)
    in_order = PackedSequence(packed.data, packed.batch_sizes)  # sorted by the caller: nothing to put back
    for s, expected in zip(states(in_order), states(x, lengths=lengths), strict=True):
        torch.testing.assert_close(s, expected[:, :, packed.sorted_indices], rtol=0, atol=1e-14)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_states_are_those_before_dropout(name, packed):
    kind, x = KINDS[name], torch.randn(6, 3, 4, dtype=F64)
    layer = getattr(rnnkit, kind.layer)(4, 5, num_layers=2, dropout=0.5, dtype=F64, **kind.options)
    lengths = torch.tensor([2, 6, 4])
    given = pack_padded_sequence(x, lengths, enforce_sorted=False) if packed else x

    def run():
        y, _, states = layer(given, return_all_states=True)
        return pad_packed_sequence(y)[0] if packed else y, states if kind.has_c else (states,)

    trained, dropped = run()
    layer.eval()
    _, whole = run()
    for with_dropout, without in zip(dropped, whole, strict=True):
        assert torch.equal(with_dropout[0], without[0])
        assert not torch.equal(with_dropout[1], without[1])  # what follows the dropout does see it
    assert torch.equal(dropped[0][-1], trained)


@ways([Case(kind, **DEEP, lengths=(4, 0, 6), resets=RESETS) for kind in KINDS], dtypes=(F64,))
@pytest.mark.parametrize("which", ["h_all", "c_all"])
def test_a_gradient_through_one_state_reaches_what_it_depends_on(case, backend, dtype, which):
    if which not in call(case, build(case, dtype=dtype), draw(case, dtype)):
        assert not KINDS[case.kind].has_c
        return
    given = draw(case, dtype)
    layer = put(build(case, dtype=dtype, backend=backend), given.weights)
    state = call(case, layer, given)[which][0, 2, 2]  # layer 0, forwards, step 2, row 2, reset at 1
    grad = torch.autograd.grad(state.sum(), given.leaves["x"])[0]
    assert grad[1:3, 2].any(-1).all()
    grad[1:3, 2] = 0
    assert not grad.any()


def test_all_states_with_recompute_are_the_same():
    for kind in KINDS:
        case = Case(kind, **DEEP, lengths=(4, 0, 6))
        kept, again = (ours(replace(case, recompute=r), "reference", F64) for r in (False, True))
        assert all(torch.equal(kept[name], again[name]) for name in kept), kind
