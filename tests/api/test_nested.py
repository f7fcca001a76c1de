"""A nested tensor of layout torch.jagged is a ragged batch: the same numbers as padded rows with `lengths`, in the
input's layout, so that the output meets what else has its offsets; and what cannot be taken is refused in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nested import nested_tensor, nested_tensor_from_jagged, to_padded_tensor

import rnnkit
from rnnkit import functional

I, H = 3, 5
LENGTHS = [[3, 5, 1], [4, 0, 2], [0, 0], [2], [3, 3]]
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "RNN": lambda **how: rnnkit.RNN(I, H, **how),
    "LSTM": lambda **how: rnnkit.LSTM(I, H, **how),
    "LSTM-deep": lambda **how: rnnkit.LSTM(I, H, 2, bidirectional=True, **how),
    "LSTM-projection": lambda **how: rnnkit.LSTM(I, H, proj_size=2, **how),
    "GRU": lambda **how: rnnkit.GRU(I, H, bidirectional=True, **how),
    "GRU-before": lambda **how: rnnkit.GRU(I, H, reset_after=False, recompute=True, **how),
}


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [v for part in value for v in flat(part)]


def ragged(lengths: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Values [sum of lengths, I], a leaf; the nested tensor of them; and lengths."""
    values = torch.randn(sum(lengths), I, dtype=dtype).requires_grad_()
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return values, nested_tensor_from_jagged(values, offsets), torch.tensor(lengths)


def padded(values: Tensor, lengths: Tensor) -> Tensor:
    """[B, T, ...] by hand."""
    steps = max(int(lengths.max()), 1)
    rows = [nn.functional.pad(v, (0, 0, 0, steps - len(v))) for v in values.split(lengths.tolist())]
    return torch.stack(rows)


def valid(y: Tensor, lengths: Tensor) -> Tensor:
    """[B, T, N] -> [sum of lengths, N]."""
    return torch.cat([row[:n] for row, n in zip(y, lengths.tolist(), strict=True)])


@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_numbers_and_gradients_are_those_of_lengths(name: str, lengths: list[int], batch_first: bool) -> None:
    module = LAYERS[name](batch_first=batch_first)
    values, nested, counts = ragged(lengths)
    start = [torch.randn_like(v) for v in flat(module(padded(values, counts).transpose(0, int(not batch_first)))[1])]
    hx = tuple(start) if len(start) == 2 else start[0]
    y, state = module(nested, hx)
    assert y.is_nested and y.layout is torch.jagged and y.offsets() is nested.offsets()

    other = LAYERS[name](batch_first=True)
    other.load_state_dict(module.state_dict())
    twin = values.detach().clone().requires_grad_()
    expected, last = other(padded(twin, counts), hx, lengths=counts)
    expected = valid(expected, counts)
    torch.testing.assert_close(y.values(), expected)
    for ours, theirs in zip(flat(state), flat(last), strict=True):
        torch.testing.assert_close(ours, theirs)

    weights = [torch.randn_like(v) for v in (expected, *flat(last))]
    for found, x, m in (([y.values(), *flat(state)], values, module), ([expected, *flat(last)], twin, other)):
        sum((v * w).sum() for v, w in zip(found, weights, strict=True)).backward()
        assert x.grad is not None and all(p.grad is not None for p in m.parameters())
    torch.testing.assert_close(values.grad, twin.grad)
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_output_meets_other_nested_operations() -> None:
    module, head = rnnkit.GRU(I, I, batch_first=True), nn.Linear(I, 2)
    x = nested_tensor([torch.randn(n, I) for n in (3, 5, 1)], layout=torch.jagged, requires_grad=True)
    y, _ = module(x)
    assert (y + x).shape == x.shape
    assert to_padded_tensor(y, 0.0).shape == (3, 5, I)  # as to_padded_tensor(x, 0.0)
    again, _ = module(y)  # a stack of layers
    loss = head(again * x).values().sum() + torch.cat([row.sum(0) for row in y.unbind()]).sum()
    loss.backward()
    assert x.grad.is_nested and torch.isfinite(x.grad.values()).all() and head.weight.grad is not None


def test_resets_states_and_the_functions() -> None:
    module = rnnkit.LSTM(I, H, 2, bidirectional=True, batch_first=True)
    values, nested, counts = ragged([4, 1, 3])
    marks = torch.rand(8) < 0.4
    reset = nested_tensor_from_jagged(marks, nested.offsets().clone())
    to = (torch.randn(4, 3, H), torch.randn(4, 3, H))
    how = {"reset_state": to, "return_all_states": True}
    y, state, every = module(nested, reset=reset, **how)
    dense = padded(marks[:, None].float(), counts).squeeze(-1)
    expected = module(padded(values, counts), lengths=counts, reset=dense, **how)
    torch.testing.assert_close(y.values(), valid(expected[0], counts))
    for ours, theirs in zip(flat((state, every)), flat(expected[1:]), strict=True):
        torch.testing.assert_close(ours, theirs)
    trailing = nested_tensor_from_jagged(marks[:, None].float(), nested.offsets())
    torch.testing.assert_close(module(nested, reset=trailing, **how)[0].values(), y.values())

    weights = module._flat_weights
    got, _ = functional.lstm(nested, None, weights, num_layers=2, bidirectional=True)
    torch.testing.assert_close(got.values(), module(nested)[0].values())


def test_dropout_between_layers_is_drawn_over_the_values() -> None:
    module = rnnkit.GRU(I, 64, 2, dropout=0.5)
    values, nested, counts = ragged([3, 5])
    packed = nn.utils.rnn.pack_padded_sequence(padded(values, counts), counts, batch_first=True, enforce_sorted=False)
    rng = torch.get_rng_state()
    y, _ = module(nested)
    after = torch.get_rng_state()
    torch.set_rng_state(rng)
    module(packed)
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(module(nested)[0].values(), y.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_and_autocast(dtype: torch.dtype) -> None:
    module = rnnkit.LSTM(I, H, batch_first=True)
    values, nested, counts = ragged([2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = module(nested)
        expected, _ = module(padded(values, counts), lengths=counts)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y.values(), valid(expected, counts))
    module.to(dtype)
    values, nested, counts = ragged([2, 3], dtype)
    torch.testing.assert_close(
        module(nested)[0].values(), valid(module(padded(values, counts), lengths=counts)[0], counts)
    )


def test_compile() -> None:
    """One graph, whatever the lengths."""
    module = rnnkit.GRU(I, H, batch_first=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for lengths in ([3, 5, 1], [1, 7, 1], [2, 2, 5]):
        values, nested, _ = ragged(lengths)
        (got, last), (expected, end) = compiled(nested), module(nested)
        torch.testing.assert_close(got.values(), expected.values())
        torch.testing.assert_close(last, end)
        torch.testing.assert_close(
            torch.autograd.grad(got.values().square().sum(), values),
            torch.autograd.grad(expected.values().square().sum(), values),
        )


OUTSIDE = {
    (0, 6, 7): "must go from 0 to 9, the number of its values, got 0 to 7; pass nested_tensor_from_jagged",
    (1, 6, 9): "got 1 to 9",
    (2, 6, 7): "got 2 to 7",
    (0, 6, 12): "got 0 to 12",
    (0,): "got 0 to 0",
    (0, 8, 6, 9): "must not decrease, got a row of -2 steps",
}
"""Offsets that do not hold each of nine values in one row."""


@pytest.mark.parametrize("offsets", OUTSIDE, ids=str)
def test_values_outside_of_every_row_are_refused(offsets: tuple[int, ...]) -> None:
    module = rnnkit.GRU(I, H)
    x = nested_tensor_from_jagged(torch.randn(9, I), torch.tensor(offsets))
    with pytest.raises(ValueError, match=OUTSIDE[offsets]):
        functional.gru(x, None, list(module.parameters()))
    with pytest.raises(Exception) as caught:  # torch's, as for every mistake in its arguments
        module(x)
    words = [str(caught.value), *getattr(caught.value, "__notes__", []), str(caught.value.__cause__)]
    assert any(OUTSIDE[offsets] in text for text in words)


@pytest.mark.parametrize("offsets", [[0, 6, 7], [2, 6, 9], [1, 6, 7]], ids=str)
def test_compiled_no_value_outside_lands_in_a_row(offsets: list[int]) -> None:
    """Compiled code does not look at offsets. What no row holds touches nothing, and zeros stand for it."""
    module = rnnkit.GRU(I, H, batch_first=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    first, last = offsets[0], offsets[-1]
    values = torch.randn(9, I, requires_grad=True)
    twin = values.detach()[first:last].requires_grad_()
    y, state = compiled(nested_tensor_from_jagged(values, torch.tensor(offsets)))
    expected, end = module(nested_tensor_from_jagged(twin, torch.tensor(offsets) - first))
    torch.testing.assert_close(y.values()[first:last], expected.values())
    torch.testing.assert_close(state, end)
    assert not y.values()[:first].any() and not y.values()[last:].any()
    (grad,) = torch.autograd.grad(y.values().sin().sum() + state.sum(), values)
    torch.testing.assert_close(
        grad[first:last], torch.autograd.grad(expected.values().sin().sum() + end.sum(), twin)[0]
    )
    assert not grad[:first].any() and not grad[last:].any()


@pytest.mark.parametrize("count", [7, 9])
def test_a_reset_has_a_value_for_each_of_the_input(count: int) -> None:
    _, nested, _ = ragged([3, 5])
    reset = nested_tensor_from_jagged(torch.zeros(count), nested.offsets())
    with pytest.raises(ValueError, match=rf"reset must have 8 values as the input, got {count}"):
        rnnkit.GRU(I, H)(nested, reset=reset)


def strided() -> Tensor:
    rows = [torch.randn(3, I), torch.randn(5, I)]
    return nested_tensor(rows, layout=torch.strided)


def jagged(*shapes: tuple[int, ...]) -> Tensor:
    return nested_tensor([torch.randn(shape) for shape in shapes], layout=torch.jagged)


def gaps() -> Tensor:
    return torch.nested.narrow(torch.randn(2, 5, I), 1, torch.tensor([0, 1]), torch.tensor([3, 2]), layout=torch.jagged)


REFUSED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "strided": (strided, ["layout torch.jagged", "as_nested_tensor(list(input.unbind()), layout=torch.jagged)"]),
    "two dimensions": (lambda: jagged((3,), (5,)), ["[B, j, I]"]),
    "four dimensions": (lambda: jagged((3, I, 2), (5, I, 2)), ["[B, j, I]"]),
    "ragged elsewhere": (lambda: jagged((3, I), (5, I)).transpose(1, 2), ["[B, j, I]", "second dimension"]),
    "gaps": (gaps, ["no gaps", "input.contiguous()"]),
    "features": (lambda: jagged((3, 2), (5, 2)), ["input_size = 3", "got 2"]),
    "dtype": (lambda: jagged((3, I), (5, I)).double(), ["x is torch.float64 and w_ih torch.float32"]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_layer_refuses(case: str) -> None:
    make, fragments = REFUSED[case]
    module = rnnkit.LSTM(I, H, batch_first=True)
    with pytest.raises((ValueError, TypeError)) as caught:
        functional.lstm(make(), None, list(module.parameters()))
    with pytest.raises((ValueError, TypeError)) as of_module:  # torch's layers take none: their words would not help
        module(make())
    for words in (str(caught.value), str(of_module.value)):
        assert all(fragment in words for fragment in fragments), words


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_ways_out_are_ways() -> None:
    module = rnnkit.GRU(I, H)
    x = strided()
    assert module(torch.nested.as_nested_tensor(list(x.unbind()), layout=torch.jagged))[0].shape[2] == H
    assert module(gaps().contiguous())[0].shape[2] == H
    values, offsets = torch.randn(9, I), torch.tensor([2, 6, 7])
    assert module(nested_tensor_from_jagged(values[offsets[0] : offsets[-1]], offsets - offsets[0]))[0].shape[2] == H


def test_a_mistake_beside_a_nested_input() -> None:
    module = rnnkit.GRU(I, H)
    nested = jagged((3, I), (5, I))
    other = nested_tensor([torch.zeros(5), torch.zeros(3)], layout=torch.jagged)
    with pytest.raises(ValueError, match="lengths must be None with a nested tensor"):
        module(nested, lengths=torch.tensor([3, 5]))
    with pytest.raises(TypeError, match="reset must be nested too"):
        module(nested, reset=torch.zeros(5, 2))
    with pytest.raises(ValueError, match="its offsets differ"):
        module(nested, reset=other)
    with pytest.raises(ValueError, match=r"hx must be \[L·D, B, H\] = \[1, 2, \d+\], got \[1, 3, \d+\]"):
        module(nested, torch.zeros(1, 3, H))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("make", [strided, lambda: jagged((3, I), (5, I)), lambda: jagged((3,), (3,))])
def test_a_cell_refuses(make: Callable[[], Tensor]) -> None:
    cell = rnnkit.LSTMCell(I, H)
    with pytest.raises(TypeError, match="one step of dense rows"):
        functional.lstm_cell(make(), None, list(cell.parameters()))
    with pytest.raises(TypeError, match="one step of dense rows"):
        cell(make())
