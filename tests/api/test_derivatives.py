"""Derivatives of `ops.layer`, first and second, reverse and forward mode, against finite differences in float64.

opcheck passes even where no derivative is registered, so what a gradient is worth is decided here: every cell,
direction and way of cutting a sequence, on every backend that can run it.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import rnnkit
from rnnkit import ops
from rnnkit.backends import BACKENDS, BY_NAME, LayerInputs, LayerOptions, describe
from rnnkit.cells import CELLS

T, B, I, H, P = 3, 3, 2, 2, 1
VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {},
    "no_bias": {"unbiased": True},
    "lengths": {"lengths": True},
    "reset": {"reset": True},
    "reset_state": {"reset": True, "reset_state": True},
    "all_states": {"all_states": True},
    "recompute": {"recompute": True},
    "projection": {"projection": True},
    "everything": {"lengths": True, "reset": True, "reset_state": True, "all_states": True},
    "everything_recompute": {"lengths": True, "reset": True, "reset_state": True, "recompute": True},
    "everything_projection": {"lengths": True, "reset": True, "reset_state": True, "projection": True},
}


def make(
    cell: str, variant: str, reverse: bool, dtype: torch.dtype = torch.float64
) -> tuple[LayerInputs, LayerOptions]:
    """A small problem in the form of the layer operator; every floating tensor requires a gradient."""
    asked = VARIANTS[variant]
    g = torch.Generator().manual_seed(sum(map(ord, cell + variant)) + reverse)
    kind = CELLS[cell]
    size = P if asked.get("projection") else H

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    biased = not asked.get("unbiased")
    cut = asked.get("reset", False)
    again = asked.get("reset_state", False)
    t = LayerInputs(
        x=draw(T, B, I),
        h_0=draw(B, size),
        c_0=draw(B, H) if kind.has_c else None,
        w_ih=draw(kind.gates * H, I, scale=0.7),
        w_hh=draw(kind.gates * H, size, scale=0.7),
        b_ih=draw(kind.gates * H, scale=0.5) if biased else None,
        b_hh=draw(kind.gates * H, scale=0.5) if biased else None,
        w_hr=draw(P, H) if asked.get("projection") else None,
        lengths=torch.tensor([2, 0, 3]) if asked.get("lengths") else None,
        reset=torch.tensor([[0, 1, 0], [1, 0, 0], [0, 1, 1]]).bool() if cut else None,
        h_reset=draw(B, size) if again else None,
        c_reset=draw(B, H) if again and kind.has_c else None,
    )
    return t, LayerOptions(reverse, asked.get("all_states", False), asked.get("recompute", False))


def run(cell: str, backend: str, t: LayerInputs, o: LayerOptions) -> tuple[Tensor, ...]:
    """`ops.layer` on the tensors of one problem; only the results that exist."""
    weights = [w for w in (t.w_ih, t.w_hh, t.b_ih, t.b_hh, t.w_hr) if w is not None]
    again: Any = t.h_reset if t.c_reset is None else (t.h_reset, t.c_reset)
    outputs = ops.layer(
        cell,
        t.x,
        t.h_0,
        t.c_0,
        weights,
        lengths=t.lengths,
        reset=t.reset,
        reset_state=again,
        reverse=o.reverse,
        all_states=o.all_states,
        recompute=o.recompute,
        backend=backend,
    )
    return tuple(v for v in outputs if v is not None)


def as_function(cell: str, backend: str, t: LayerInputs, o: LayerOptions) -> tuple[Any, tuple[Tensor, ...]]:
    """The layer as a function of its floating tensors alone, and those."""
    at = [k for k, v in enumerate(t) if v is not None and v.is_floating_point()]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(t)
        for k, v in zip(at, values, strict=True):
            full[k] = v
        return run(cell, backend, LayerInputs(*full), o)

    return function, tuple(t[k] for k in at)


def problems(dtype: torch.dtype = torch.float64) -> list[Any]:
    """Every cell, variant, direction and backend that can run them together."""
    found = []
    for cell in CELLS:
        for variant in VARIANTS:
            if "projection" in variant and cell != "lstm":
                continue
            for reverse in (False, True):
                described = describe(cell, *make(cell, variant, reverse, dtype), train=True)
                for backend in BACKENDS:
                    if not backend.unsupported(described):
                        way = "reverse" if reverse else "forward"
                        name = f"{cell}-{variant}-{way}-{backend.name}"
                        found.append(pytest.param(cell, variant, reverse, backend.name, id=name))
    return found


@pytest.mark.parametrize("cell, variant, reverse, backend", problems())
def test_first_derivatives(cell: str, variant: str, reverse: bool, backend: str) -> None:
    function, inputs = as_function(cell, backend, *make(cell, variant, reverse))
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("cell, variant, reverse, backend", problems())
def test_second_derivatives_and_forward_mode(cell: str, variant: str, reverse: bool, backend: str) -> None:
    function, inputs = as_function(cell, backend, *make(cell, variant, reverse))
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(
        function, inputs, fast_mode=True, check_forward_ad=True, check_backward_ad=False, check_undefined_grad=False
    )


@pytest.mark.parametrize("cell", CELLS)
def test_third_derivative(cell: str) -> None:
    t, o = make(cell, "everything", False)

    def second(x: Tensor) -> Tensor:
        y = run(cell, "auto", t._replace(x=x), o)[0]
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, (t.x,), fast_mode=True)


@pytest.mark.parametrize("backend", [b.name for b in BACKENDS if b.available() is None and b.name != "reference"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_float32_gradients_are_the_references(cell: str, reverse: bool, backend: str) -> None:
    """For backends that do not compute in float64, so that finite differences do not reach them."""
    ran = []
    for variant in VARIANTS:
        if "projection" in variant and cell != "lstm":
            continue
        t, o = make(cell, variant, reverse, torch.float32)
        if BY_NAME[backend].unsupported(describe(cell, t, o, train=True)):
            with pytest.raises(NotImplementedError, match=backend):
                run(cell, backend, t, o)
            continue
        ran.append(variant)
        gradients = []
        for name in (backend, "reference"):
            function, inputs = as_function(cell, name, t, o)
            outputs = function(*inputs)
            scale = [torch.linspace(-1, 1, v.numel()).view(v.shape) for v in outputs]
            gradients.append(torch.autograd.grad(outputs, inputs, scale, allow_unused=True))
        torch.testing.assert_close(*gradients)
    assert ran or CELLS[cell].reset_before or backend == "cpu"


@pytest.mark.parametrize("train", [False, True], ids=["no_grad", "train"])
@pytest.mark.parametrize("cell, variant, reverse, backend", problems())
def test_operators_are_well_formed(cell: str, variant: str, reverse: bool, backend: str, train: bool) -> None:
    t, o = make(cell, variant, reverse)
    leaves = t if train else LayerInputs(*(None if v is None else v.detach() for v in t))
    # The derivative is compared with eager mode's in test_compile; here the schema, shapes, aliasing and autograd keys.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.rnnkit.layer_forward, (cell, backend, *o, *leaves, train), test_utils=checks)
    if train:
        arguments = backward_arguments(cell, backend, t, o)
        torch.library.opcheck(torch.ops.rnnkit.layer_backward, arguments, test_utils=("test_schema", "test_faketensor"))


def backward_arguments(cell: str, backend: str, t: LayerInputs, o: LayerOptions) -> tuple[Any, ...]:
    plain = LayerInputs(*(None if v is None else v.detach() for v in t))
    y, _, c_n, c_all, gates, cells = torch.ops.rnnkit.layer_forward(cell, backend, *o, *plain, True)
    kind = CELLS[cell]
    given = (
        torch.ones_like(y),
        None,
        torch.ones_like(c_n) if kind.has_c else None,
        torch.ones_like(c_all) if kind.has_c and o.all_states else None,
    )
    needs = [v is not None and v.requires_grad for v in t]
    return (cell, backend, *o, *plain, needs, y, gates, cells, *given)


@pytest.mark.parametrize("cell", CELLS)
def test_operators_under_aot_dispatch(cell: str) -> None:
    t, o = make(cell, "everything", False)
    checks = ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(torch.ops.rnnkit.layer_forward, (cell, "reference", *o, *t, True), test_utils=checks)
    arguments = backward_arguments(cell, "reference", t, o)
    torch.library.opcheck(torch.ops.rnnkit.layer_backward, arguments, test_utils=checks)


@pytest.mark.parametrize("cell, variant, reverse, backend", problems())
def test_jvp_is_the_slope(cell: str, variant: str, reverse: bool, backend: str) -> None:
    function, inputs = as_function(cell, backend, *make(cell, variant, reverse))
    inputs = tuple(v.detach() for v in inputs)
    g = torch.Generator().manual_seed(1)
    tangents = tuple(torch.randn(v.shape, generator=g, dtype=v.dtype) for v in inputs)
    value, slope = torch.func.jvp(function, inputs, tangents)
    step = 1e-6
    up = function(*(v + step * d for v, d in zip(inputs, tangents, strict=True)))
    down = function(*(v - step * d for v, d in zip(inputs, tangents, strict=True)))
    for a, b, s in zip(up, down, slope, strict=True):
        torch.testing.assert_close(s, (a - b) / (2 * step), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(value, function(*inputs))


def test_dual_tensors_without_torch_func() -> None:
    t, o = make("lstm", "lengths", True)
    plain = LayerInputs(*(None if v is None else v.detach() for v in t))
    direction = torch.randn(T, B, I, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(plain.x, direction)
        slope = forward_ad.unpack_dual(run("lstm", "auto", plain._replace(x=dual), o)[0]).tangent
    assert slope is not None
    _, expected = torch.func.jvp(lambda x: run("lstm", "auto", plain._replace(x=x), o)[0], (plain.x,), (direction,))
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("cell, variant, reverse, backend", problems())
def test_gradients_go_only_where_they_are_wanted(cell: str, variant: str, reverse: bool, backend: str) -> None:
    t, o = make(cell, variant, reverse)
    function, inputs = as_function(cell, backend, t, o)
    whole = torch.autograd.grad(sum(v.square().sum() for v in function(*inputs)), inputs)
    for k in range(len(inputs)):
        values = tuple(v.detach().clone().requires_grad_(i == k) for i, v in enumerate(inputs))
        outputs = function(*values)
        assert all(v.requires_grad for v in outputs)
        sum(v.square().sum() for v in outputs).backward()
        assert [v.grad is not None for v in values] == [i == k for i in range(len(inputs))]
        torch.testing.assert_close(values[k].grad, whole[k])
    assert not any(v.requires_grad for v in function(*(v.detach() for v in inputs)))
    with torch.no_grad():
        assert not any(v.requires_grad for v in function(*inputs))


@pytest.mark.parametrize("backend", [b.name for b in BACKENDS if b.available() is None])
def test_the_backend_is_asked_only_for_what_is_wanted(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen embedding must not cost the product of its gradient where a backend can leave it out."""
    layer = rnnkit.RNN(3, 4, backend=backend)
    layer.weight_ih_l0.requires_grad_(False)
    seen = []
    way = "stack_backward" if BY_NAME[backend].stacks else "backward"
    genuine = getattr(BY_NAME[backend], way)

    def spy(*args: Any) -> Any:
        seen.append(args[-1] if way == "backward" else (args[1][0], *args[1][1:3], *args[1][7:]))
        return genuine(*args)

    monkeypatch.setattr(BY_NAME[backend], way, spy)
    layer(torch.randn(5, 2, 3))[0].sum().backward()
    assert len(seen) == 1
    needs = LayerInputs(*seen[0])
    wanted = {name for name, need in needs._asdict().items() if need}
    assert wanted == {"w_hh", "b_ih", "b_hh"}


@pytest.mark.parametrize("cell, variant, reverse, backend", problems())
def test_each_result_alone_carries_its_gradient(cell: str, variant: str, reverse: bool, backend: str) -> None:
    """Autograd hands None for the results that a loss did not use; that means zeros."""
    function, inputs = as_function(cell, backend, *make(cell, variant, reverse))
    count = len(function(*inputs))
    parts = []
    for k in range(count):
        found = torch.autograd.grad(function(*inputs)[k].square().sum(), inputs, allow_unused=True)
        parts.append([torch.zeros_like(v) if g is None else g for g, v in zip(found, inputs, strict=True)])
    whole = torch.autograd.grad(sum(v.square().sum() for v in function(*inputs)), inputs)
    for k, gradient in enumerate(whole):
        torch.testing.assert_close(sum(part[k] for part in parts), gradient)


@pytest.mark.parametrize("backend", [b.name for b in BACKENDS if b.available() is None])
@pytest.mark.parametrize("changed", ["x", "w_hh", "h_0", "y"])
def test_change_in_place_before_backward_raises(backend: str, changed: str) -> None:
    cell = "rnn_tanh"
    t, o = make(cell, "plain", False, torch.float32)
    y, _ = run(cell, backend, t, o)
    loss = y.sin().sum()
    with torch.no_grad():
        (y if changed == "y" else getattr(t, changed)).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", [b.name for b in BACKENDS if b.available() is None])
def test_backward_twice(backend: str) -> None:
    layer = rnnkit.GRU(3, 4) if backend != "cpu" else rnnkit.RNN(3, 4)
    layer.backend = backend
    loss = layer(torch.randn(5, 2, 3))[0].square().sum()
    weights = tuple(layer.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    again = torch.autograd.grad(loss, weights)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, weights)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", [rnnkit.RNN, rnnkit.LSTM, rnnkit.GRU])
def test_activation_checkpointing(kind: type, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    layer = kind(3, 4, 2, bidirectional=True, dropout=0.5)
    x = torch.randn(5, 2, 3, requires_grad=True)
    gradients = []
    for wrap in (lambda f, v: f(v), functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        output = wrap(lambda v: layer(v, lengths=torch.tensor([5, 3]))[0], x)
        gradients.append(backward_all(output, x, layer))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def backward_all(output: Tensor, x: Tensor, layer: torch.nn.Module) -> list[Tensor]:
    """Gradients by `.backward()`: reentrant checkpointing refuses `autograd.grad`."""
    leaves = [x, *layer.parameters()]
    for v in leaves:
        v.grad = None
    output.square().sum().backward()
    return [v.grad.clone() for v in leaves if v.grad is not None]


def test_no_gradient_crosses_a_reset() -> None:
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    h_0 = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(6, 2)
    reset[3, 0] = 1
    layer = rnnkit.GRU(3, 4, dtype=torch.float64)
    y, _ = layer(x, h_0, reset=reset)
    dx, dh = torch.autograd.grad(y[3:].sum(), (x, h_0))
    assert dx[:3, 0].eq(0).all() and dh[0, 0].eq(0).all()
    assert dx[3:, 0].ne(0).all() and dx[:, 1].ne(0).all() and dh[0, 1].ne(0).all()


def test_vectorized_jacobian() -> None:
    """`is_grads_batched` runs the backward under vmap."""
    for kind in (rnnkit.RNN, rnnkit.LSTM, rnnkit.GRU):
        layer = kind(2, 3, dtype=torch.float64)
        x = torch.randn(4, 2, 2, dtype=torch.float64)
        for lengths in (None, torch.tensor([4, 2])):
            function = functools.partial(lambda m, n, v: m(v, lengths=n)[0], layer, lengths)
            slow = torch.autograd.functional.jacobian(function, x)
            torch.testing.assert_close(torch.autograd.functional.jacobian(function, x, vectorize=True), slow)
