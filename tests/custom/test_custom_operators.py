"""Each function of torch that a step may use, in every form, through tracer, derivative and self-check; and what is
refused, in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from custom_cells import spec_of
from torch import Tensor, nn

from rnnkit.custom.check import program_of
from rnnkit.custom.errors import StepError

HIDDEN = 6

POINTWISE: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: -x + 2 * x - (x / 3) * (1 - x) + +x,
    "number by tensor": lambda x: 1 / (x * x + 1) + (2 - x) + torch.rsub(x, 2) + 2.0 * x,
    "add alpha": lambda x: torch.add(x, x.tanh(), alpha=2) + x.add(1.0, alpha=3) + torch.add(input=x, other=x),
    "sub alpha": lambda x: x.sub(x.sin(), alpha=0.5) + torch.subtract(x, 1.0),
    "names": lambda x: x.multiply(x).divide(2.0).negative().absolute() + torch.true_divide(x, 2),
    "whole powers": lambda x: x**0 + x**1 + x**2 + x.pow(3) + torch.pow(x, 4) + (x * x + 1) ** -1 + (x * x + 1) ** -2,
    "other powers": lambda x: (x * x + 1) ** 1.7 + (x * x + 1) ** 0.5 + (x * x + 1) ** -0.5 + (x * x + 1) ** 5,
    "powers of a number": lambda x: 2 ** x.tanh() + torch.pow(0.5, x.tanh()),
    "square": lambda x: torch.square(x) + x.square(),
    "rounding": lambda x: x.floor() * x + x.round() + x.ceil() * x + x.trunc() * x + x.frac() * x,
    "sign": lambda x: x.sign() * x + torch.sgn(x) + torch.where(torch.signbit(x), x, -x),
    "abs": lambda x: abs(x) + x.abs() + torch.abs(x),
    "exp": lambda x: (-x * x).exp() + torch.exp2(x.tanh()) + torch.expm1(x.tanh()),
    "log": lambda x: torch.log(x * x + 1) + torch.log1p(x * x) + torch.log2(x * x + 2) + torch.log10(x * x + 2),
    "roots": lambda x: (x * x + 1).sqrt() + torch.rsqrt(x * x + 1) + (x * x + 2).reciprocal(),
    "circle": lambda x: x.sin() + torch.cos(x) + torch.tan(x.tanh()),
    "hyperbola": lambda x: torch.sinh(x.tanh()) + x.tanh().cosh() + torch.hypot(x, x.sin()),
    "erf": lambda x: x.erf() + torch.erf(x),
    "sigmoid": lambda x: x.sigmoid() + torch.sigmoid(x) + F.sigmoid(x) + nn.Sigmoid()(x) + torch.special.expit(x),
    "tanh": lambda x: x.tanh() + torch.tanh(x) + nn.Tanh()(x),
    "relu": lambda x: x.relu() + torch.relu(x) + F.relu(x) + nn.ReLU()(x),
    "relu6": lambda x: F.relu6(x) + nn.ReLU6()(x),
    "leaky_relu": lambda x: F.leaky_relu(x) + F.leaky_relu(x, 0.2) + nn.LeakyReLU(negative_slope=0.1)(x),
    "elu": lambda x: F.elu(x) + F.elu(x, alpha=0.5) + nn.ELU(2.0)(x),
    "celu": lambda x: F.celu(x) + F.celu(x, 2.0),
    "selu": lambda x: F.selu(x) + torch.selu(x),
    "gelu": lambda x: F.gelu(x) + nn.GELU()(x),
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": lambda x: F.silu(x) + nn.SiLU()(x),
    "softplus": lambda x: F.softplus(x) + F.softplus(x, beta=2, threshold=10) + nn.Softplus()(x),
    "softsign": lambda x: F.softsign(x),
    "hardsigmoid": lambda x: F.hardsigmoid(x),
    "hardswish": lambda x: F.hardswish(x),
    "hardtanh": lambda x: F.hardtanh(x) + F.hardtanh(x, min_val=-0.5, max_val=3.0),
    "hardshrink": lambda x: F.hardshrink(x) + F.hardshrink(x, lambd=1.0),
    "softshrink": lambda x: F.softshrink(x) + F.softshrink(x, 1.0),
    "tanhshrink": lambda x: F.tanhshrink(x),
    "mish": lambda x: F.mish(x),
    "logsigmoid": lambda x: F.logsigmoid(x) + nn.LogSigmoid()(x),
    "threshold": lambda x: F.threshold(x, 0.5, 2.0) + nn.Threshold(-1.0, 0.0)(x),
    "where": lambda x: torch.where(x > 0, x, 0.5 * x) + torch.where(x == 0, 2.0, x) + x.where(x < 1, -x),
    "comparisons": lambda x: (x.gt(0) * x) + torch.le(x, 1.0) * x + (x != 0) * x + (x >= x.sin()) * x + x.lt(2) * x,
    "logic": lambda x: torch.where((x > 0) & ~(x > 2) | (x < -1), x, 0.1 * x) + torch.logical_and(x > 0, x < 1) * x,
    "more logic": lambda x: torch.logical_xor(x > 0, x > 1) * x + ((x > 0) ^ (x > 1)) * x + torch.logical_not(x) * x,
    "truths as numbers": lambda x: ((x > 0) * (x < 2)) * x + ((x > 0) + (x > 2)) * x + x.bool() * x,
    "clamp": lambda x: torch.clamp(x, -3, 3) + x.clamp(min=-1) + torch.clip(x, max=1.0),
    "clamp at one side": lambda x: x.clamp_min(0) + x.clamp_max(3),
    "clamp by tensors": lambda x: torch.clamp(x, min=x.tanh() * 0.5, max=x.sigmoid() + 3),
    "maximum": lambda x: torch.maximum(x, x.tanh()) + torch.max(x, 0.5 * x) + x.maximum(-x),
    "minimum": lambda x: torch.minimum(x, -x) + torch.min(x, x.sin()),
    "lerp": lambda x: torch.lerp(x, x.sin(), 0.3) + x.lerp(x.cos(), x.sigmoid()),
    "addcmul": lambda x: torch.addcmul(x, x, x.sin(), value=0.5) + x.addcdiv(x, x * x + 1, value=2),
    "logaddexp": lambda x: torch.logaddexp(x, x.sin()),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0.5) + torch.masked_fill(x, x < 0, 0.0),
    "prelu": lambda x: F.prelu(x, torch.tensor(0.1)) + torch.prelu(x, torch.tensor(-2.0)),
    "glu": lambda x: F.glu(torch.cat([x, x.sin()], -1)) + F.glu(torch.cat([x, x.sin()], 1), dim=1),
    "finite": lambda x: torch.where(x.isnan() | torch.isinf(x), 0.0, x) + torch.where(torch.isfinite(x), x, 0.0),
    "detach": lambda x: x * x.sigmoid().detach() + x.tanh().data * x,
    "straight through": lambda x: x + (x.round() - x).detach(),
    "the same dtype": lambda x: x.float() + x.to(torch.float32) + x.to(x) + x.type_as(x) + (x > 0).to(x.dtype) * x,
    "copies": lambda x: x.clone() + x.contiguous() + torch.clone(x),
    "constants": lambda x: torch.zeros_like(x) + torch.ones_like(x) * x + torch.full_like(x, 2.0) * x,
    "more constants": lambda x: torch.zeros(x.shape) + x.new_ones(x.shape) * x + torch.full(x.shape, 0.1) * x,
    "numbers as tensors": lambda x: torch.tensor(0.1) * x + x.new_full(x.shape, 0.1) * x,
    "shapes in two numbers": lambda x: x + x.new_zeros(x.size(0), HIDDEN) + torch.ones(x.shape[0], HIDDEN) * x,
    "dropout that is off": lambda x: F.dropout(x, 0.5, training=False) + F.dropout(x, 0.0),
    "shapes": lambda x: x * len(x.shape) / x.dim() + x / x.shape[-1] if x.ndim == 2 and x.is_floating_point() else None,
}  # fmt: skip

BLOCKS: dict[str, Callable[[Tensor], Any]] = {
    "cat": lambda x: torch.cat([x, x * 2], -1)[:, HIDDEN:] + torch.cat((x, 2 * x), dim=1)[..., :HIDDEN],
    "chunk": lambda x: torch.chunk(torch.cat([x, x.sin()], -1), 2, dim=1)[1],
    "split": lambda x: torch.cat([x, x.sin()], -1).split(HIDDEN, -1)[1],
    "split in sizes": lambda x: torch.split(torch.cat([x, x.sin(), x], -1), [HIDDEN, 2 * HIDDEN], -1)[1][:, :HIDDEN],
    "tensor_split": lambda x: torch.tensor_split(torch.cat([x, x.sin()], -1), 2, -1)[1],
    "narrow": lambda x: torch.cat([x, x.sin()], -1).narrow(-1, HIDDEN, HIDDEN),
    "stack": lambda x: torch.stack([x, x.sin()], 1)[:, 1],
    "view": lambda x: torch.cat([x, x.sin()], -1).view(x.shape[0], 2, -1)[:, 1],
    "unflatten, unbind": lambda x: torch.cat([x, x.sin()], -1).unflatten(-1, (2, -1)).unbind(1)[1],
    "units of a row alone": lambda x: x[:, None].squeeze(1) + x.unsqueeze(1)[:, 0],
    "blocks in another order": lambda x: torch.stack([x, x.sin()], 1).flip(1)[:, 0],
    "a row's value spread": lambda x: x.mean(-1, True).expand_as(x) * x + x.mean(-1, True).expand(-1, HIDDEN),
    "a row's value repeated": lambda x: x.mean(-1, True).repeat(1, HIDDEN) * x,
    "a row's values joined": lambda x: torch.cat([x.mean(-1, True), x.amax(-1, True)], -1)[:, 1:] * x,
}

ROWS: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda x: x.sum(-1, keepdim=True) + x.sum(-1).unsqueeze(-1) + torch.sum(x, -1, True) * x,
    "sum without its dimension": lambda x: x.sum(dim=1)[:, None] * x + x.sum(-1, dtype=x.dtype)[..., None],
    "sum of blocks": lambda x: torch.cat([x, x.sin()], -1).sum(-1, keepdim=True) * x,
    "sum per block": lambda x: torch.stack([x, x.sin()], 1).sum(-1, keepdim=True)[:, 1] * x,
    "mean": lambda x: x - x.mean(-1, keepdim=True) + torch.mean(x, dim=-1)[:, None],
    "var": lambda x: x.var(1, True)[:, None] + x.var(dim=-1, correction=0)[..., None] * x,
    "var by its place": lambda x: torch.var(x, -1, False)[:, None] * x,
    "std": lambda x: x / (x.std(-1, keepdim=True) + 1) + x.std(-1, unbiased=False, keepdim=True),
    "var_mean": lambda x: torch.var_mean(x, -1, keepdim=True)[0] * x,
    "amax": lambda x: torch.amax(x, dim=1, keepdim=True) + x - x.amax(-1)[:, None],
    "logsumexp": lambda x: x - x.logsumexp(-1, keepdim=True) + torch.logsumexp(x, 1)[:, None],
    "softmax": lambda x: x.softmax(-1) + F.softmax(x, dim=-1) * x,
    "softmax of blocks": lambda x: torch.softmax(torch.cat([x, x.sin()], -1), 1)[:, :HIDDEN],
    "log_softmax": lambda x: F.log_softmax(x, -1) + x.log_softmax(1),
    "norm": lambda x: x / (1 + x.norm(dim=-1, keepdim=True)) + x.norm(p=1, dim=-1, keepdim=True),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x,
    "normalize": lambda x: F.normalize(x, dim=-1),
    "layer_norm": lambda x: F.layer_norm(x, (HIDDEN,)) + F.layer_norm(x, x.shape[-1:], eps=1e-3),
    "layer_norm of blocks": lambda x: F.layer_norm(torch.cat([x, x.sin()], -1), (2 * HIDDEN,))[:, :HIDDEN],
    "layer_norm per block": lambda x: F.layer_norm(torch.stack([x, x.sin()], 1), (HIDDEN,))[:, 1],
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]) + F.rms_norm(x, (HIDDEN,), eps=1e-3),
}  # fmt: skip


def _step(function: Callable[[Tensor], Any]) -> Any:
    def step(a: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return (function(a + h),)

    return spec_of(step, 1, ("h",))


@pytest.mark.parametrize(
    "function", [*POINTWISE.values(), *BLOCKS.values(), *ROWS.values()], ids=[*POINTWISE, *BLOCKS, *ROWS]
)
def test_taken(function: Callable[[Tensor], Any]) -> None:
    """The check holds value and gradients against autograd, edges included."""
    assert program_of(_step(function), HIDDEN).reason is None


@pytest.mark.parametrize("function", [F.softplus, F.logsigmoid, F.mish, F.elu, F.silu, F.softsign, torch.expm1])
def test_far_out_in_float32(function: Callable[[Tensor], Tensor]) -> None:
    """Neither infinite nor NaN at ±1000 where torch is not, forward and backward."""
    from rnnkit.custom import evaluate

    def step(gx: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return (function(gx),)

    checked = program_of(spec_of(step, 1, ("h",)), 4)
    assert checked.program is not None
    x = torch.tensor([[-1000.0, -88.0, 88.0, 80.0 if function is torch.expm1 else 1000.0]])
    values = {"gx": x, "h": torch.zeros(1, 4)}
    x.requires_grad_()
    want = function(x)
    (d,) = torch.autograd.grad(want.sum(), x)
    with torch.no_grad():
        kept = evaluate.forward(checked.program, values)
        have = evaluate.backward(checked.program, values, kept, [torch.ones(1, 4)])
    torch.testing.assert_close(kept.new[0], want.detach())
    torch.testing.assert_close(have["gx"], d)


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "unknown": (lambda x: torch.erfinv(x.tanh()), r"erfinv, for which no kernel is made"),
    "cumsum": (lambda x: x.cumsum(-1), r"cumsum.*a unit's value may not depend on its place"),
    "branch": (lambda x: x if x.sum() > 0 else -x, r"sum over the whole tensor"),
    "branch on one": (lambda x: x if x[:, :HIDDEN].isnan().any() else -x, r"a branch on values \(any\)"),
    "branch on a row": (lambda x: x if (x.sum(-1) > 0).all() else -x, r"a branch on values \(all\).*torch.where"),
    "item": (lambda x: x * x.sum(-1)[0].item(), r"has not the batch"),
    "in place": (lambda x: (x * 2).mul_(2), r"mul_, which changes a tensor in place"),
    "in place by keyword": (lambda x: F.relu(x * 2, inplace=True), r"relu, which changes a tensor in place"),
    "outside": (lambda x: x + OUTSIDE, r"OUTSIDE comes from outside"),
    "half": (lambda x: x.bfloat16().float(), r"a change of dtype, torch.float32 to torch.bfloat16.*leave the cast"),
    "double": (lambda x: x.double().float(), r"a change of dtype"),
    "whole numbers": (lambda x: x.long().float(), r"a change of dtype"),
    "half a block": (lambda x: x[:, :3].repeat(1, 2), r"neither whole blocks of H = 6 units nor one value for each"),
    "roll": (lambda x: x.roll(1, -1), r"roll: it takes blocks of H = 6 units apart"),
    "other rows": (lambda x: x.flip(0), r"flip: it joins different rows of the batch"),
    "over the batch": (lambda x: x - x.mean(0), r"mean over dimension 0 of \[B, 6\]: only the last one"),
    "over everything": (lambda x: x / x.sum(), r"sum over the whole tensor, the batch too"),
    "max with places": (lambda x: x - x.max(-1, keepdim=True).values, r"write torch.amax over units"),
    "amax of blocks": (lambda x: torch.cat([x, -x], -1).amax(-1, True) * x, r"torch.maximum of the blocks first"),
    "no declared weight": (lambda x: F.linear(x, x)[:, :1] * x, r"declare it by rnnkit.weight"),
    "no weight either": (lambda x: x @ x.new_ones(HIDDEN, HIDDEN), r"declare it by rnnkit.weight"),
    "read into Python": (lambda x: x * float(x.new_ones(1)), r"__float__, which reads a tensor's value"),
    "einsum": (lambda x: torch.einsum("bi,bj->bij", x, x)[:, 0], r"einsum.*F.linear with a declared weight"),
    "a power": (lambda x: (x * x + 1) ** x, r"torch.exp\(y \* torch.log\(x\)\)"),
    "the batch's size": (lambda x: x / x.shape[0], r"number of rows"),
}  # fmt: skip

OUTSIDE = torch.ones(HIDDEN)


@pytest.mark.parametrize("function, words", REFUSED.values(), ids=REFUSED)
def test_refused(function: Callable[[Tensor], Any], words: str) -> None:
    checked = program_of(_step(function), HIDDEN)
    assert checked.program is None and checked.reason is not None
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(checked.reason)


def test_the_line_is_named() -> None:
    checked = program_of(_step(lambda x: x.cumsum(-1)), HIDDEN)
    assert checked.reason is not None and "of test_custom_operators.py)" in checked.reason


@pytest.mark.parametrize(
    "function",
    [
        torch.rand_like,
        F.dropout,
        F.rrelu,
        torch.bernoulli,
        nn.Dropout(),
        lambda x: x + torch.randn(x.shape),
        lambda x: F.gumbel_softmax(x, -1),
    ],
)
def test_random_numbers_inside_are_an_error(function: Callable[[Tensor], Any]) -> None:
    with pytest.raises(StepError, match=r"draw masks outside.* per_step"):
        program_of(_step(lambda x: function(x.sigmoid())), HIDDEN)
