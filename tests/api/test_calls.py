"""What a call does to the world: memory of inputs, gradients and who gets them, graphs kept and recomputed, modes and
layouts of memory, dropout, empty batches. On every backend that can run the problem.

torch.nn in the same dtype is the answer, float64 wherever the backend can. How accurate the numbers are is the
business of test_parity; here two results are the same or they are not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import flat, ours
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import rnnkit
from rnnkit.backends import BACKENDS

T, B, I, H = 4, 3, 3, 5
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "rnn_tanh": (nn.RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTM, {}),
    "lstm-proj": (nn.LSTM, {"proj_size": 2}),
    "gru": (nn.GRU, {}),
    "RNNCell": (nn.RNNCell, {}),
    "LSTMCell": (nn.LSTMCell, {}),
    "GRUCell": (nn.GRUCell, {}),
}
kinds = pytest.mark.parametrize("kind", KINDS)
layers = pytest.mark.parametrize("kind", [k for k in KINDS if "Cell" not in k])
ROUNDINGS = 256
"""What two orders of the same few sums of numbers near 1 may differ by, in units of the dtype's resolution."""


def twins(kind: str, *dtypes: torch.dtype, **extra: Any) -> Iterator[tuple[nn.Module, nn.Module]]:
    """torch.nn's module, and ours on one backend after the other, in the first of `dtypes` that it can compute in."""
    cls, kwargs = KINDS[kind]
    for backend in BACKENDS:
        for dtype in dtypes or (torch.float64, torch.float32):
            torch.manual_seed(5)
            theirs = cls(I, H, **kwargs, **extra).to(dtype)
            mine = ours(theirs, backend=backend.name)
            try:
                mine(*arguments(kind, mine))
            except NotImplementedError as reason:  # this backend cannot, and says so
                assert backend.name in str(reason)
            else:
                yield theirs, mine
                break


def arguments(kind: str, module: nn.Module) -> tuple[Tensor, Any]:
    """input and hx in the module's dtype, without gradients."""
    generator = torch.Generator().manual_seed(9)
    dtype = next(module.parameters()).dtype
    lead, state = ((B,), (B,)) if "Cell" in kind else ((T, B), (1, B))
    if isinstance(module, nn.RNNBase):
        state = (module.num_layers * (2 if module.bidirectional else 1), B)
    sizes = [2 if "proj" in kind else H] + ([H] if "lstm" in kind.lower() else [])
    shapes = [(*lead, I), *((*state, n) for n in sizes)]
    x, *hx = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, tuple(hx) if len(hx) == 2 else hx[0]


def parts(hx: Any) -> list[Tensor]:
    return list(hx) if isinstance(hx, tuple) else [hx]


def loss(outputs: Any) -> Tensor:
    """Every output with weights of its own."""
    terms = [(torch.linspace(1, 2, v.numel(), dtype=v.dtype).view_as(v) * v.sin()).sum() for v in flat(outputs)]
    return sum(terms[1:], terms[0])


def all_close(a: Any, b: Any) -> None:
    for u, v in zip(a, b, strict=True):
        assert (u is None) == (v is None)
        if u is not None:
            off = ROUNDINGS * torch.finfo(v.dtype).eps
            torch.testing.assert_close(u, v, rtol=off, atol=off)


# Inputs: unchanged, and in any memory.


@kinds
def test_arguments_are_unchanged(kind: str) -> None:
    for _, mine in twins(kind):
        x, hx = arguments(kind, mine)
        every = [x, *parts(hx), *mine.parameters()]
        before = [(v.detach().clone(), v._version) for v in every]
        loss(mine(x.requires_grad_(), hx)).backward()
        assert all(torch.equal(v, old) and v._version == n for v, (old, n) in zip(every, before, strict=True))
        assert all(p.grad is not None for p in mine.parameters())


@kinds
def test_outputs_are_memory_of_their_own(kind: str) -> None:
    """Writing to a result changes no argument, no weight, and no second result."""
    for _, mine in twins(kind):
        x, hx = arguments(kind, mine)
        kept = [v.clone() for v in (x, *parts(hx), *mine.parameters())]
        with torch.no_grad():
            expected = flat(mine(x, hx))
            for v in flat(mine(x, hx)):
                v.fill_(9)
            assert all(torch.equal(u, v) for u, v in zip(flat(mine(x, hx)), expected, strict=True))
        assert all(torch.equal(u, v) for u, v in zip(kept, (x, *parts(hx), *mine.parameters()), strict=True))


def spread(v: Tensor) -> Tensor:
    """The same values with holes between them."""
    return torch.stack([v, v + 1], -1)[..., 0]


def turned(v: Tensor) -> Tensor:
    """The same values, last dimension slowest."""
    return v.movedim(-1, 0).contiguous().movedim(0, -1)


def repeated(v: Tensor) -> Tensor:
    """The first row (or step) for all, in the memory of one."""
    return v[:1].expand_as(v)


def windows(v: Tensor) -> Tensor:
    """Rows that overlap in memory."""
    flat = v.flatten()
    return flat.as_strided(v.shape, (1,) * v.dim()) if flat.numel() > sum(v.shape) else v


def from_offset(v: Tensor) -> Tensor:
    """Memory that does not start at its storage's start, nor at a multiple of 64 bytes."""
    return torch.cat([v.new_zeros(1), v.flatten()])[1:].view(v.shape)


@kinds
@pytest.mark.parametrize("change", [spread, turned, repeated, windows, from_offset])
def test_any_memory(kind: str, change: Callable[[Tensor], Tensor]) -> None:
    """Strided, expanded, overlapping inputs, states and weights give what contiguous copies of them give."""
    for _, mine in twins(kind):
        x, hx = arguments(kind, mine)
        views = [change(v).detach().requires_grad_() for v in (x, *parts(hx))]
        copies = [v.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for v in views]
        results = []
        for leaves in (copies, views):
            state = tuple(leaves[1:]) if len(leaves) == 3 else leaves[1]
            outputs = mine(leaves[0], state)
            results.append([*flat(outputs), *torch.autograd.grad(loss(outputs), [*leaves, *mine.parameters()])])
        all_close(*results)
        for p in mine.parameters():
            p.data = change(p.data)
        outputs = mine(*arguments(kind, mine))
        for p in mine.parameters():
            p.data = p.data.contiguous().clone()
        all_close(flat(outputs), flat(mine(*arguments(kind, mine))))


# Gradients: who gets them, and when.


@kinds
def test_only_what_requires_a_gradient_gets_one(kind: str) -> None:
    for theirs, mine in twins(kind):
        names = [n for n, _ in mine.named_parameters()]
        for chosen in (["x"], ["hx"], [names[0]], [names[1]], [names[-1], "x"], names, []):
            results = []
            for module in (theirs, mine):
                x, hx = arguments(kind, mine)
                x.requires_grad_("x" in chosen)
                for v in parts(hx):
                    v.requires_grad_("hx" in chosen)
                for n, p in module.named_parameters():
                    p.requires_grad_(n in chosen).grad = None
                total = loss(module(x, hx))
                assert total.requires_grad == bool(chosen)
                if chosen:
                    total.backward()
                results.append([v.grad for v in (x, *parts(hx), *module.parameters())])
            all_close(*results)


@kinds
@pytest.mark.parametrize("change", ["eval", "train"])
def test_backward_in_both_modes(kind: str, change: str) -> None:
    for theirs, mine in twins(kind):
        grads = []
        for module in (theirs.train(), mine.train(change == "train")):
            x, hx = arguments(kind, mine)
            grads.append(torch.autograd.grad(loss(module(x.requires_grad_(), hx)), [x, *module.parameters()]))
        all_close(*grads)


@kinds
def test_a_graph_kept_and_freed(kind: str) -> None:
    for _, mine in twins(kind):
        x, hx = arguments(kind, mine)
        total = loss(mine(x.requires_grad_(), hx))
        wanted = [x, *mine.parameters()]
        first = torch.autograd.grad(total, wanted, retain_graph=True)
        second = torch.autograd.grad(total, wanted, retain_graph=True)
        third = torch.autograd.grad(total, wanted)
        assert all(torch.equal(u, v) and torch.equal(u, w) for u, v, w in zip(first, second, third, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(total, wanted)


@kinds
def test_two_calls_and_a_chain(kind: str) -> None:
    """The same module twice in one graph, the second call fed with the first one's states."""
    for theirs, mine in twins(kind):
        grads = []
        for module in (theirs, mine):
            x, hx = arguments(kind, mine)
            first = module(x, hx)
            state = first if "Cell" in kind else first[1]
            total = loss(module(2 * x, state)) + loss(first)
            grads.append(torch.autograd.grad(total, list(module.parameters())))
        all_close(*grads)


@kinds
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(kind: str, reentrant: bool) -> None:
    for _, mine in twins(kind):
        results = []
        for through in (False, True):
            x, hx = arguments(kind, mine)
            x.requires_grad_()
            state = [v.requires_grad_() for v in parts(hx)]

            def call(x: Tensor, *state: Tensor, mine: nn.Module = mine) -> tuple[Tensor, ...]:
                return tuple(flat(mine(x, state if len(state) == 2 else state[0])))

            outputs = checkpoint(call, x, *state, use_reentrant=reentrant) if through else call(x, *state)
            mine.zero_grad()
            loss(outputs).backward()
            results.append([*outputs, x.grad, *(v.grad for v in state), *(p.grad for p in mine.parameters())])
        all_close(*results)


@kinds
def test_changed_in_place_before_backward(kind: str) -> None:
    """As for torch's layers: an error from autograd, or the gradient of what was computed."""
    for _, mine in twins(kind):
        x, hx = arguments(kind, mine)
        count = 1 + len(parts(hx)) + len(list(mine.parameters()))
        outputs = len(flat(mine(x, hx)))
        whole = None
        for changed in range(-1, count + outputs):
            x, hx = arguments(kind, mine)
            leaves = [v.requires_grad_() for v in (x, *parts(hx))]
            inner = [1 * v for v in leaves]
            result = flat(mine(inner[0], tuple(inner[1:]) if len(inner) == 3 else inner[1]))
            total = loss([1 * v for v in result])
            with torch.no_grad():
                if changed >= 0:
                    [*inner, *mine.parameters(), *result][changed].add_(0.5)
            try:
                found = torch.autograd.grad(total, [*leaves, *mine.parameters()])
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                assert changed >= 0
            else:
                whole = found if whole is None else whole
                all_close(found, whole)
            with torch.no_grad():  # put the weights back
                if len(inner) <= changed < count:
                    list(mine.parameters())[changed - len(inner)].sub_(0.5)


@layers
def test_an_output_changed_in_the_graph(kind: str) -> None:
    """y.mul_(2) is part of the graph: its gradient counts it, or autograd refuses."""
    for _, mine in twins(kind):
        x, hx = arguments(kind, mine)
        expected = torch.autograd.grad((2 * mine(x, hx)[0]).sum(), list(mine.parameters()))
        try:
            found = torch.autograd.grad(mine(x, hx)[0].mul_(2).sum(), list(mine.parameters()))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            all_close(found, expected)


# Modes.


@kinds
def test_no_grad_and_inference_mode(kind: str) -> None:
    for _, mine in twins(kind):
        x, hx = arguments(kind, mine)
        expected = [v.detach() for v in flat(mine(x, hx))]
        with torch.no_grad():
            plain = flat(mine(x, hx))
        with torch.inference_mode():
            inferred = flat(mine(*arguments(kind, mine)))
        assert not any(v.requires_grad for v in plain) and all(v.is_inference() for v in inferred)
        all_close(plain, expected)
        all_close([v.clone() for v in inferred], expected)


@kinds
def test_without_deterministic_algorithms(kind: str) -> None:
    """The other tests run in deterministic mode; it changes no number."""
    for _, mine in twins(kind):
        expected = [v.detach() for v in flat(mine(*arguments(kind, mine)))]
        torch.use_deterministic_algorithms(False)
        assert all(torch.equal(u, v) for u, v in zip(flat(mine(*arguments(kind, mine))), expected, strict=True))
        torch.use_deterministic_algorithms(True)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta(kind: str, dtype: torch.dtype) -> None:
    for _, mine in twins(kind, dtype):
        x, hx = arguments(kind, mine)
        expected = flat(mine(x, hx))
        state = tuple(v.to("meta") for v in parts(hx))
        try:
            got = flat(mine.to("meta")(x.to("meta"), state if len(state) == 2 else state[0]))
        except NotImplementedError as reason:  # kernels are made for their own device
            assert "got meta" in str(reason)
            continue
        assert [(v.shape, v.dtype, v.device.type) for v in got] == [(v.shape, v.dtype, "meta") for v in expected]


# Structure: dropout, empty batches.


@layers
def test_dropout_draws_torchs_masks(kind: str) -> None:
    for bidirectional, form in itertools.product((False, True), ("time", "batch_first", "packed", "unbatched")):
        extra = {"num_layers": 3, "dropout": 0.4, "bidirectional": bidirectional, "batch_first": form == "batch_first"}
        for theirs, mine in twins(kind, **extra) if form != "batch_first" else _batch_first(kind, extra):
            x, _ = arguments(kind, mine)
            shaped = {"batch_first": x.transpose(0, 1), "unbatched": x[:, 0]}.get(form, x)
            if form == "packed":
                if mine.backend == "torch":  # knows no lengths
                    continue
                shaped = pack_padded_sequence(x, torch.tensor([2, 4, 1]), enforce_sorted=False)
            results = []
            for module in (theirs, mine):
                torch.manual_seed(1)
                outputs = flat(module(shaped))
                drawn = torch.rand(1)  # the generator stands where torch's does
                results.append([*outputs, *torch.autograd.grad(loss(outputs), list(module.parameters())), drawn])
            all_close(*results)
            all_close(flat(theirs.eval()(shaped)), flat(mine.eval()(shaped)))


def _batch_first(kind: str, extra: dict[str, Any]) -> Iterator[tuple[nn.Module, nn.Module]]:
    for theirs, mine in twins(kind, **{**extra, "batch_first": False}):
        theirs.batch_first = mine.batch_first = True
        yield theirs, mine


@kinds
def test_an_empty_batch(kind: str) -> None:
    """B = 0 works, or fails, as in torch.nn, and the weights' gradients are zeros."""
    for theirs, mine in twins(kind):
        x = torch.zeros((0, I) if "Cell" in kind else (T, 0, I), dtype=next(mine.parameters()).dtype)
        try:
            expected = flat(theirs(x))
        except RuntimeError as error:
            with pytest.raises(RuntimeError) as caught:
                mine(x)
            assert str(caught.value) == str(error)
            continue
        got = flat(mine(x))
        assert [v.shape for v in got] == [v.shape for v in expected]
        grads = torch.autograd.grad(sum(v.sum() for v in got), list(mine.parameters()))
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("kind", [k for k in KINDS if "Cell" in k])
@pytest.mark.parametrize("absent", ["bias_ih", "bias_hh"])
def test_a_cell_with_one_bias(kind: str, absent: str) -> None:
    for theirs, mine in twins(kind, torch.float64):
        setattr(theirs, absent, None)
        setattr(mine, absent, None)
        x = torch.randn(B, I, dtype=torch.float64)
        all_close(mine(x), theirs(x))


@layers
def test_no_steps(kind: str) -> None:
    """T = 0 raises what torch.nn raises."""
    for theirs, mine in twins(kind):
        x = torch.zeros(0, B, I, dtype=next(mine.parameters()).dtype)
        with pytest.raises(RuntimeError) as expected:
            theirs(x)
        with pytest.raises(RuntimeError) as got:
            mine(x)
        assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_torchs_graph_goes_with_ours(kind: str) -> None:
    """Backend torch keeps a graph of torch's own; a backward that keeps no graph frees that one too."""
    layer = getattr(rnnkit, kind)(3, 4, backend="torch")
    y, _ = layer(torch.randn(5, 2, 3))
    y.sum().backward(retain_graph=True)
    inner, outputs = y.grad_fn.graph
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outputs.y.sum(), inner.w_hh)
