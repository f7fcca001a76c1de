"""`heads=n` of LSTM, GRU and RNN: the layer of one head whose W_hh is the block-diagonal matrix. torch has no such."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rnnkit
from rnnkit.backends.cpu import extension

T, B, I, H, N = 5, 3, 4, 6, 3
F64 = torch.float64
BACKENDS = ["reference", *["cpu"] * extension.available()]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "GRU-before": ("GRU", {"reset_after": False}),
    "RNN-tanh": ("RNN", {}),
    "RNN-relu": ("RNN", {"nonlinearity": "relu"}),
}
kinds = pytest.mark.parametrize("kind", KINDS)
backends = pytest.mark.parametrize("backend", BACKENDS)


def make(kind: str, place: Any = rnnkit, hidden: int = H, **how: Any) -> Any:
    name, fixed = KINDS[kind]
    return getattr(place, name)(I, hidden, **fixed, **how)


def expanded(w: Tensor, heads: int) -> Tensor:
    """[G·H, H/n] -> [G·H, H]: unit j of a gate sees the units of its own head, and elsewhere there are zeros."""
    each = H // heads
    rows = []
    for row, v in enumerate(w):
        k = row % H // each
        rows.append(torch.cat([v.new_zeros(k * each), v, v.new_zeros(H - (k + 1) * each)]))
    return torch.stack(rows)


def flat(v: Any) -> list[Tensor]:
    if isinstance(v, PackedSequence):
        return [v.data]
    return [v] if isinstance(v, Tensor) else [u for each in v for u in flat(each)]


def outcome(run: Callable[[], Any], wanted: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Results, then gradients of `wanted` for a loss that reads all of them."""
    torch.manual_seed(seed)
    results = flat(run())
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(v.shape, generator=g, dtype=F64).to(v.dtype) for v in results]
    loss = sum((v * w).sum() for v, w in zip(results, weights, strict=True))
    return [*(v.detach() for v in results), *torch.autograd.grad(loss, wanted)]


def compare(layer: Any, whole: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The layer with heads against `whole`, one of one head, run with the expanded weights of the former."""
    inputs = flat([args, [u for u in kwargs.values() if not isinstance(u, bool)]])
    given = [v.requires_grad_() for v in inputs if v.dtype == F64]
    wanted = [*given, *layer.parameters()]

    def run() -> Any:
        values = {k: expanded(v, layer.heads) if "weight_hh" in k else v for k, v in layer.named_parameters()}
        return torch.func.functional_call(whole, values, args, kwargs)

    expected = outcome(run, wanted)
    got = outcome(lambda: layer(*args, **kwargs), wanted)
    assert len(got) == len(expected) > len(wanted)
    for u, v in zip(got, expected, strict=True):
        torch.testing.assert_close(u, v, rtol=1e-10, atol=1e-10)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def states(kind: str, *shape: int) -> Any:
    return (drawn(*shape), drawn(*shape)) if kind == "LSTM" else drawn(*shape)


# How a layer is made, and what it is called with beside the states [2, B, H].
SHAPES: dict[str, tuple[dict[str, Any], Callable[[str], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "plain": ({}, lambda k: ((drawn(T, B, I), states(k, 1, B, H)), {})),
    "no hx, no bias": ({"bias": False}, lambda k: ((drawn(T, B, I),), {})),
    "stack": (
        {"num_layers": 2, "bidirectional": True, "dropout": 0.4},
        lambda k: ((drawn(T, B, I), states(k, 4, B, H)), {}),
    ),
    "batch first": (
        {"batch_first": True, "bidirectional": True},
        lambda k: ((drawn(B, T, I), states(k, 2, B, H)), {"return_all_states": True}),
    ),
    "unbatched": ({}, lambda k: ((drawn(T, I), states(k, 1, H)), {"return_all_states": True})),
    "packed": (
        {"bidirectional": True},
        lambda k: ((pack_sequence([drawn(n, I) for n in (2, 5, 3)], enforce_sorted=False), states(k, 2, B, H)), {}),
    ),
    "lengths": (
        {"bidirectional": True},
        lambda k: ((drawn(T, B, I), states(k, 2, B, H)), {"lengths": torch.tensor([5, 0, 3])}),
    ),
    "resets": (
        {"bidirectional": True, "recompute": True},
        lambda k: (
            (drawn(T, B, I), states(k, 2, B, H)),
            {
                "reset": torch.tensor([[0, 0, 1], [1, 0, 0], [0, 0, 0], [1, 0, 1], [0, 0, 0]]),
                "reset_state": states(k, 2, B, H),
                "lengths": torch.tensor([5, 2, 4]),
                "return_all_states": True,
            },
        ),
    ),
}


@kinds
@backends
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_block_diagonal_layer(kind: str, backend: str, shape: str) -> None:
    torch.manual_seed(3)
    how, given = SHAPES[shape]
    layer = make(kind, **how, heads=N, backend=backend, dtype=F64)
    args, kwargs = given(kind)
    compare(layer, make(kind, **how, backend="reference", dtype=F64), *args, **kwargs)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "GRU-before"])
@backends
@pytest.mark.parametrize("heads", [2, 3, 6])
def test_it_is_torchs_layer_with_the_block_diagonal_weight(kind: str, backend: str, heads: int) -> None:
    torch.manual_seed(heads)
    how = {"num_layers": 2, "bidirectional": True, "dtype": F64}
    layer, whole = make(kind, **how, heads=heads, backend=backend), make(kind, nn, **how)
    compare(layer, whole, drawn(T, B, I), states(kind, 4, B, H))


@kinds
@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_types(kind: str, backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layer = make(kind, heads=2, backend=backend, dtype=dtype, bidirectional=True)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(T, B, I).to(dtype)
    found = outcome(lambda: layer(x), list(layer.parameters()))
    assert {v.dtype for v in found} == {dtype}
    wanted = outcome(lambda: exact(x.double()), list(exact.parameters()))
    size = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close([v.double() for v in found], wanted, rtol=size, atol=size)


@kinds
def test_traced_compiled_exported(kind: str) -> None:
    layer, x = make(kind, heads=2, num_layers=2, hidden=8), torch.randn(T, B, I)  # a size that no test has used before
    traced = torch.jit.trace(layer, (x,))
    expected = flat(layer(x))
    twin = pickle.loads(pickle.dumps(layer))
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for run in (traced, compiled, torch.export.export(layer, (x,)).module()):
        torch.testing.assert_close(flat(run(x)), expected)


def test_a_first_call_inside_of_export_leaves_no_trace() -> None:
    """The step is tried and its program checked then, and none of that stands in the graph, which loads again."""
    layer, x, file = lstm(heads=2, hidden_size=10), torch.randn(T, B, I), io.BytesIO()
    program = torch.export.export(layer, (x,))
    assert not [n for n in program.graph.nodes if str(n.target).startswith("wrap_with")]
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(flat(torch.export.load(file).module()(x)), flat(layer(x)))


@kinds
def test_second_derivatives_and_forward_mode(kind: str) -> None:
    layer = make(kind, heads=2, dtype=F64)
    x = drawn(2, 1, I).requires_grad_()
    parameters = [v.detach().requires_grad_() for v in layer.parameters()]

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(dict(layer.named_parameters()), values, strict=True))
        return tuple(flat(torch.func.functional_call(layer, named, (x,))))

    if kind == "RNN-relu":
        with torch.no_grad():
            x.mul_(3)  # away from the kink
    torch.autograd.gradcheck(run, (x, *parameters), check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(run, (x, *parameters), fast_mode=True)


@kinds
def test_parameters(kind: str) -> None:
    """Names as torch's, one recurrent parameter each, in ±1/√H, from the generator alone, as `reset_parameters`."""
    how = {"num_layers": 2, "bidirectional": True}
    torch.manual_seed(0)
    layer = make(kind, **how, heads=2)
    whole = make(kind, **how)
    assert list(layer.state_dict()) == list(whole.state_dict())
    gates = layer.weight_ih_l0.shape[0]
    for name, v in layer.named_parameters():
        assert v.shape == ((gates, H // 2) if "weight_hh" in name else whole.state_dict()[name].shape)
        assert 0.3 < v.abs().max() * H**0.5 <= 1
    drawn_first = [v.clone() for v in layer.parameters()]
    torch.manual_seed(0)
    layer.reset_parameters()
    assert all(torch.equal(u, v) for u, v in zip(layer.parameters(), drawn_first, strict=True))
    assert [w for each in layer.all_weights for w in each] == list(layer.parameters())
    assert make(kind, heads=2, dtype=F64).weight_hh_l0.dtype == F64
    assert make(kind, heads=2, device="meta").weight_hh_l0.is_meta
    with pytest.raises(RuntimeError, match="size mismatch for weight_hh_l0"):
        layer.load_state_dict(whole.state_dict())


@kinds
def test_one_head_is_the_layer_as_it_was(kind: str) -> None:
    torch.manual_seed(0)
    one = make(kind, heads=1)
    torch.manual_seed(0)
    none = make(kind)
    assert repr(one) == repr(none) and "heads" not in one.__dict__ and one.heads == 1
    assert all(torch.equal(u, v) for u, v in zip(one.parameters(), none.parameters(), strict=True))


@kinds
def test_printed_copied_moved(kind: str) -> None:
    layer = make(kind, heads=3)
    assert ", heads=3" in repr(layer)
    x = torch.randn(T, B, I)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert repr(twin) == repr(layer) and torch.equal(twin(x)[0], layer(x)[0])
    fresh = make(kind, heads=3)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh.double()(x.double())[0], layer(x)[0].double(), rtol=1e-5, atol=1e-5)
    empty = make(kind, heads=3, device="meta").to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x)[0], layer(x)[0])
    skipped = nn.utils.skip_init(type(layer), I, H, **KINDS[kind][1], heads=3)
    assert skipped.weight_hh_l0.shape[1] == H // 3


@kinds
def test_weights_that_programs_write(kind: str) -> None:
    layer, x = make(kind, heads=2), torch.randn(T, B, I)
    before = layer(x)[0]
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight_hh_l0.mul_(2)
    items = layer._flat_weights
    assert [id(v) for v in items] == [id(v) for v in layer.parameters()]
    items[1] = layer.weight_hh_l0.detach() * 2
    assert torch.equal(layer(x)[0], other(x)[0]) and not torch.equal(layer(x)[0], before)
    layer.flatten_parameters()
    nn.utils.parametrizations.weight_norm(other, "weight_hh_l0")
    torch.testing.assert_close(other(x)[0], layer(x)[0])


@kinds
def test_autocast(kind: str) -> None:
    """As any custom cell: everything in autocast's dtype."""
    layer, x = make(kind, heads=2), torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        found = flat(layer(x))
    assert {v.dtype for v in found} == {torch.bfloat16}
    torch.testing.assert_close([v.float() for v in found], flat(layer(x)), rtol=3e-2, atol=3e-2)
    found[0].sum().backward()
    assert all(v.grad.dtype == torch.float32 for v in layer.parameters())


@kinds
def test_explain_takes_it(kind: str) -> None:
    assert str(rnnkit.explain(make(kind, heads=2), torch.randn(T, B, I)))


def test_a_step_of_training_with_the_reset_gate_before() -> None:
    """Both biases have the same gradient there: they are summed."""
    layer = rnnkit.GRU(I, H, reset_after=False, heads=2, dtype=F64)
    layer(drawn(T, B, I))[0].square().sum().backward()
    assert torch.equal(layer.bias_ih_l0.grad, layer.bias_hh_l0.grad) and layer.bias_ih_l0.grad.any()


# What it refuses.


def lstm(hidden_size: int = H, **how: Any) -> Any:
    return rnnkit.LSTM(I, hidden_size, **how)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no divisor": (lambda: lstm(heads=4), ValueError, r"hidden_size = 6 must be a multiple of heads = 4"),
    "none": (lambda: lstm(heads=0), ValueError, r"heads must be at least 1, got 0"),
    "a float": (lambda: lstm(heads=2.0), TypeError, r"heads must be an integer, got 2\.0"),
    "a bool": (lambda: lstm(heads=True), TypeError, r"heads must be an integer, got True"),
    "projection": (lambda: lstm(heads=2, proj_size=2), ValueError, r"heads=2 .* with a projection, got proj_size=2"),
    "torch": (lambda: lstm(heads=2, backend="torch"), NotImplementedError, r"heads=2 .* backend 'torch' cannot"),
    "cuda": (lambda: lstm(heads=2, backend="cuda"), NotImplementedError, r"heads=2 .* backend 'cuda' cannot"),
    "unknown": (lambda: lstm(heads=2, backend="gpu"), ValueError, r"backend must be one of .*; got 'gpu'"),
    "revert": (lambda: rnnkit.revert(lstm(heads=2)), ValueError, r"torch has no LSTM with heads=2"),
    "revert both": (
        lambda: rnnkit.revert(rnnkit.GRU(I, H, heads=2, reset_after=False)),
        ValueError,
        r"torch has no GRU with reset_after=False and heads=2",
    ),
    "script": (lambda: torch.jit.script(lstm(heads=2)), NotImplementedError, r"LSTM\(heads=2\) is not one"),
    "gates": (
        lambda: rnnkit.diagnostics.gates(nn.Sequential(lstm(heads=2)), torch.zeros(T, B, I)),
        NotImplementedError,
        r"^0: .*heads=2",
    ),
    "a cell": (lambda: rnnkit.LSTMCell(I, H, heads=2), TypeError, r"unexpected keyword argument 'heads'"),
    "sizes are torch's to say": (lambda: rnnkit.LSTM(0, H, heads=2), ValueError, r"input_size must be greater than"),
    "hx": (lambda: lstm(heads=2)(torch.zeros(T, B, I), torch.zeros(1, B, H)), TypeError, r"hx must be \(h, c\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    mistake, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        mistake()


def test_a_backend_that_is_asked_for_later() -> None:
    layer, x = lstm(heads=2), torch.zeros(T, B, I)
    with rnnkit.use_backend("torch"), pytest.raises(NotImplementedError, match="backend 'torch' cannot run LSTM"):
        layer(x)
    layer.backend = "cuda"
    with pytest.raises(NotImplementedError, match="backend 'cuda' cannot run LSTM"):
        layer(x)


@kinds
def test_a_weight_of_a_wrong_shape(kind: str) -> None:
    layer, x = make(kind, heads=2), torch.zeros(T, B, I)
    gates = layer.weight_hh_l0.shape[0]
    layer.weight_hh_l0 = nn.Parameter(torch.zeros(gates, H))
    with pytest.raises(
        ValueError, match=rf"weight_hh_l0 must be \[G·H, H/heads\] = \[{gates}, 3\], got \[{gates}, 6\]"
    ):
        layer(x)
    layer.weight_hh_l0 = None
    with pytest.raises(TypeError, match=r"weight_hh_l0 must be a tensor"):
        layer(x)


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_is_refused_by_name(dynamo: bool) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match=r"ONNX has no LSTM with heads=2"), torch.no_grad():
        torch.onnx.export(lstm(heads=2), (torch.zeros(T, B, I),), io.BytesIO(), dynamo=dynamo, verbose=False)


def test_what_becomes_of_torchs_layers() -> None:
    """A converted layer has one head; a program whose torch.nn is ours may ask for more."""
    model = nn.Sequential(nn.LSTM(I, H), lstm(heads=2))
    weights = [v for v in model.parameters()]
    rnnkit.convert(model)
    assert model[0].heads == 1 and model[1].heads == 2
    assert all(u is v for u, v in zip(model.parameters(), weights, strict=True))
    with rnnkit.patch_torch():
        assert nn.LSTM(I, H).heads == 1 and nn.LSTM(I, H, heads=2).weight_hh_l0.shape[1] == H // 2


def test_a_subclass_that_fills_its_weights() -> None:
    class Orthogonal(rnnkit.LSTM):
        def reset_parameters(self) -> None:
            super().reset_parameters()
            for name, v in self.named_parameters():
                if "weight_hh" in name:
                    nn.init.orthogonal_(v)

    w = Orthogonal(I, H, heads=2).weight_hh_l0
    torch.testing.assert_close(w.T @ w, torch.eye(H // 2))


@backends
def test_recompute_keeps_less(backend: str) -> None:
    def kept(recompute: bool) -> int:
        sizes: list[int] = []
        layer = lstm(heads=2, recompute=recompute, backend=backend)
        lengths = torch.full((B,), T)  # the reference lets torch keep what it likes without
        with torch.autograd.graph.saved_tensors_hooks(lambda v: sizes.append(v.numel()) or v, lambda v: v):
            layer(torch.randn(T, B, I), lengths=lengths)
        return sum(sizes)

    assert kept(True) < kept(False)
