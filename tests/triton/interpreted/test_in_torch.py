"""The Triton kernels inside torch's own machinery: compile, export with save and load, autocast, checkpoint, vmap and
a second derivative. All but the last two are launches below the package's operators and give the bits of a plain call.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from support import lacks_onednn_lstm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rnnkit

names = pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])


def made(name: str, **how: Any) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = getattr(rnnkit, name)(3, 5, bidirectional=True, backend="triton", **how)
    return layer, torch.randn(4, 2, 3, requires_grad=True), torch.tensor([4, 2]), torch.rand(4, 2) < 0.3


def results(run: Any, layer: nn.Module, x: Tensor, **given: Tensor) -> list[Tensor]:
    y = run(x, **given)[0]
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@names
def test_compiled(name: str) -> None:
    layer, x, lengths, reset = made(name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    plain = results(layer, layer, x, lengths=lengths, reset=reset)
    assert_same(results(compiled, layer, x, lengths=lengths, reset=reset), plain)


@names
def test_exported_saved_and_loaded(name: str) -> None:
    class Head(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.layer(x, lengths=lengths)[0]

    layer, x, lengths, _ = made(name)
    model, x = Head(layer), x.detach()
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x, lengths)), file)
    file.seek(0)
    again = torch.export.load(file).module()
    with torch.no_grad():
        assert torch.equal(again(x, lengths), model(x, lengths))


@names
def test_under_autocast(name: str) -> None:
    """The dtype that torch.nn's layer gives, and float32 gradients as near as one rounding to bfloat16 allows."""
    layer, x, *_ = made(name)
    found = []
    for backend in ("triton", "reference"):
        with rnnkit.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            y = layer(x)[0]
        found.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), [*layer.parameters()])])
    if name == "LSTM" and lacks_onednn_lstm(torch.bfloat16):  # torch.nn's raises here
        assert y.dtype == torch.bfloat16
    else:
        with torch.autocast("cpu", torch.bfloat16):
            assert y.dtype == getattr(nn, name)(3, 5)(x.detach())[0].dtype
    assert [v.dtype for v in found[0]] == [y.dtype] + [torch.float32] * len(list(layer.parameters()))
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max()) <= 4 * torch.finfo(torch.bfloat16).eps * float(b.abs().max())


@names
def test_checkpointed(name: str) -> None:
    layer, x, lengths, _ = made(name)
    plain = results(layer, layer, x, lengths=lengths)
    again = results(lambda *a, **k: checkpoint(layer, *a, use_reentrant=False, **k), layer, x, lengths=lengths)
    assert_same(again, plain)


@names
def test_transforms_and_a_second_derivative(name: str) -> None:
    """These run on the formulas of the reference, whatever backend is named."""
    layer, x, *_ = made(name)
    with torch.no_grad():
        every = torch.func.vmap(lambda v: layer(v)[0], randomness="error")(torch.stack([x, 2 * x]))
        for found, v in zip(every, (x, 2 * x), strict=True):
            assert torch.allclose(found, layer(v)[0], rtol=1e-5, atol=1e-6)
    (first,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    with rnnkit.use_backend("reference"):
        (plain,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(plain.square().sum(), x)
    assert torch.allclose(second, expected, rtol=1e-4, atol=1e-5)
