"""Every transform of the contract over a custom layer: derivatives of higher order, forward mode, vmap, torch.func,
torch.compile and torch.export, whatever backend runs it.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from custom_layers import F64, LSTM, Everything, per_steps
from torch import Tensor
from torch.func import functional_call

import rnnkit

MASKS: dict[str, dict[str, Tensor]] = {
    "plain": {},
    "masked": {"lengths": torch.tensor([2, 3]), "reset": torch.tensor([[0, 0], [1, 0], [0, 1]], dtype=torch.bool)},
}
BACKENDS = ("reference", "auto")


def problem(masks: str, backend: str, **how: Any) -> tuple[rnnkit.Custom, Any, list[Tensor]]:
    """A layer, and a function of tensors with everything that has a derivative: x, gap, states, parameters."""
    torch.manual_seed(11)
    layer = rnnkit.Custom(Everything, 2, 4, dtype=F64, backend=backend, **how)
    inputs = per_steps(Everything, 3, 2, 4)
    keep, gap = inputs["keep"], inputs["gap"]
    states = [torch.rand(1, 2, 4, dtype=F64, requires_grad=True) for _ in range(4 if MASKS[masks] else 2)]
    parameters = dict(layer.named_parameters())

    def function(x: Tensor, gap: Tensor, h: Tensor, m: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        more = {"reset_state": rest[:2]} if MASKS[masks] else {}
        own = dict(zip(parameters, rest[-len(parameters) :]))
        given = {"keep": keep, "gap": gap, "return_all_states": True, **MASKS[masks], **more}
        y, last, every = functional_call(layer, own, (x, (h, m)), given)
        return y, *last, *every

    x = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)
    return layer, function, [x, gap, *states, *parameters.values()]


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_second_and_batched_derivatives(backend: str, masks: str) -> None:
    _, function, given = problem(masks, backend)
    fast = {"fast_mode": True, "check_batched_grad": False}
    assert torch.autograd.gradcheck(function, given, **fast)
    assert torch.autograd.gradgradcheck(function, given, **fast)
    found = function(*given)
    weights = [torch.randn(3, *v.shape, dtype=F64) for v in found]
    batched = torch.autograd.grad(found, given, weights, is_grads_batched=True)
    for k in range(3):
        single = torch.autograd.grad(function(*given), given, [w[k] for w in weights])
        torch.testing.assert_close([g[k] for g in batched], list(single))


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode(backend: str, masks: str) -> None:
    _, function, given = problem(masks, backend)
    tangents = [torch.randn_like(v) for v in given]
    with fwd.dual_level():
        outputs = function(*(fwd.make_dual(v.detach(), d) for v, d in zip(given, tangents)))
        forwards = [fwd.unpack_dual(v).tangent for v in outputs]
    weights = [torch.randn_like(v) for v in forwards]
    gradients = torch.autograd.grad(function(*given), given, weights)
    ours = sum((f * w).sum() for f, w in zip(forwards, weights))
    torch.testing.assert_close(ours, sum((g * d).sum() for g, d in zip(gradients, tangents)))


@pytest.mark.parametrize("masks", MASKS)
def test_torch_func(masks: str) -> None:
    _, function, given = problem(masks, "auto")
    given = [v.detach() for v in given]

    def of_x(x: Tensor, w: Tensor) -> Tensor:
        return function(x, *given[1:-3], w, *given[-2:])[0].sin().sum()

    x, w = given[0], given[-3]
    live = x.clone().requires_grad_()
    wanted = torch.autograd.grad(of_x(live, w), live)[0]
    torch.testing.assert_close(torch.func.grad(of_x)(x, w), wanted)
    xs = torch.stack([x, 2 * x, -x])
    each = torch.func.vmap(torch.func.grad(of_x), (0, None))(xs, w)  # gradients of each sample
    torch.testing.assert_close(each[0], wanted)
    torch.testing.assert_close(torch.func.vmap(of_x, (None, 0))(x, torch.stack([w, w / 2]))[0], of_x(x, w))
    f = functools.partial(of_x, w=w)
    torch.testing.assert_close(torch.func.jacfwd(f)(x), wanted)
    torch.testing.assert_close(torch.func.hessian(f)(x).isfinite().all(), torch.tensor(True))


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_is_one_operator(backend: str, masks: str) -> None:
    _, function, given = problem(masks, backend)
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    weights = [torch.randn_like(v) for v in function(*given)]
    found, wanted = compiled(*given), function(*given)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(v, given, weights) for v in (found, wanted)]
    torch.testing.assert_close(*gradients)
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if "rnnkit" in str(node.target)]
    assert called == ["rnnkit.custom_forward.default", "rnnkit.custom_backward.default"]
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), wanted)


def both(a: Tensor, h: Tensor, m: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Two states that are one tensor, made with two parameters that may be one."""
    h = torch.tanh(a * p + h) * q
    return h, h


Twice = type("Twice", (rnnkit.Cell,), {"gates": 1, "states": ("h", "m"), "step": staticmethod(both),
                                       "p": rnnkit.per_unit(), "q": rnnkit.per_unit()})  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_twice(backend: str) -> None:
    layer, x = rnnkit.Custom(Twice, 3, 4, dtype=F64, backend=backend), torch.randn(6, 2, 3, dtype=F64)
    layer.q_l0 = layer.p_l0
    lengths = torch.tensor([6, 6])
    y, states = layer(x, lengths=lengths)
    wanted = torch.autograd.grad(y.sin().sum(), layer.p_l0)[0]
    y, _ = layer(x, lengths=lengths)
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), layer.p_l0, create_graph=True)[0], wanted)
    with Watch() as watch:
        torch.testing.assert_close(layer(x)[1], states)
    ((args, found),) = watch.calls  # an operator may not give one tensor twice, nor what it was given
    given, results = ([v.data_ptr() for v in some] for some in (args[-1], found))
    assert len(set(results)) == len(results) and not set(results) & set(given)


def test_nan_in_a_row_without_steps() -> None:
    """Autograd of the formulas, which torch.func takes, does not see it either."""
    layer, x = rnnkit.Custom(LSTM, 3, 4, dtype=F64), torch.randn(5, 2, 3, dtype=F64)
    hx = torch.tensor([[[1.0] * 4, [torch.nan] * 4]], dtype=F64)
    own = {name: v.detach() for name, v in layer.named_parameters()}

    def total(own: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, own, (x, (hx, hx)), {"lengths": torch.tensor([5, 0])})[0].sum()

    assert all(bool(g.isfinite().all()) for g in torch.func.grad(total)(own).values())


def test_compiled_for_any_length() -> None:
    layer = rnnkit.Custom(LSTM, 3, 4)
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps, rows in ((6, 2), (9, 4), (5, 7)):  # no size is another one's
        x = torch.randn(steps, rows, 3)
        torch.testing.assert_close(compiled(x), layer(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_compiled_within_use_backend() -> None:
    layer, x = rnnkit.Custom(LSTM, 3, 4), torch.randn(3, 2, 3)
    targets: list[Any] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(n.args[1] for n in graph.graph.nodes if "custom_forward" in str(n.target))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=look)
    with rnnkit.use_backend("reference"):
        compiled(x)
    compiled(x)
    assert targets[0] == "reference" and len(targets) == 2


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """What the forward operator is given and gives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.rnnkit.custom_forward.default:
            self.calls.append((args, found))
        return found


def test_the_operators_pass_torchs_own_checks() -> None:
    _, function, given = problem("masked", "auto")
    with Watch() as watch:
        function(*given)
    ((args, _),) = watch.calls
    *how, tensors = args
    again = (*how, [v.detach().clone() for v in tensors])
    torch.library.opcheck(torch.ops.rnnkit.custom_forward, again, test_utils=("test_schema", "test_faketensor"))


def test_export() -> None:
    layer, _, given = problem("plain", "auto")
    x, inputs = given[0].detach(), {k: v.detach() for k, v in per_steps(Everything, 3, 2, 4).items()}
    program = torch.export.export(layer, (x,), inputs)
    assert [str(n.target) for n in program.graph.nodes].count("rnnkit.custom_forward.default") == 1
    torch.testing.assert_close(program.module()(x, **inputs), layer(x, **inputs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_without_an_operator() -> None:
    layer, x = rnnkit.Custom(LSTM, 3, 4), torch.randn(3, 2, 3)
    traced = torch.jit.trace(layer, x)
    assert "rnnkit::" not in str(traced.graph)
    torch.testing.assert_close(traced(2 * x), layer(2 * x))


def test_inference_mode_and_meta() -> None:
    layer, x = rnnkit.Custom(LSTM, 3, 4), torch.randn(3, 2, 3)
    with torch.inference_mode():
        y, (h, _) = layer(x)
        h.detach_()
        torch.testing.assert_close(y, layer(x)[0])
    y, (h, c) = rnnkit.Custom(LSTM, 3, 4, device="meta")(torch.randn(3, 2, 3, device="meta"))
    assert y.is_meta and y.shape == (3, 2, 4) and h.shape == c.shape == (1, 2, 4)
