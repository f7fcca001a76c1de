"""Bad input, case by case: the type of the exception, what its message says, and that nothing was changed.

Where torch.nn knows the mistake too, its own exception is what must come out, so those cases run torch.nn and
compare. The others must say what was got and what was expected.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import rnnkit
from rnnkit import functional, ops

T, B, I, H = 5, 2, 3, 4
x = torch.linspace(-1, 1, T * B * I).view(T, B, I)
state = torch.zeros(1, B, H)
ones = torch.ones(T, B)


def gru(**how: Any) -> nn.Module:
    torch.manual_seed(0)
    return rnnkit.GRU(I, H, **how)


def lstm(**how: Any) -> nn.Module:
    torch.manual_seed(0)
    return rnnkit.LSTM(I, H, **how)


def weights_of(gates: int = 3) -> list[Tensor]:
    return [torch.zeros(gates * H, I), torch.zeros(gates * H, H), torch.zeros(gates * H), torch.zeros(gates * H)]


def projected() -> list[Tensor]:
    """Weights of an LSTM with P = 2."""
    return [torch.zeros(4 * H, I), torch.zeros(4 * H, 2), torch.zeros(2, H)]


def packed(lengths: tuple[int, ...] = (5, 3), features: int = I) -> PackedSequence:
    return pack_padded_sequence(torch.zeros(T, B, features), torch.tensor(lengths))


# What is called, the exception, and fragments that its message must hold.
Case = tuple[str, Callable[[], Any], type[Exception], list[str]]
LENGTHS: list[Case] = [
    ("list", lambda: gru()(x, lengths=[5, 3]), TypeError, ["lengths", "tensor", "got list", "torch.as_tensor"]),
    ("float", lambda: gru()(x, lengths=torch.tensor([5.0, 3.0])), TypeError, ["torch.float32; pass lengths.long()"]),
    (
        "mask",
        lambda: gru()(x, lengths=ones.bool()),
        TypeError,
        ["torch.bool", "mask.sum(0), with batch_first mask.sum(1)"],
    ),
    ("complex", lambda: gru()(x, lengths=torch.zeros(B, dtype=torch.cfloat)), TypeError, ["torch.complex64"]),
    ("count", lambda: gru()(x, lengths=torch.tensor([5, 3, 1])), ValueError, ["[B] = [2]", "got [3]"]),
    (
        "batch first",
        lambda: lstm()(x.transpose(0, 1), lengths=torch.tensor([5, 3])),
        ValueError,
        ["[B] = [5], got [2]", "the input is read as [T, B, I]; batch_first=True reads [B, T, I]"],
    ),
    (
        "time first",
        lambda: lstm(batch_first=True)(x, lengths=torch.tensor([5, 3])),
        ValueError,
        ["[B] = [5], got [2]", "the input is read as [B, T, I]; batch_first=False reads [T, B, I]"],
    ),
    ("rank", lambda: gru()(x, lengths=torch.tensor([[5, 3]])), ValueError, ["[B] = [2]", "got [1, 2]"]),
    ("scalar", lambda: gru()(x, lengths=torch.tensor(5)), ValueError, ["[B] = [2]", "got []"]),
    ("above", lambda: gru()(x, lengths=torch.tensor([5, 57])), ValueError, ["[0, T=5]", "got 57 at row 1"]),
    ("below", lambda: gru()(x, lengths=torch.tensor([-1, 5])), ValueError, ["[0, T=5]", "got -1 at row 0"]),
    ("unbatched", lambda: gru()(x[:, 0], lengths=torch.tensor([5, 5])), ValueError, ["[B] = [1]", "got [2]"]),
    ("packed", lambda: gru()(packed(), lengths=torch.tensor([5, 3])), ValueError, ["lengths", "PackedSequence"]),
    ("sparse", lambda: gru()(x, lengths=torch.tensor([5, 3]).to_sparse()), TypeError, ["dense", "lengths.to_dense()"]),
    ("small", lambda: gru()(x, lengths=torch.tensor([6, 1], dtype=torch.uint8)), ValueError, ["[0, T=5]", "got 6"]),
]
RESETS: list[Case] = [
    ("list", lambda: gru()(x, reset=[0, 1]), TypeError, ["reset", "got list; pass torch.as_tensor(reset)"]),
    ("array", lambda: gru()(x, reset=ones.numpy()), TypeError, ["got ndarray; pass torch.as_tensor(reset)"]),
    (
        "list for ops",
        lambda: ops.layer("gru", x, None, None, weights_of(), reset=[0, 1]),
        TypeError,
        ["got list; pass torch.as_tensor(reset)"],
    ),
    ("value", lambda: gru()(x, reset=ones * 2), ValueError, ["0 and 1", "got 2.0 at step 0, row 0"]),
    ("nan", lambda: gru()(x, reset=ones * torch.nan), ValueError, ["0 and 1", "got nan"]),
    ("integer", lambda: gru()(x, reset=-ones.long()), ValueError, ["0 and 1", "got -1"]),
    ("complex", lambda: gru()(x, reset=ones.cfloat()), TypeError, ["0 and 1", "torch.complex64"]),
    ("sparse", lambda: gru()(x, reset=ones.to_sparse()), TypeError, ["reset must be a dense", "torch.sparse_coo"]),
    ("layout", lambda: gru()(x, reset=ones.T), ValueError, ["[T, B] = [5, 2]", "got [2, 5]"]),
    (
        "batch_first",
        lambda: gru(batch_first=True)(x.transpose(0, 1), reset=ones),
        ValueError,
        ["[B, T] = [2, 5]", "got [5, 2]"],
    ),
    ("unbatched", lambda: gru()(x[:, 0], reset=ones), ValueError, ["[T] = [5]", "got [5, 2]"]),
    ("rank", lambda: gru()(x, reset=ones[..., None, None]), ValueError, ["[T, B] = [5, 2]", "got [5, 2, 1, 1]"]),
    ("tensor for packed", lambda: gru()(packed(), reset=ones), TypeError, ["PackedSequence", "got Tensor"]),
    (
        "packed otherwise",
        lambda: gru()(packed(), reset=packed((4, 4), 1)),
        ValueError,
        ["packed with the input's lengths", "batch_sizes"],
    ),
    (
        "packed in another order",
        lambda: gru()(
            pack_sequence([x[:, 0], x[:3, 0]], enforce_sorted=False),
            reset=pack_sequence([ones[:3, 0], ones[:, 0]], enforce_sorted=False),
        ),
        ValueError,
        ["order of rows", "sorted_indices"],
    ),
    ("packed for tensor", lambda: gru()(x, reset=packed((5, 5), 1)), TypeError, ["reset", "got PackedSequence"]),
]
STATES: list[Case] = [
    ("without reset", lambda: gru()(x, reset_state=state), ValueError, ["reset_state", "needs reset"]),
    ("rows", lambda: gru()(x, reset=ones, reset_state=torch.zeros(1, 3, H)), ValueError, ["reset_state", "[1, 3, 4]"]),
    ("layers", lambda: gru()(x, reset=ones, reset_state=torch.zeros(2, B, H)), ValueError, ["reset_state", "[2, 2,"]),
    ("rank", lambda: gru()(x, reset=ones, reset_state=torch.zeros(B, H)), ValueError, ["reset_state"]),
    ("pair for one", lambda: gru()(x, reset=ones, reset_state=(state, state)), TypeError, ["reset_state", "got tuple"]),
    ("one for a pair", lambda: lstm()(x, reset=ones, reset_state=state), TypeError, ["pair (h, c)", "got Tensor"]),
    ("three", lambda: lstm()(x, reset=ones, reset_state=(state,) * 3), TypeError, ["pair (h, c)", "got 3 items"]),
    ("half", lambda: lstm()(x, reset=ones, reset_state=(None, state)), TypeError, ["reset_state[0]", "got NoneType"]),
    ("c", lambda: lstm()(x, reset=ones, reset_state=(state, state[..., :2])), ValueError, ["reset_state", "[1, 2, 2]"]),
    ("dtype", lambda: gru()(x, reset=ones, reset_state=state.double()), TypeError, ["reset_state", "torch.float64"]),
    ("c's dtype", lambda: lstm()(x, reset=ones, reset_state=(state, state.double())), TypeError, ["torch.float64"]),
    ("number", lambda: gru()(x, reset=ones, reset_state=0.0), TypeError, ["reset_state", "got float"]),
    ("numbers", lambda: lstm()(x, reset=ones, reset_state=(0.0, 0.0)), TypeError, ["reset_state", "got float"]),
]
NAMES: list[Case] = [
    ("layer", lambda: rnnkit.GRU(I, H, backend="cudnn"), ValueError, ["auto, cuda, triton", "got 'cudnn'"]),
    ("cell", lambda: rnnkit.LSTMCell(I, H, backend="CPU"), ValueError, ["backend must be one of", "got 'CPU'"]),
    ("None", lambda: rnnkit.RNN(I, H, backend=None), ValueError, ["backend must be one of", "got None"]),
    ("use_backend", lambda: rnnkit.use_backend("fast"), ValueError, ["backend must be one of", "got 'fast'"]),
    ("functional", lambda: functional.gru(x, None, weights_of(), backend="x"), ValueError, ["got 'x'"]),
    ("ops", lambda: ops.layer("gru", x, None, None, weights_of(), backend="x"), ValueError, ["got 'x'"]),
    ("convert", lambda: rnnkit.convert(nn.GRU(I, H), backend="x"), ValueError, ["got 'x'"]),
    ("cuda", lambda: gru(backend="cuda")(x), NotImplementedError, ["backend 'cuda' cannot run", "can: ", "reference"]),
    ("triton", lambda: lstm(backend="triton")(x), NotImplementedError, ["backend 'triton' cannot run", "lstm", "cpu"]),
    (
        "torch with lengths",
        lambda: gru(backend="torch")(x, lengths=torch.tensor([5, 3])),
        NotImplementedError,
        ["backend 'torch' cannot run", "do not know lengths", "backend='auto'"],
    ),
    (
        "torch with two more",
        lambda: rnnkit.GRU(I, H, reset_after=False, backend="torch")(x, reset=ones),
        NotImplementedError,
        ["do not know reset", "do not know the cell 'gru_reset_before'"],
    ),
]
FUNCTIONS: list[Case] = [
    ("cell", lambda: ops.layer("elman", x, None, None, weights_of()), ValueError, ["rnn_tanh", "lstm", "got 'elman'"]),
    ("x's type", lambda: ops.layer("gru", [1.0], None, None, weights_of()), TypeError, ["x must be", "got list"]),
    (
        "x's layout",
        lambda: ops.layer("gru", x.to_sparse(), None, None, weights_of()),
        TypeError,
        ["dense", "sparse_coo"],
    ),
    (
        "h_0's layout",
        lambda: ops.layer("gru", x, torch.zeros(B, H).to_sparse(), None, weights_of()),
        TypeError,
        ["h_0 must be a dense tensor", "h_0.to_dense()"],
    ),
    ("x's rank", lambda: ops.layer("gru", x[0], None, None, weights_of()), ValueError, ["[T, B, I]", "2 dimensions"]),
    ("x's size", lambda: ops.layer("gru", x[..., :2], None, None, weights_of()), ValueError, ["I = 3", "got 2"]),
    ("x's dtype", lambda: ops.layer("gru", x.long(), None, None, weights_of()), TypeError, ["torch.int64", "float32"]),
    ("dtypes", lambda: ops.layer("gru", x.double(), None, None, weights_of()), TypeError, ["float64", "float32"]),
    ("h_0's size", lambda: ops.layer("gru", x, state, None, weights_of()), ValueError, ["h_0", "[B, H] = [2, 4]"]),
    ("c_0 for gru", lambda: ops.layer("gru", x, None, state[0], weights_of()), ValueError, ["no cell state", "c_0"]),
    ("weights", lambda: ops.layer("gru", x, None, None, weights_of()[:3]), ValueError, ["2 or 4 weights", "got 3"]),
    ("one weight", lambda: ops.layer("lstm", x, None, None, weights_of()[:1]), ValueError, ["weights", "got 1"]),
    ("gates", lambda: ops.layer("lstm", x, None, None, [torch.zeros(9, I)] * 2), ValueError, ["4·H", "[9, 3]"]),
    ("w_hh", lambda: ops.layer("gru", x, None, None, [torch.zeros(12, I)] * 2), ValueError, ["w_hh", "[12, 4]"]),
    (
        "bias",
        lambda: ops.layer("gru", x, None, None, [*weights_of()[:3], torch.zeros(3)]),
        ValueError,
        ["b_hh", "[12]", "got [3]"],
    ),
    ("a number", lambda: ops.layer("gru", x, None, None, [1, 2]), TypeError, ["weight 0", "got int"]),
    ("count", lambda: functional.lstm(x, None, weights_of(4), num_layers=3), ValueError, ["3 layers", "got 4"]),
    ("layers", lambda: functional.gru(x, None, weights_of(), num_layers=0), ValueError, ["num_layers", "got 0"]),
    ("no layers", lambda: functional.gru(x, None, weights_of(), num_layers=-1), ValueError, ["at least 1", "got -1"]),
    ("layers' type", lambda: functional.gru(x, None, weights_of(), num_layers="1"), TypeError, ["integer", "got '1'"]),
    ("no weights", lambda: functional.gru(x, None, None), TypeError, ["list of tensors", "got NoneType"]),
    ("layer's weights", lambda: ops.layer("gru", x, None, None, None), TypeError, ["list of tensors", "got NoneType"]),
    ("cell's weights", lambda: functional.gru_cell(x[0], None, None), TypeError, ["list of tensors", "got NoneType"]),
    ("flat weights", lambda: functional.lstm(x, None, [torch.zeros(4)] * 4), ValueError, ["w_ih [4·H, I]", "got [4]"]),
    ("dropout", lambda: functional.gru(x, None, weights_of(), dropout=-1.0), ValueError, ["[0, 1]", "got -1.0"]),
    ("dropout's type", lambda: functional.gru(x, None, weights_of(), dropout="x"), TypeError, ["number", "got 'x'"]),
    ("projection", lambda: functional.lstm(x, None, projected(), proj_size=3), ValueError, ["w_hr [P, H]", "[2, 4]"]),
    ("proj_size", lambda: functional.lstm(x, None, projected(), proj_size=-1), ValueError, ["proj_size", "got -1"]),
    ("half a pair", lambda: functional.lstm(x, (None, state), weights_of(4)), TypeError, ["hx[0]", "got NoneType"]),
    ("recompute", lambda: functional.gru(x, None, weights_of(), recompute="no"), TypeError, ["recompute", "got 'no'"]),
    ("layer's recompute", lambda: rnnkit.GRU(I, H, recompute=1), TypeError, ["recompute", "True or False", "got 1"]),
    ("reset_after", lambda: rnnkit.GRU(I, H, reset_after="no"), TypeError, ["reset_after", "got 'no'"]),
    ("function's", lambda: functional.gru(x, None, weights_of(), reset_after=0), TypeError, ["reset_after", "got 0"]),
    ("not weights", lambda: functional.gru(x, None, [1, 2, 3, 4]), TypeError, ["weights[0]", "got int"]),
    ("rank", lambda: functional.gru(x[0, 0], None, weights_of()), ValueError, ["2 or 3 dimensions", "got 1"]),
    ("input", lambda: functional.gru("text", None, weights_of()), TypeError, ["input", "got str"]),
    ("hx", lambda: functional.lstm(x, state, weights_of(4)), TypeError, ["hx", "pair (h, c)", "got Tensor"]),
    ("nonlinearity", lambda: functional.rnn(x, None, weights_of(1), nonlinearity="s"), ValueError, ["'relu'", "'s'"]),
    ("cell's", lambda: functional.rnn_cell(x[0], None, weights_of(1), nonlinearity="x"), ValueError, ["'tanh'", "'x'"]),
    ("cell's hx", lambda: functional.lstm_cell(x[0], state[0], weights_of(4)), TypeError, ["hx", "pair (h, c)"]),
    ("cell's rank", lambda: functional.gru_cell(x[0, 0], None, weights_of()), ValueError, ["[B, I]", "got 1"]),
    ("cell's text", lambda: functional.gru_cell("text", None, weights_of()), TypeError, ["a tensor", "got str"]),
    ("convert", lambda: rnnkit.convert([nn.GRU(I, H)]), TypeError, ["rnnkit.convert takes an nn.Module", "got list"]),
    ("convert a class", lambda: rnnkit.convert(nn.GRU), TypeError, ["an nn.Module", "got type"]),
    ("revert", lambda: rnnkit.revert("model"), TypeError, ["rnnkit.revert takes an nn.Module", "got str"]),
    ("revert GRU", lambda: rnnkit.revert(gru(reset_after=False)), ValueError, ["changed nothing", "reset_after=False"]),
    (
        "complex layer",
        lambda: rnnkit.LSTM(I, H, dtype=torch.cfloat)(x.cfloat()),
        TypeError,
        ["complex numbers are not supported", "rnnkit.revert(layer) gives torch's layer"],
    ),
    ("explain", lambda: rnnkit.explain(torch.tanh, x), TypeError, ["rnnkit.explain takes an nn.Module", "got"]),
]
OURS = {
    f"{group}: {case[0]}": case
    for group, cases in dict(
        lengths=LENGTHS, reset=RESETS, reset_state=STATES, backend=NAMES, function=FUNCTIONS
    ).items()
    for case in cases
}


@pytest.mark.parametrize("case", OURS.values(), ids=OURS)
def test_message(case: Case) -> None:
    _, call, kind, fragments = case
    inputs = [v.clone() for v in (x, state, ones)]
    torch.rand(1)
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert isinstance(caught.value, kind) and not isinstance(caught.value, AssertionError)
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, message
    for v, before in zip((x, state, ones), inputs, strict=True):
        assert torch.equal(v, before)


def test_there_are_enough_cases() -> None:
    assert len(OURS) == sum(map(len, (LENGTHS, RESETS, STATES, NAMES, FUNCTIONS))) >= 40


@pytest.mark.parametrize("how", [{"lengths": torch.tensor([9, 9])}, {"reset": ones * 3}, {"reset_state": state}])
def test_a_mistake_changes_nothing(how: dict[str, Tensor]) -> None:
    """Neither parameters, mode, buffers nor random state: a mistake is found before dropout draws."""
    module = rnnkit.GRU(I, H, 2, dropout=0.5)
    before, mode = copy.deepcopy(module.state_dict()), module.training
    keys = set(module.__dict__)
    random = torch.get_rng_state()
    with pytest.raises(ValueError):
        module(x, **how)
    assert torch.equal(torch.get_rng_state(), random)
    assert module.training is mode and set(module.__dict__) == keys
    for name, v in module.state_dict().items():
        assert torch.equal(v, before[name])
    assert all(p.grad is None for p in module.parameters())
    module(x)  # and it works afterwards


def test_a_mistake_in_a_later_layer_is_found_before_the_first_runs() -> None:
    weights = [*weights_of(), *(torch.zeros(12, 4), torch.zeros(12, 4), torch.zeros(12), torch.zeros(5))]
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match="b_hh"):
        functional.gru(x, None, weights, num_layers=2, dropout=0.5, training=True)
    assert torch.equal(torch.get_rng_state(), random)


# Mistakes that torch.nn knows. Each gets the module that `nn` or `rnnkit` makes.
Mistake = Callable[[Any], Any]
MAKING: dict[str, Mistake] = {
    "hidden_size 0": lambda p: p.GRU(I, 0),
    "hidden_size float": lambda p: p.LSTM(I, 4.0),
    "num_layers 0": lambda p: p.RNN(I, H, 0),
    "dropout 2": lambda p: p.GRU(I, H, dropout=2.0),
    "dropout True": lambda p: p.GRU(I, H, 2, dropout=True),
    "dropout text": lambda p: p.GRU(I, H, 2, dropout="x"),
    "batch_first 1": lambda p: p.GRU(I, H, batch_first=1),
    "proj_size for GRU": lambda p: p.GRU(I, H, proj_size=2),
    "proj_size for RNN": lambda p: p.RNN(I, H, proj_size=2),
    "proj_size negative": lambda p: p.LSTM(I, H, proj_size=-1),
    "proj_size too large": lambda p: p.LSTM(I, H, proj_size=H),
    "nonlinearity": lambda p: p.RNN(I, H, nonlinearity="sin"),
    "nothing": lambda p: p.LSTM(),
    "one size": lambda p: p.GRU(I),
    "dtype": lambda p: p.GRU(I, H, dtype=torch.int64),
    "cell: one size": lambda p: p.LSTMCell(I),
    "cell: nonlinearity": lambda p: p.RNNCell(I, H, nonlinearity="sin")(x[0]),
}
CALLING: dict[str, Mistake] = {
    "features": lambda p: p.GRU(I, H)(x[..., :2]),
    "rank 1": lambda p: p.GRU(I, H)(x[0, 0]),
    "rank 4": lambda p: p.LSTM(I, H)(x[None]),
    "dtype": lambda p: p.GRU(I, H)(x.double()),
    "integers": lambda p: p.RNN(I, H)(x.long()),
    "hx rank": lambda p: p.GRU(I, H)(x, state[0]),
    "hx rank unbatched": lambda p: p.GRU(I, H)(x[:, 0], state),
    "hx rows": lambda p: p.GRU(I, H)(x, torch.zeros(1, 3, H)),
    "hx layers": lambda p: p.GRU(I, H)(x, torch.zeros(2, B, H)),
    "hx size": lambda p: p.RNN(I, H)(x, torch.zeros(1, B, 3)),
    "hx dtype": lambda p: p.GRU(I, H)(x, state.double()),
    "LSTM hx rows": lambda p: p.LSTM(I, H)(x, (torch.zeros(1, 3, H), state)),
    "LSTM cx rows": lambda p: p.LSTM(I, H)(x, (state, torch.zeros(1, 3, H))),
    "LSTM hx rank": lambda p: p.LSTM(I, H)(x, (state[0], state[0])),
    "LSTM hx rank unbatched": lambda p: p.LSTM(I, H)(x[:, 0], (state, state)),
    "LSTM projected hx": lambda p: p.LSTM(I, H, proj_size=2)(x, (state, state)),
    "T is 0": lambda p: p.GRU(I, H)(x[:0]),
    "packed features": lambda p: p.GRU(I, H)(packed(features=2)),
    "packed hx": lambda p: p.GRU(I, H)(packed(), torch.zeros(1, 3, H)),
    "missing input": lambda p: p.GRU(I, H)(),
    "cell: features": lambda p: p.LSTMCell(I, H)(x[0, :, :2]),
    "cell: rank 3": lambda p: p.RNNCell(I, H)(x),
    "cell: hx rows": lambda p: p.GRUCell(I, H)(x[0], torch.zeros(3, H)),
    "cell: hx size": lambda p: p.GRUCell(I, H)(x[0], torch.zeros(B, 3)),
    "cell: hx rank": lambda p: p.GRUCell(I, H)(x[0], state[0, 0]),
    "cell: dtype": lambda p: p.GRUCell(I, H)(x[0].double()),
    "cell: LSTM hx": lambda p: p.LSTMCell(I, H)(x[0], (torch.zeros(3, H), torch.zeros(3, H))),
}


def called_with(name: str, value: object) -> Mistake:
    """A call of a layer of which `name` was set after it was made."""

    def call(place: Any) -> Any:
        layer = place.LSTM(I, H, 2)
        setattr(layer, name, value)
        return layer(x)

    return call


CALLING |= {
    "num_layers 3 set": called_with("num_layers", 3),
    "num_layers 0 set": called_with("num_layers", 0),
    "num_layers 1.5 set": called_with("num_layers", 1.5),
    "dropout text set": called_with("dropout", "x"),
    "dropout 2 set": called_with("dropout", 2.0),
}


def raised(call: Mistake, place: Any) -> Exception:
    with pytest.raises(Exception) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        call(place)
    return caught.value


@pytest.mark.parametrize("call", [*MAKING.values(), *CALLING.values()], ids=[*MAKING, *CALLING])
def test_the_exception_is_torchs(call: Mistake) -> None:
    theirs, ours = raised(call, nn), raised(call, rnnkit)
    assert type(ours) is type(theirs)
    assert str(ours) == str(theirs)


# What our check says of such a mistake, wherever torch's words name no argument or no way out.
SENTENCES: dict[str, tuple[Mistake, str]] = {
    "a state that is no pair": (lambda p: p.LSTM(I, H)(x, state), "hx must be a pair (h, c) for lstm, got Tensor"),
    "c of another dtype": (lambda p: p.LSTM(I, H)(x, (state, state.double())), "x is torch.float32 and c_0 torch.fl"),
    "half a pair": (lambda p: p.LSTM(I, H)(x, (state, None)), "hx[1] must be a tensor, got NoneType"),
    "lengths by place": (lambda p: p.GRU(I, H)(x, torch.tensor([5, 3])), "lengths go by keyword: lengths=..."),
    "an LSTM's lengths by place": (lambda p: p.LSTM(I, H)(x, torch.tensor([5, 3])), "keyword: lengths=..."),
    "a pair for one": (lambda p: p.GRU(I, H)(x, (state, state)), "hx must be one tensor for gru, got tuple"),
    "a list": (lambda p: p.RNN(I, H)([1.0]), "input must be a tensor [T, B, I], got list"),
    "batch_first: a list": (
        lambda p: p.RNN(I, H, batch_first=True)([1.0]),
        "input must be a tensor [B, T, I], got list",
    ),
    "a sparse input": (lambda p: p.GRU(I, H)(x.to_sparse()), "x must be a dense tensor"),
    "another device": (lambda p: p.GRU(I, H)(x.to("meta")), "x is on meta and w_ih on cpu; move one of them"),
    "cell: text": (lambda p: p.GRUCell(I, H)("text"), "input must be a tensor [B, I] or [I], got str"),
    "cell: no pair": (lambda p: p.LSTMCell(I, H)(x[0], state[0]), "hx must be a pair (h, c) for lstm, got Tensor"),
    "cell: dtype": (lambda p: p.RNNCell(I, H)(x[0].long()), "x must be of a floating dtype, got torch.int64"),
}


@pytest.mark.parametrize("call, sentence", SENTENCES.values(), ids=SENTENCES)
def test_our_sentence_is_added_to_torchs_exception(call: Mistake, sentence: str) -> None:
    theirs, ours = raised(call, nn), raised(call, rnnkit)
    assert type(ours) is type(theirs) and str(ours) == str(theirs)
    added = getattr(ours, "__notes__", None) or [str(ours.__cause__)]
    assert len(added) == 1 and sentence in added[0]
    assert sentence in "".join(traceback.format_exception(ours))


def replaced(module: nn.Module, name: str, *sizes: int) -> nn.Module:
    setattr(module, name, nn.Parameter(torch.zeros(sizes)))
    return module


NAMED: dict[str, tuple[nn.Module, str]] = {
    "w_hh": (replaced(gru(), "weight_hh_l0", 12, 3), "weight_hh_l0 must be [3·H, H] = [12, 4], got [12, 3]"),
    "of another H": (replaced(gru(), "weight_hh_l0", 6, 2), "weight_hh_l0 must be [3·H, H] = [12, 4], got [6, 2]"),
    "w_ih": (replaced(lstm(), "weight_ih_l0", 16, 5), "weight_ih_l0 must be [4·H, I] = [16, 3], got [16, 5]"),
    "rank": (replaced(lstm(), "weight_ih_l0", 5), "weight_ih_l0 must be [4·H, I] = [16, 3], got [5]"),
    "bias": (replaced(gru(), "bias_hh_l0", 5), "bias_hh_l0 must be [3·H] = [12], got [5]"),
    "second layer": (
        replaced(lstm(num_layers=2, bidirectional=True), "weight_ih_l1_reverse", 16, 3),
        "weight_ih_l1_reverse must be [4·H, D·H] = [16, 8], got [16, 3]",
    ),
    "w_hr": (replaced(lstm(proj_size=2), "weight_hr_l0", 3, 4), "weight_hr_l0 must be [P, H] = [2, 4], got [3, 4]"),
    "cell": (replaced(rnnkit.GRUCell(I, H), "weight_hh", 12, 3), "weight_hh must be [3·H, H] = [12, 4], got [12, 3]"),
}


@pytest.mark.parametrize("module, sentence", NAMED.values(), ids=NAMED)
def test_a_parameter_that_does_not_fit_is_named(module: nn.Module, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # not torch's: its oneDNN reads beyond the end of what is too small
        module(x if isinstance(module, nn.RNNBase) else x[0])
    assert str(caught.value) == sentence


@pytest.mark.parametrize("listed", [False, True])
def test_a_parameter_that_is_missing_is_named(listed: bool) -> None:
    layer, cell = gru(), rnnkit.GRUCell(I, H)
    if listed:
        assert layer._flat_weights
    layer.weight_hh_l0 = None
    with pytest.raises(TypeError, match=r"weight_hh_l0 must be a tensor \[3·H, H\], got NoneType"):
        layer(x)
    del layer.weight_hh_l0, cell.weight_hh
    with pytest.raises((AttributeError, TypeError), match="weight_hh_l0"):
        layer(x)
    with pytest.raises(AttributeError, match="'GRUCell' object has no attribute 'weight_hh'"):  # torch's
        cell(x[0])


@pytest.mark.parametrize("call", [call for name, call in CALLING.items() if name != "missing input"])
def test_every_mistake_in_a_call_has_our_sentence(call: Mistake) -> None:
    error = raised(call, rnnkit)
    assert getattr(error, "__notes__", None) or error.__cause__ is not None


@pytest.mark.parametrize("module, input", [(rnnkit.GRU(I, H), x[..., :2]), (rnnkit.GRUCell(I, H), x[0, :, :2])])
def test_our_sentence_is_the_cause_on_an_older_python(
    monkeypatch: pytest.MonkeyPatch, module: nn.Module, input: Tensor
) -> None:
    class Older(RuntimeError):
        """As Python 3.10 has them: an exception without notes."""

        add_note = None

    def twin(self: nn.Module, weights: Any) -> Any:
        def forward(*_: Any) -> None:
            raise Older("torch's words")

        return SimpleNamespace(forward=forward)

    monkeypatch.setattr(type(module), "_torch_twin", twin)
    with pytest.raises(Older, match="torch's words") as caught:
        module(input)
    assert isinstance(caught.value.__cause__, ValueError) and "= 3 features" in str(caught.value.__cause__)
    assert not hasattr(caught.value, "__notes__")


def test_the_warning_is_torchs() -> None:
    """Dropout on a single layer does nothing, and torch says so."""
    texts = []
    for place in (nn, rnnkit):
        with pytest.warns(UserWarning) as caught:
            place.GRU(I, H, dropout=0.5)
        texts.append([str(w.message) for w in caught])
    assert texts[0] == texts[1]


def test_devices_that_differ() -> None:
    with pytest.raises(RuntimeError):
        rnnkit.GRU(I, H)(x.to("meta"))
    with pytest.raises(RuntimeError, match=r"^lengths is on meta, input on cpu; move one$"):
        gru()(x, lengths=torch.tensor([5, 3], device="meta"))
    with pytest.raises(RuntimeError, match=r"^reset is on meta, input on cpu; move one$"):
        gru()(x, reset=ones.to("meta"))
    with pytest.raises(RuntimeError, match="x is on cpu and h_0 on meta"):
        ops.layer("gru", x, torch.zeros(B, H, device="meta"), None, weights_of())
