"""torch.func over layers and cells, each result against a plain Python loop or torch.nn's.

These paths run the reference's formulas whatever backend is named, so each test holds for every backend's name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, stack_module_state, vjp, vmap

import rnnkit
from rnnkit.backends import BACKENDS

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "RNN": lambda **how: rnnkit.RNN(3, 4, **how),
    "RNN-relu": lambda **how: rnnkit.RNN(3, 4, nonlinearity="relu", **how),
    "LSTM": lambda **how: rnnkit.LSTM(3, 4, **how),
    "LSTM-projection": lambda **how: rnnkit.LSTM(3, 4, proj_size=2, **how),
    "LSTM-deep": lambda **how: rnnkit.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True, **how),
    "GRU": lambda **how: rnnkit.GRU(3, 4, **how),
    "GRU-before": lambda **how: rnnkit.GRU(3, 4, reset_after=False, **how),
}
CELLS: dict[str, Callable[..., nn.Module]] = {
    "RNNCell": lambda **how: rnnkit.RNNCell(3, 4, **how),
    "LSTMCell": lambda **how: rnnkit.LSTMCell(3, 4, **how),
    "GRUCell": lambda **how: rnnkit.GRUCell(3, 4, **how),
    "GRUCell-before": lambda **how: rnnkit.GRUCell(3, 4, reset_after=False, **how),
}
T, B, N = 4, 2, 3  # N: how many copies vmap runs over
over_layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
over_all = pytest.mark.parametrize("make", [*LAYERS.values(), *CELLS.values()], ids=[*LAYERS, *CELLS])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [v for part in value for v in flat(part)]


def close(a: Any, b: Any) -> None:
    for u, v in zip(flat(a), flat(b), strict=True):
        torch.testing.assert_close(u, v)


def stacked(results: list[Any]) -> list[Tensor]:
    return [torch.stack(parts) for parts in zip(*map(flat, results), strict=True)]


def inputs_of(module: nn.Module, *lead: int) -> Tensor:
    shape = (B, 3) if isinstance(module, nn.RNNCellBase) else (B, T, 3) if module.batch_first else (T, B, 3)
    return torch.randn(*lead, *shape, dtype=torch.float64)


def states_of(module: nn.Module, *lead: int) -> Any:
    """States for `lead` copies, of the form and size that the module returns."""
    result = module(inputs_of(module))
    last = result if isinstance(module, nn.RNNCellBase) else result[1]
    if isinstance(last, tuple):
        return tuple(torch.randn(*lead, *v.shape, dtype=torch.float64) for v in last)
    return torch.randn(*lead, *last.shape, dtype=torch.float64)


def at(state: Any, k: int) -> Any:
    return tuple(v[k] for v in state) if isinstance(state, tuple) else state[k]


@over_all
def test_vmap_over_inputs_and_states(make: Callable[..., nn.Module]) -> None:
    module = make(dtype=torch.float64)
    xs, states = inputs_of(module, N), states_of(module, N)
    close(vmap(module)(xs), stacked([module(x) for x in xs]))
    close(vmap(module)(xs, states), stacked([module(xs[k], at(states, k)) for k in range(N)]))
    close(vmap(module, in_dims=(None, 0))(xs[0], states), stacked([module(xs[0], at(states, k)) for k in range(N)]))
    close(vmap(module, in_dims=1)(xs.movedim(0, 1)), stacked([module(x) for x in xs]))
    close(vmap(module, chunk_size=2)(xs), stacked([module(x) for x in xs]))


@over_all
def test_vmap_within_vmap(make: Callable[..., nn.Module]) -> None:
    module = make(dtype=torch.float64)
    xs = inputs_of(module, 2, N)
    close(vmap(vmap(module))(xs), [v.unflatten(0, (2, N)) for v in stacked([module(x) for x in xs.flatten(0, 1)])])


@over_all
def test_vmap_over_an_ensemble(make: Callable[..., nn.Module]) -> None:
    models = [make(dtype=torch.float64) for _ in range(N)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    x = inputs_of(models[0])

    def one(p: Any, b: Any, v: Tensor) -> Any:
        return functional_call(base, (p, b), (v,))

    close(vmap(one, in_dims=(0, 0, None))(parameters, buffers, x), stacked([m(x) for m in models]))
    xs = inputs_of(models[0], N)
    close(vmap(one)(parameters, buffers, xs), stacked([m(v) for m, v in zip(models, xs, strict=True)]))


@over_layers
@pytest.mark.parametrize("recompute", [False, True])
def test_vmap_over_lengths_and_resets(make: Callable[..., nn.Module], recompute: bool) -> None:
    module = make(dtype=torch.float64, recompute=recompute)
    x, again = inputs_of(module), states_of(module)
    lengths = torch.tensor([[4, 0], [2, 3], [1, 4]])
    resets = torch.rand(N, *x.shape[:2]) < 0.4

    def run(n: Tensor | None, r: Tensor | None) -> Any:
        how = {} if r is None else {"reset_state": again}
        return module(x, lengths=n, reset=r, return_all_states=True, **how)

    close(vmap(run, in_dims=(0, None))(lengths, None), stacked([run(n, None) for n in lengths]))
    close(vmap(run, in_dims=(None, 0))(None, resets), stacked([run(None, r) for r in resets]))
    close(vmap(run)(lengths, resets.double()), stacked([run(n, r) for n, r in zip(lengths, resets, strict=True)]))


def test_lengths_are_clamped_under_vmap() -> None:
    """Their values cannot be looked at there, as the docstring says."""
    module = rnnkit.GRU(3, 4)
    x = torch.randn(T, B, 3)
    got = vmap(lambda n: module(x, lengths=n)[0])(torch.tensor([[9, -1]]))
    close(got[0], module(x, lengths=torch.tensor([T, 0]))[0])


@over_all
def test_per_sample_gradients(make: Callable[..., nn.Module]) -> None:
    module = make(dtype=torch.float64)
    weights = {k: v.detach() for k, v in module.named_parameters()}
    xs = inputs_of(module, N)

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return sum(v.square().sum() for v in flat(functional_call(module, p, (x,))))

    each = vmap(grad(loss), in_dims=(None, 0))(weights, xs)
    for k, x in enumerate(xs):
        expected = torch.autograd.grad(loss(dict(module.named_parameters()), x), tuple(module.parameters()))
        for name, g in zip(weights, expected, strict=True):
            torch.testing.assert_close(each[name][k], g)


def test_per_sample_gradients_of_rows_of_different_length() -> None:
    """What differential privacy asks for: one gradient for each row of a ragged batch."""
    module = rnnkit.LSTM(3, 4, bidirectional=True, dtype=torch.float64)
    weights = {k: v.detach() for k, v in module.named_parameters()}
    xs, lengths = torch.randn(N, T, 3, dtype=torch.float64), torch.tensor([4, 1, 2])

    def loss(p: dict[str, Tensor], x: Tensor, n: Tensor) -> Tensor:
        return functional_call(module, p, (x,), {"lengths": n})[0].square().sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))(weights, xs, lengths)
    for k in range(N):
        short = module(xs[k, : lengths[k]])[0].square().sum()
        for name, g in zip(weights, torch.autograd.grad(short, tuple(module.parameters())), strict=True):
            torch.testing.assert_close(each[name][k], g)


@over_all
def test_jacobians(make: Callable[..., nn.Module]) -> None:
    module = make(dtype=torch.float64)
    x = inputs_of(module)

    def first(v: Tensor) -> Tensor:
        return flat(module(v))[0]

    expected = torch.autograd.functional.jacobian(first, x)
    close(jacrev(first)(x), expected)
    close(jacfwd(first)(x), expected)
    value, pull = vjp(first, x)
    close(pull(torch.ones_like(value))[0], expected.sum(tuple(range(value.dim()))))


@over_all
def test_hessian(make: Callable[..., nn.Module]) -> None:
    module = make(dtype=torch.float64)
    x = inputs_of(module)

    def loss(v: Tensor) -> Tensor:
        return sum(part.square().sum() for part in flat(module(v)))

    expected = torch.autograd.functional.hessian(loss, x)
    close(hessian(loss)(x), expected)
    close(jacrev(jacrev(loss))(x), expected)
    square = expected.reshape(x.numel(), x.numel())
    close(square, square.T)


@over_all
def test_torch_func_grad_is_autograds(make: Callable[..., nn.Module]) -> None:
    module = make(dtype=torch.float64)
    x = inputs_of(module)

    def loss(p: dict[str, Tensor]) -> Tensor:
        return sum(v.square().sum() for v in flat(functional_call(module, p, (x,))))

    found = grad(loss)({k: v.detach() for k, v in module.named_parameters()})
    close(list(found.values()), torch.autograd.grad(loss(dict(module.named_parameters())), tuple(module.parameters())))


@over_all
def test_functional_call(make: Callable[..., nn.Module]) -> None:
    module, other = make(), make()
    x = inputs_of(module).float()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    close(functional_call(module, dict(other.named_parameters()), (x,)), other(x))
    close(list(before.values()), list(module.state_dict().values()))
    only = {
        "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight_hh_l0": next(
            v for k, v in other.named_parameters() if k.startswith("weight_hh")
        )
    }
    mixed = copy.deepcopy(module)
    mixed.load_state_dict(only, strict=False)
    close(functional_call(module, only, (x,)), mixed(x))
    leaves = {k: v.detach().requires_grad_() for k, v in other.named_parameters()}
    sum(v.sum() for v in flat(functional_call(module, leaves, (x,)))).backward()
    assert all(v.grad is not None for v in leaves.values()) and all(p.grad is None for p in module.parameters())


@over_all
@pytest.mark.parametrize("backend", ["auto", *(b.name for b in BACKENDS if b.available() is None)])
def test_inference_mode(make: Callable[..., nn.Module], backend: str) -> None:
    module = make()
    x = inputs_of(module).float()
    try:
        with rnnkit.use_backend(backend):
            expected = module(x)
    except NotImplementedError:
        with rnnkit.use_backend(backend), torch.inference_mode(), pytest.raises(NotImplementedError, match=backend):
            module(x)
        return
    with rnnkit.use_backend(backend), torch.inference_mode():
        got = module(x)
    assert all(v.is_inference() and not v.requires_grad for v in flat(got))
    close(got, [v.detach() for v in flat(expected)])


@pytest.mark.parametrize("backend", [b.name for b in BACKENDS if b.available() is None])
def test_a_named_backend_under_a_transform(backend: str) -> None:
    """It runs the reference's formulas: that is the contract, so a named backend is no hindrance."""
    module = rnnkit.RNN(3, 4, backend=backend)
    xs = torch.randn(N, T, B, 3)
    close(vmap(module)(xs), stacked([module(x) for x in xs]))
    x = xs[0].clone().requires_grad_()
    expected = torch.autograd.grad(module(x)[0].square().sum(), x)[0]
    close(grad(lambda v: module(v)[0].square().sum())(xs[0]), expected)


def test_dropout_under_vmap() -> None:
    module = rnnkit.LSTM(3, 40, num_layers=2, dropout=0.5)
    x = torch.randn(T, B, 3)
    xs = x.expand(N, T, B, 3).clone()
    same = vmap(lambda v: module(v)[0], randomness="same")(xs)
    different = vmap(lambda v: module(v)[0], randomness="different")(xs)
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda v: module(v)[0])(xs)


def test_autocast_under_vmap_is_autocast_alone() -> None:
    for kind in (rnnkit.RNN, rnnkit.LSTM, rnnkit.GRU):
        module = kind(3, 4)
        xs = torch.randn(N, T, B, 3)
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = vmap(module)(xs), stacked([module(x) for x in xs])
        for u, v in zip(flat(got), expected, strict=True):
            assert u.dtype == v.dtype
            torch.testing.assert_close(u, v, rtol=2**-7, atol=2**-7)  # one bfloat16 ulp at 1
