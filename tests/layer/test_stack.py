"""A whole call as one C++ function and one node, in the module's layouts (rnnkit/layer/stack.py, csrc/layer/stack.cpp).
It may only ever be quicker: held against the layers one by one, bit by bit, and to be taken for plain calls alone. And
what C code can do wrong by itself: words of errors, references, memory, threads.
"""

from __future__ import annotations

import copy
import io
import itertools
import os
import pickle
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import KINDS, NAMES, B, H, I, Sub, T, Watched, flat, forget, outcome, same, state_of, with_tensor
from support import some
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import rnnkit
from rnnkit import backends, functional
from rnnkit.backends.cpu import extension
from rnnkit.backends.cpu.backend import CPU
from rnnkit.layer import stack

native = extension.native
no_way = extension.reason() or "this torch lacks torch._C._aoti, by which tensors reach C++; torch 2.13 has it"
pytestmark = pytest.mark.skipif(native is None, reason=no_way)
LONG = 40  # steps, more than the engine takes at a time
BOTH = ["stack_forward", "stack_backward"]
every_kind = pytest.mark.parametrize(("name", "options"), KINDS)
every_name = pytest.mark.parametrize("name", NAMES)
layouts = pytest.mark.parametrize("first", [False, True])
training = pytest.mark.parametrize("train", [False, True])


@pytest.fixture(autouse=True)
def went(monkeypatch):
    """Which of the stack's functions gave a result. No choice is remembered from another test."""
    forget(monkeypatch)
    cpu, gave = backends.BY_NAME["cpu"], []

    def noted(name: str, result: Any) -> Any:
        gave.extend([name] * (result is not None))
        return result

    for name, right in [(name, getattr(cpu, name)) for name in BOTH]:
        monkeypatch.setattr(cpu, name, lambda *args, name=name, right=right: noted(name, right(*args)))
    return gave


def each(hx: Any, change: Callable[[Tensor], Any]) -> Any:
    return tuple(map(change, hx)) if isinstance(hx, tuple) else None if hx is None else change(hx)


def case(name: str, first: bool = False, steps: int = T, **options: Any) -> tuple[nn.Module, Tensor, Any]:
    """A stack after a call, an input and a state."""
    layer = getattr(rnnkit, name)(I, H, batch_first=first, backend="cpu", **options)
    x = torch.randn((B, steps, I) if first else (steps, B, I)).to(layer.weight_hh_l0.dtype)
    layer(x)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    state = state_of(name, count, B, H)
    if layer.proj_size:
        state = torch.randn(count, B, layer.proj_size), state[1]
    return layer, x, each(state, lambda v: v.to(x.dtype))


def squares(results: Any) -> Tensor:
    return sum(v.square().sum() for v in results)


def everything(layer: nn.Module, x: Tensor, hx: Any, loss: Callable[..., Tensor] = squares) -> list[Tensor]:
    """Results, and where gradients are on those of x, of hx and of the weights."""
    x, hx = x.detach().requires_grad_(), each(hx, lambda v: v.detach().requires_grad_())
    results = flat(layer(x, hx))
    leaves = [x, *flat(() if hx is None else hx), *layer.parameters()]
    return [*results, *(torch.autograd.grad(loss(results), leaves) if torch.is_grad_enabled() else ())]


def ordinary(call: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "run", lambda *_: None)
        return call()


def both_ways(call: Callable[[], Any], went: list[str], took: list[str]) -> list[Tensor]:
    """What the stack gives. It was taken; layer by layer, also without a crossing, come the same bits."""
    call()
    went.clear()
    short = call()
    assert went == took and same(short, ordinary(call)) and went == took
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "native", None)
        forget(patch)
        patch.setitem(backends.BY_NAME, "cpu", alone := CPU())
        assert not alone.stacks and same(short, call()) and same(short, call()) and went == took
    return short


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@training
@layouts
@every_kind
def test_bitwise_the_ordinary_way_and_strided_as_torch(name, options, first, train, bias, dtype, went):
    layer, x, hx = case(name, first, LONG, bias=bias, dtype=dtype, **options)
    with torch.set_grad_enabled(train):
        for v, state in ((x, hx), (x, None), (x.transpose(0, 1).contiguous().transpose(0, 1), hx)):
            found = both_ways(lambda v=v, h=state: everything(layer, v, h), went, BOTH if train else BOTH[:1])
            if dtype == torch.float64 and "reset_after" not in options:
                theirs = getattr(nn, name)(I, H, batch_first=first, bias=bias, dtype=dtype, **options)
                theirs.load_state_dict(layer.state_dict())
                torch.testing.assert_close(found, truth := everything(theirs, v, state))
                assert [v.stride() for v in found] == [v.stride() for v in truth]


STACKS: dict[str, dict[str, Any]] = {
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "three of both": {"num_layers": 3, "bidirectional": True},
    "dropout": {"num_layers": 3, "dropout": 0.5},
    "dropout of all": {"num_layers": 2, "dropout": 1.0, "bidirectional": True},
    "projection": {"num_layers": 2, "bidirectional": True, "proj_size": 2, "dropout": 0.25},
    "recompute": {"num_layers": 2, "bidirectional": True, "recompute": True},
}
CALLS: dict[str, Callable[..., dict[str, Any]]] = {
    "plain": lambda hx, first: {},
    "lengths": lambda hx, first: {"lengths": torch.tensor([LONG, 7])},
    "resets": lambda hx, first: {"reset": marks(first), "reset_state": hx},
    "all": lambda hx, first: {"lengths": torch.tensor([9, LONG]), "reset": marks(first), "return_all_states": True},
}


def marks(first: bool) -> Tensor:
    found = torch.zeros(LONG, B, dtype=torch.bool)
    found[3, 0] = found[8, 1] = True
    return found.T if first else found


ALL_STACKS = [
    (name, options, shape, call, dtype)
    for (name, options), shape, call in itertools.product(KINDS, STACKS, CALLS)
    for dtype in (torch.float32, torch.bfloat16)
    if name == "LSTM" or "proj_size" not in STACKS[shape]
]


@pytest.mark.parametrize("which", some(ALL_STACKS, 3))
@training
@layouts
def test_a_stack_is_bitwise_its_layers(first, train, which, went):
    name, options, shape, call, dtype = which
    layer, x, hx = case(name, first, LONG, dtype=dtype, **options, **STACKS[shape])

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        leaves = [v.detach().requires_grad_() for v in (x, *flat(hx))]
        state = tuple(leaves[1:]) if name == "LSTM" else leaves[1]
        results = flat(layer(leaves[0], state, **CALLS[call](state, first)))
        drawn = torch.rand(1)  # the generator stands where it stood
        if not train:
            return [*results, drawn]
        return [*results, drawn, *torch.autograd.grad(squares(results), [*leaves, *layer.parameters()])]

    with torch.set_grad_enabled(train):
        both_ways(run, went, BOTH if train else BOTH[:1])


@every_name
def test_frozen_layers_are_neither_kept_nor_computed(name, went, monkeypatch):
    layer, x, _ = case(name, num_layers=3, bidirectional=True)
    whole = dict(zip(dict(layer.named_parameters()), everything(layer, x, None)[-len(list(layer.parameters())) :]))
    for key, p in layer.named_parameters():
        p.requires_grad_("l2" in key)
    y, _ = layer(x)
    tensors = [v for v in y.grad_fn.saved_tensors[7 + len(whole) :]]
    assert sum(v.shape[-1] == 2 * H for v in tensors) == 2, "y, and the input of the last layer"
    found = torch.autograd.grad(squares(flat(layer(x))), [p for p in layer.parameters() if p.requires_grad])
    assert same(found, [whole[key] for key in whole if "l2" in key])


def test_large_stacks_have_a_node_a_layer(went):
    """One node would hold what every layer saved until the last gradient is there."""
    layer = rnnkit.GRU(8, 300, 2, backend="cpu")
    long, short = torch.randn(30, 20, 8), torch.randn(2, 1, 8)
    layer(long)
    assert went == BOTH[:1] * 2
    went.clear()
    layer(short)
    with torch.no_grad():
        layer(long)
    assert went == BOTH[:1] * 2


@every_name
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_node_a_layer_gives_what_one_node_gives(name, bidirectional, went, monkeypatch):
    layer, x, hx = case(name, True, num_layers=3, bidirectional=bidirectional)
    leaves = [x.requires_grad_(), *(v.requires_grad_() for v in flat(hx)), *layer.parameters()]

    def call() -> list[Tensor]:
        went.clear()
        results = flat(layer(x, hx, return_all_states=True, lengths=torch.tensor([T, 2])))
        return [*results, *torch.autograd.grad(squares(results), leaves)]

    whole = call()
    assert went == BOTH
    monkeypatch.setattr(stack, "NODE_BYTES", 0)
    stack._plans.clear()
    assert same(call(), whole) and went == BOTH[:1] * 3 + BOTH[1:] * 3


def minus(v: Tensor) -> Tensor:
    """The same values, kept in memory with their signs turned."""
    kept = torch.complex(torch.zeros_like(v), -v).conj().imag
    assert kept.is_neg() and torch.equal(kept, v)
    return kept


def inside(context: Callable[[], Any], call: Callable[..., Any], *args: Any) -> Any:
    with context():
        return call(*args)


def with_weight(layer: nn.Module, x: Tensor, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return flat(torch.func.functional_call(layer, {"weight_hh_l0": change(layer.weight_hh_l0.detach())}, (x,)))


def given(layer: nn.Module, x: Tensor, hx: Any, change: Callable[[Tensor], Tensor], **how: Any) -> Any:
    leaves = [v.requires_grad_() for v in (x, *flat(hx), *layer.parameters())]
    results = flat(layer(x, hx))
    return torch.autograd.grad(results, leaves, [change(v.detach()) for v in results], **how)


def second(layer: nn.Module, x: Tensor, hx: Any) -> list[Tensor]:
    leaves = [v.requires_grad_() for v in (x, *flat(hx), *layer.parameters())]
    found = torch.autograd.grad(squares(flat(layer(x, hx))), leaves, create_graph=True)
    return [*found, *torch.autograd.grad(squares(found), leaves)]


def of_some(layer: nn.Module, x: Tensor, hx: Any, wanted: list[str]) -> Any:
    """Gradients of some tensors, where the others want none."""
    named = {"x": x, "h_0": flat(hx)[0], "c_0": flat(hx)[-1], **dict(layer.requires_grad_(False).named_parameters())}
    leaves = [named[key].requires_grad_() for key in wanted]
    return torch.autograd.grad(squares(flat(layer(x, hx))), leaves)


def changed(layer: nn.Module, x: Tensor, hx: Any, change: Callable[..., Any], around: Any = torch.enable_grad) -> Any:
    """Gradients, twice, after a change of the output in place, which an LSTM's refuses."""
    leaves = [v.requires_grad_() for v in (x, *flat(hx), *layer.parameters())]
    y, states = layer(x, hx)
    if isinstance(hx, tuple):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(change(y).sum(), x)
        y, states = layer(x, hx)
        y = y.clone()
    change(y)
    loss = squares([y, *flat(states)])
    with around():
        return [v for keep in (True, False) for v in torch.autograd.grad(loss, leaves, retain_graph=keep)]


TURNS: list[Callable[[Tensor], Tensor]] = [
    lambda v: v.transpose(0, 2).contiguous().transpose(0, 2),
    lambda v: v.repeat_interleave(2, 2)[..., ::2],  # gaps
    lambda v: torch.cat([torch.full_like(v, torch.nan), v], 1)[:, v.shape[1] :],  # an offset
    lambda v: v[..., :1].expand(v.shape),
]
LOSSES: list[Callable[..., Tensor]] = [
    lambda y, *_: y.sum(),
    lambda y, *_: squares([y.transpose(0, 1).contiguous()]),
    lambda y, h_n, *_: squares([y.transpose(0, 2).contiguous()]) + h_n.sum(),
    lambda y, h_n, *_: squares([h_n.transpose(1, 2).contiguous()]),
    lambda *results: squares(results[-1:]),  # c_n of an LSTM
]
SOME = ["x", "h_0", "c_0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "x bias_ih_l0 weight_hh_l0"]
USES: dict[str, tuple[list[str], Callable[..., Any]]] = {
    **{f"x {k}": (BOTH, lambda m, x, hx, f=f: everything(m, f(x), each(hx, f))) for k, f in enumerate(TURNS)},
    **{f"loss {k}": (BOTH, lambda *a, f=f: everything(*a, lambda results: f(*results))) for k, f in enumerate(LOSSES)},
    **{f"of {keys}": (BOTH, lambda *a, keys=keys: of_some(*a, keys.split())) for keys in SOME},
    "no rows": (BOTH, lambda m, x, hx: everything(m, x[:0] if m.batch_first else x[:, :0], None)),
    "inference": (BOTH[:1], lambda *a: inside(torch.inference_mode, lambda m, x, hx: flat(m(x, hx)), *a)),
    "hooks": (BOTH, lambda *a: inside(lambda: saved_tensors_hooks(Tensor.clone, Tensor.clone), everything, *a)),
    "second": (BOTH, second),  # the loss holds y, whose derivative the second one takes
    "changed": ([BOTH[0], *BOTH * 2], lambda *a: changed(*a, lambda y: y[0].zero_())),
    "changed, mode": (BOTH[:1], lambda *a: changed(*a, Tensor.zero_, Watched)),
    "batched": (BOTH[:1], lambda *a: given(*a, lambda g: torch.stack([g, 2 * g]), is_grads_batched=True)),
    "minus gradient": (BOTH[:1], lambda *a: given(*a, minus)),
    "gradient of a subclass": (BOTH[:1], lambda *a: given(*a, lambda g: g.as_subclass(Sub))),
    "gradient: none": (BOTH[:1], lambda *a: given(*a, lambda g: torch._efficientzerotensor(g.shape, dtype=g.dtype))),
    "func.grad": ([], lambda m, x, hx: [torch.func.grad(lambda v: squares(flat(m(v, hx))))(x)]),
    "func.vmap": ([], lambda m, x, hx: flat(torch.func.vmap(lambda v: m(v, hx))(torch.stack([x, -x])))),
    "subclass": ([], lambda m, x, hx: everything(m, x.as_subclass(Sub), hx)),
    "weight of a subclass": ([], lambda m, x, hx: with_weight(m, x, lambda w: w.as_subclass(Sub))),
    "minus": ([], lambda m, x, hx: everything(m, minus(x), hx)),
    "minus state": ([], lambda m, x, hx: everything(m, x, each(hx, minus))),
    "minus weight": ([], lambda m, x, hx: with_weight(m, x, minus)),
    "x: none": ([], lambda m, x, hx: flat(m(torch._efficientzerotensor(x.shape, dtype=x.dtype), hx))),
    "mode": ([], lambda *a: inside(Watched, everything, *a)),
    "autocast": ([], lambda *a: inside(lambda: torch.autocast("cpu", torch.bfloat16), everything, *a)),
    "reference": ([], lambda *a: inside(lambda: rnnkit.use_backend("reference"), everything, *a)),
    "record": (BOTH, lambda *a: inside(backends.record, everything, *a)),
}


@pytest.mark.parametrize("use", USES)
@layouts
@every_kind
def test_every_use(name, options, first, use, went):
    layer, x, hx = case(name, first, dtype=torch.float64, **options)
    took, call = USES[use]
    if name == "LSTM" and "changed" in use:  # a call more; nothing is made again
        took = [BOTH[0], BOTH[0], *[BOTH[1]] * took.count(BOTH[1])]
    found = both_ways(lambda: [v.as_subclass(Tensor) for v in call(layer, x.detach(), hx)], went, took)
    with rnnkit.use_backend("reference"):
        truth = [v.as_subclass(Tensor) for v in call(layer, x.detach(), hx)]
    torch.testing.assert_close(found, truth, **({"rtol": 0.05, "atol": 0.05} if use == "autocast" else {}))


@layouts
@every_name
def test_checkpoint_of_the_first_call(name, first):
    """Made again in the backward, the first call is a second one, and must save the same."""
    layer, x, hx = case(name, first)
    for state in (None, hx):
        stack._plans.clear()
        y = torch.utils.checkpoint.checkpoint(layer, x.requires_grad_(), state, use_reentrant=False)[0]
        assert same(torch.autograd.grad(y.sum(), x), torch.autograd.grad(layer(x, state)[0].sum(), x))


# Mistakes say what they say in a first call.

ODD = [lambda v: v[..., :2], lambda v: v[:, :1], lambda v: v[0], lambda v: v[None], lambda v: torch.cat([v, v])]
ODD += [Tensor.double, Tensor.long, Tensor.to_sparse, lambda v: v.to("meta")]
STATES = [lambda h: 7, lambda h: (h,), lambda h: (h, h, h), lambda h: (h, 7), lambda h: [h, h]]
STATES += [lambda h: (h, None), lambda h: (None, h), lambda h: (None, None)]
WEIGHTS = {"a tensor": torch.stack, "once": iter, "None": lambda w: None}
MISTAKES: dict[str, Callable[..., Any]] = {
    "nested": lambda m, x, hx: m(torch.nested.nested_tensor([x[0], x[1]])),
    "no steps": lambda m, x, hx: m(x[:, :0] if m.batch_first else x[:0]),
    **{f"hx {k}": lambda m, x, hx, f=f: m(x, f(flat(hx)[0])) for k, f in enumerate(STATES)},
    **{f"weights {k}": lambda *_, f=f: [with_weights(g) for g in (list, f)] for k, f in WEIGHTS.items()},
    **{f"w {k}": lambda m, x, hx, f=f: with_weight(m, x, f) for k, f in enumerate(ODD)},
    **{f"x {k}": lambda m, x, hx, f=f: m(f(x)) for k, f in enumerate(ODD)},
    **{f"c {k}": lambda m, x, hx, f=f: m(x, (flat(hx)[0], f(flat(hx)[-1]))) for k, f in enumerate(ODD)},
    **{f"h {k}": lambda m, x, hx, f=f: m(x, each(hx, f)) for k, f in enumerate(ODD)},
}


def with_weights(form: Callable[[list[Tensor]], Any]) -> Any:
    return functional.rnn(torch.ones(T, B, H), None, form([torch.eye(H), torch.eye(H)]), backend="cpu")


@pytest.mark.parametrize("which", MISTAKES)
@training
@layouts
@every_name
def test_a_mistake_says_what_the_first_call_says(name, first, train, which, went):
    layer, x, hx = case(name, first)
    stack._plans.clear()
    layer.requires_grad_(train)
    at_first = ordinary(lambda: outcome(lambda: MISTAKES[which](layer, x, hx)))
    layer(x)
    went.clear()
    assert same(outcome(lambda: MISTAKES[which](layer, x, hx)), at_first)


def test_the_functions_say_what_is_wrong():
    counts = {"layer_forward": 17, "layer_backward": 22, "stack_forward": 11, "stack_backward": 11}
    for name, count in {**counts, "bind": 7}.items():
        for wrong in (0, count - 1, count + 1):
            with pytest.raises(TypeError, match=f"^rnnkit: {count} arguments must be given, got {wrong}$"):
                getattr(native, name)(*[None] * wrong)
    x, h, w = torch.randn(T, B, H), torch.randn(B, H), torch.randn(H, H)
    good, operator = (0, x, h, None, w, w, *[None] * 7, False, False, False, 0), torch.ops.rnnkit.cpu_layer_forward
    for at, value in ((0, 9), (0, -1), (0, 3.0), (1, x[0]), (1, x.long()), (1, "x"), (2, h[:1]), (6, w[0]), (13, "no")):
        args = (*good[:at], value, *good[at + 1 :])
        found, truth = (outcome(lambda f=f, a=args: f(*a)) for f in (native.layer_forward, operator.default))
        assert issubclass(found[0], truth[0]) and found[1].splitlines()[0] == truth[1].splitlines()[0]


def test_a_mode_sees_operators():
    cpu = backends.BY_NAME["cpu"]
    with Watched():
        assert cpu._functions() is cpu._operators
    assert cpu._functions() is cpu._direct


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts pages as Linux tells them")
@every_name
def test_memory_stays_flat_and_references_are_given_back(name, went):
    layer, x, hx = case(name, True)
    held, leaf = [x, *flat(hx), *layer.parameters()], x.clone().requires_grad_()

    def after(count: int) -> tuple[int, list[tuple[int, int]]]:
        for _ in range(count):
            with torch.no_grad():
                layer(x, hx)
            torch.autograd.grad(layer(leaf, hx)[0].sum(), leaf)
            for cell in (0, 0.5):  # x is no state, 0.5 no cell
                outcome(lambda cell=cell: native.stack_forward(cell, *with_tensor(1, x[0])[1:]))
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return resident, [(sys.getrefcount(v), v._use_count()) for v in held]

    warm, counts = after(500)
    went.clear()
    grown, same_counts = after(2000)
    assert went == [BOTH[0], *BOTH] * 2000 and same_counts == counts and grown - warm < 400 << 10


@every_kind
def test_many_threads_of_python_at_once(name, options):
    layer, *_ = case(name, True, **options)
    inputs = [torch.randn(3, LONG, I) for _ in range(8)]
    alone = [everything(layer, x, None) for x in inputs]
    with ThreadPoolExecutor(8, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in range(25):
            assert all(map(same, pool.map(lambda x: everything(layer, x, None), inputs), alone))


def test_other_threads_run_while_the_engine_works():
    layer, x = rnnkit.LSTM(8, 128, backend="cpu").requires_grad_(False), torch.randn(3000, 8, 8)
    layer(x)
    with ThreadPoolExecutor() as pool:
        work = pool.submit(layer, x)
        turns = sum(1 for _ in iter(lambda: time.sleep(0.001) or work.done(), True))
    assert turns > 20


@layouts
@every_name
def test_results_are_ordinary_tensors(name, first):
    layer, x, hx = case(name, first)
    for v in map(Tensor.detach, flat(layer(x, hx))):
        torch.save(v, saved := io.BytesIO())
        copies = [torch.load(io.BytesIO(saved.getvalue())), copy.deepcopy(v), pickle.loads(pickle.dumps(v))]
        assert all(torch.equal(v, c) and v.stride() == c.stride() for c in copies)
        assert v.untyped_storage().nbytes() == 4 * v.numel()  # so none shares another's memory
        assert v.resize_(100, 7).shape == (100, 7) and v[0, 0] == copies[0].flatten()[0]
