"""torch.func inside of torch.compile: each transform gives there what it gives outside.

Dynamo traces through a transform, and the opaque operator of a layer has no rule for it: the layer has to be traced as
the reference's formulas then, as in eager mode.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import some
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import rnnkit

I, H = 2, 3
LAYERS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "RNN": lambda: of_layer(rnnkit.RNN(I, H)),
    "LSTM": lambda: of_layer(rnnkit.LSTM(I, H)),
    "GRU": lambda: of_layer(rnnkit.GRU(I, H)),
    "GRU-before": lambda: of_layer(rnnkit.GRU(I, H, reset_after=False)),
    "lengths": lambda: of_layer(rnnkit.GRU(I, H), lengths=torch.tensor([2, 1])),
    "GRUCell": lambda: of_cell(rnnkit.GRUCell(I, H)),
}
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Any]] = {
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "jacfwd": lambda f, x, v: jacfwd(f)(x),
    "jacrev": lambda f, x, v: jacrev(f)(x),
    "grad": lambda f, x, v: grad(f)(x),
    "hessian": lambda f, x, v: hessian(f)(x),
    "vmap": lambda f, x, v: vmap(f)(torch.stack([x, v])),
    "vmap-grad": lambda f, x, v: vmap(grad(f))(torch.stack([x, v])),
}


def of_layer(layer: torch.nn.Module, **extra: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x, **extra)[0].sin().sum()


def of_cell(cell: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: cell(x[0]).sin().sum()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", some(itertools.product(LAYERS, TRANSFORMS), every=8), ids="-".join)
def test_inside_of_compile_as_outside(case: tuple[str, str]) -> None:
    name, transform = case
    f, run = LAYERS[name](), TRANSFORMS[transform]
    x, v = torch.randn(2, 2, I), torch.randn(2, 2, I)
    want = run(f, x, v)
    assert want.abs().max() > 1e-3  # a derivative that is lost is 0
    got = torch.compile(lambda x, v: run(f, x, v), backend="aot_eager", fullgraph=True)(x, v)
    torch.testing.assert_close(got, want)


def test_one_function_with_and_without_a_transform() -> None:
    """What was compiled for a plain call does not serve a transformed one, nor the other way round."""
    layer = rnnkit.GRU(I, H)
    compiled = torch.compile(lambda x: layer(x)[0].sum(), backend="aot_eager")
    x = torch.randn(3, 2, I)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), layer(x)[0].sum())
        torch.testing.assert_close(grad(compiled)(x), grad(lambda x: layer(x)[0].sum())(x))
