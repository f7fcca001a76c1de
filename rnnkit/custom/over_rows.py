"""What the tracer makes of functions over the last dimension: sums, norms, softmax, in torch's own signatures.

A sum over units is a value per row, and cuts a step in two: what stands behind it waits for every unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rnnkit.custom import functions as f
from rnnkit.custom.errors import NotTraced
from rnnkit.custom.term import Term
from rnnkit.custom.trace import Tracer, Value


def _total(terms: list[Term], hidden: int) -> Term:
    total = terms[0]
    for x in terms[1:]:
        total = total + x
    return total.rowsum(hidden)


def _largest(terms: list[Term]) -> Term:
    """No gradient goes through it."""
    largest = terms[0]
    for x in terms[1:]:
        largest = largest.point("maximum", x)
    return largest.point("stop").rowmax()


DTYPE = "a step computes in its states' dtype, float32 or wider: leave the cast away"


def own_dtype(dtype: Any, t: Tracer, what: str) -> None:
    if dtype is not None and dtype != t.dtype:
        raise NotTraced(f"{what} with dtype={dtype}: {DTYPE}")


def _sum(t: Tracer, input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    own_dtype(dtype, t, "sum")
    return t.reduced(input, [_total(g, t.hidden) for g in t.rowwise(input, dim, "sum")], keepdim)


def _mean_of(terms: list[Term], hidden: int) -> Term:
    return _total(terms, hidden) / (len(terms) * hidden)


def _mean(t: Tracer, input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    own_dtype(dtype, t, "mean")
    return t.reduced(input, [_mean_of(g, t.hidden) for g in t.rowwise(input, dim, "mean")], keepdim)


def _spread(terms: list[Term], hidden: int, correction: float) -> tuple[list[Term], Term]:
    """The values less their mean, and their variance: in two passes, for the squares of values can be far larger.

    No gradient of the variance goes through the mean: it would be a sum of values less their mean, which is 0. So the
    backward's sums wait for one another no more than they must.
    """
    mean = _mean_of(terms, hidden)
    squares = [(x - mean.point("stop")) * (x - mean.point("stop")) for x in terms]
    return [x - mean for x in terms], _total(squares, hidden) / (len(terms) * hidden - correction)


def _variances(t: Tracer, input: Any, dim: Any, unbiased: Any, correction: Any, what: str) -> list[Term]:
    if isinstance(dim, bool):
        raise NotTraced(f"{what} over the whole tensor: give the dimension, -1")
    if unbiased is not None:
        correction = int(unbiased)
    correction = 1 if correction is None else correction
    return [_spread(g, t.hidden, correction)[1] for g in t.rowwise(input, dim, what)]


def _var(
    t: Tracer, input: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Value:
    return t.reduced(input, _variances(t, input, dim, unbiased, correction, "var"), keepdim)


def _std(
    t: Tracer, input: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Value:
    found = _variances(t, input, dim, unbiased, correction, "std")
    return t.reduced(input, [f.root_or_zero(x) for x in found], keepdim)


def _var_mean(
    t: Tracer, input: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> tuple[Value, Value]:
    return (
        _var(t, input, dim, unbiased, keepdim, correction=correction),
        _mean(t, input, dim, keepdim),
    )


def _amax(t: Tracer, input: Any, dim: Any = (), keepdim: bool = False) -> Value:
    groups = t.rowwise(input, dim, "amax")
    if any(len(g) > 1 for g in groups):
        raise NotTraced("amax over more than one block: take torch.maximum of the blocks first")
    return t.reduced(input, [g[0].rowmax() for g in groups], keepdim)


def _logsumexp(t: Tracer, input: Any, dim: Any, keepdim: bool = False) -> Value:
    found = []
    for g in t.rowwise(input, dim, "logsumexp"):
        top = _largest(g)
        found.append(top + _total([(x - top).point("exp") for x in g], t.hidden).point("log"))
    return t.reduced(input, found, keepdim)


def _norm(t: Tracer, input: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    own_dtype(dtype, t, "norm")
    found = []
    for g in t.rowwise(input, dim, "norm"):
        if p in (2, "fro", None):
            found.append(f.root_or_zero(_total([x * x for x in g], t.hidden)))
        elif p == 1:
            found.append(_total([x.point("abs") for x in g], t.hidden))
        else:
            raise NotTraced(f"a norm of order {p}: 1 and 2 are known")
    return t.reduced(input, found, keepdim)


def _vector_norm(
    t: Tracer, x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Value:
    return _norm(t, x, ord, dim, keepdim, dtype)


def _normalize(t: Tracer, input: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Value:
    if out is not None:
        raise NotTraced("normalize with out=: leave it away")
    length = _norm(t, input, p, dim, keepdim=True)
    return t.pointwise(lambda a, b: a / f.clamp(b, b.like(eps)), input, length)


def _softmax(t: Tracer, input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Value:
    own_dtype(dtype, t, "softmax")
    made: list[int] = []
    for g in t.rowwise(input, -1 if dim is None else dim, "softmax"):
        top = _largest(g)
        e = [(x - top).point("exp") for x in g]
        scale = _total(e, t.hidden).point("reciprocal")
        made += [(x * scale).n for x in e]
    return t.tensor(input.shape, made)


def _log_softmax(t: Tracer, input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Value:
    own_dtype(dtype, t, "log_softmax")
    made: list[int] = []
    for g in t.rowwise(input, -1 if dim is None else dim, "log_softmax"):
        top = _largest(g)
        down = [x - top for x in g]
        total = _total([x.point("exp") for x in down], t.hidden).point("log")
        made += [(x - total).n for x in down]
    return t.tensor(input.shape, made)


def _normed(t: Tracer, input: Any, normalized_shape: Any, what: str) -> list[list[Term]]:
    input = t.as_value(input, what)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if shape != tuple(input.shape[-1:]):
        raise NotTraced(f"{what} over {list(shape)} of {t.shown(input)}: only over the last dimension")
    return t.rowwise(input, -1, what)


def _scaled(t: Tracer, y: Value, weight: Any, bias: Any) -> Value:
    if weight is not None:
        y = t.pointwise(lambda a, b: a * b, y, weight)
    return y if bias is None else t.pointwise(lambda a, b: a + b, y, bias)


def _layer_norm(
    t: Tracer, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Value:  # fmt: skip
    made: list[int] = []
    for g in _normed(t, input, normalized_shape, "layer_norm"):
        apart, variance = _spread(g, t.hidden, 0)
        scale = (variance + eps).point("rsqrt")
        made += [(x * scale).n for x in apart]
    return _scaled(t, t.tensor(input.shape, made), weight, bias)


def _rms_norm(t: Tracer, input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Value:
    eps = torch.finfo(t.dtype).eps if eps is None else eps
    made: list[int] = []
    for g in _normed(t, input, normalized_shape, "rms_norm"):
        scale = (_mean_of([x * x for x in g], t.hidden) + eps).point("rsqrt")
        made += [(x * scale).n for x in g]
    return _scaled(t, t.tensor(input.shape, made), weight, None)


ROWS: dict[str, Callable[..., Any]] = {
    "sum": _sum,
    "mean": _mean,
    "var": _var,
    "std": _std,
    "var_mean": _var_mean,
    "amax": _amax,
    "logsumexp": _logsumexp,
    "norm": _norm,
    "vector_norm": _vector_norm,
    "normalize": _normalize,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "linalg_vector_norm": _vector_norm,
}
