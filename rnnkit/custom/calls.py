"""What the tracer makes of each function of torch, by its name: method, function, operator and torch.nn.functional are
one. A name that is not here is refused, with what to write instead where that is known.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rnnkit.custom import functions as f
from rnnkit.custom.functions import NotTraced, primitive
from rnnkit.custom.term import Term
from rnnkit.custom.trace import Tracer, Value

_ASKED = (  # of a tensor, what Python may know while tracing
    "shape size dim ndim ndimension numel nelement dtype device layout is_floating_point is_complex requires_grad "
    "is_contiguous stride __len__ element_size is_leaf is_cuda is_cpu is_meta is_sparse is_quantized is_nested "
    "names result_type promote_types get_device grad_fn is_tensor is_grad_enabled is_storage __hash__ finfo is_inference"
).split()

_MOVES = (
    "chunk unsafe_chunk split unsafe_split split_with_sizes tensor_split hsplit narrow __getitem__ select unbind "
    "unflatten flatten view reshape view_as reshape_as expand expand_as broadcast_to broadcast_tensors repeat tile "
    "unsqueeze squeeze permute movedim moveaxis transpose swapaxes swapdims flip roll cat concat concatenate hstack "
    "stack index_select contiguous clone alias positive __pos__ requires_grad_"
).split()

_ALIASES = {
    "__add__": "add", "__radd__": "add", "__sub__": "sub", "__mul__": "mul", "__rmul__": "mul", "__truediv__": "div",
    "__div__": "div", "__neg__": "neg", "__abs__": "abs", "__lt__": "lt", "__le__": "le", "__gt__": "gt",
    "__ge__": "ge", "__eq__": "eq", "__ne__": "ne", "__and__": "logical_and", "__or__": "logical_or",
    "__xor__": "logical_xor", "__rand__": "logical_and", "__ror__": "logical_or", "__rxor__": "logical_xor",
    "__invert__": "logical_not", "bitwise_and": "logical_and", "bitwise_or": "logical_or",
    "bitwise_xor": "logical_xor", "bitwise_not": "logical_not", "__pow__": "pow", "subtract": "sub",
    "multiply": "mul", "divide": "div", "true_divide": "div", "negative": "neg", "absolute": "abs", "less": "lt",
    "less_equal": "le", "greater": "gt", "greater_equal": "ge", "not_equal": "ne", "clip": "clamp", "sgn": "sign",
    "expit": "sigmoid", "fix": "trunc", "swish": "silu", "log_sigmoid": "logsigmoid", "special_expit": "sigmoid", "special_expm1": "expm1",
    "special_log1p": "log1p", "special_erf": "erf", "special_logsumexp": "logsumexp", "special_softmax": "softmax",
    "special_log_softmax": "log_softmax", "rsub": "__rsub__", "__rdiv__": "__rtruediv__", "mm": "matmul",
    "__matmul__": "matmul", "mv": "matmul", "float_power": "pow",
}  # fmt: skip

_POINTWISE: dict[str, Callable[..., Term]] = {
    **{
        op: primitive(op)
        for op in (
            "mul div maximum minimum neg abs sigmoid tanh relu exp expm1 log log1p sqrt rsqrt reciprocal sin cos erf "
            "floor"
        ).split()
    },
    "sign": f.sign, "ceil": f.ceil, "trunc": f.trunc, "frac": lambda x: x - f.trunc(x), "square": lambda x: x * x,
    "exp2": lambda x: (x * math.log(2)).point("exp"), "log2": lambda x: x.point("log") * (1 / math.log(2)),
    "log10": lambda x: x.point("log") * (1 / math.log(10)), "sinh": f.sinh, "cosh": f.cosh, "tan": f.tan,
    "relu6": lambda x, inplace=None: f.hardtanh(x, 0.0, 6.0), "softsign": f.softsign, "logsigmoid": f.logsigmoid,
    "tanhshrink": lambda x: x - x.point("tanh"), "logaddexp": f.logaddexp, "pow": f.power,
    "__rsub__": lambda x, y: y - x, "__rtruediv__": lambda x, y: y / x, "__rpow__": lambda x, y: f.power(y, x),
    "rad2deg": lambda x: x * (180 / math.pi), "deg2rad": lambda x: x * (math.pi / 180), "hypot": lambda x, y:
    f.root_or_zero(x * x + y * y),
}  # fmt: skip
"""Of tensors alone."""

_TRUTHS: dict[str, Callable[..., Term]] = {
    **{op: primitive(op) for op in ("lt", "le", "gt", "ge", "eq", "ne")},
    "logical_and": f.both,
    "logical_or": f.either,
    "logical_xor": f.differ,
    "logical_not": f.no,
    "isnan": lambda x: x.point("ne", x),
    "isinf": lambda x: x.point("abs").same(math.inf),
    "signbit": lambda x: x < 0,
}
"""Those whose result is true or false."""

_RANDOM = (
    "rand randn randint randperm rand_like randn_like randint_like bernoulli normal multinomial poisson dropout1d "
    "dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout rrelu uniform_ normal_ bernoulli_ random_ "
    "exponential_ gumbel_softmax geometric_ log_normal_ cauchy_ binomial"
).split()
_VALUE = "__bool__ __float__ __int__ __index__ item tolist numpy __contains__ equal allclose is_nonzero nonzero any all".split()
_INSTEAD = {
    "max": "torch.amax over units, torch.maximum of two tensors",
    "min": "-torch.amax(-x, -1) over units, torch.minimum of two tensors",
    "amin": "-torch.amax(-x, -1)",
    "prelu": "torch.where(x > 0, x, slope * x)",
    "group_norm": "F.layer_norm of each block",
    "einsum": "F.linear with a declared weight",
    "bmm": "F.linear with a declared weight",
    "addmm": "F.linear with a declared weight",
    "nan_to_num": "torch.where(x != x, 0, x)",
    "atan2": "a rational or tanh form",
    "T": "F.linear for a product",
    "half": "nothing: a step computes in float32 or wider",
    "glu": "a, b = x.chunk(2, -1); a * torch.sigmoid(b)",
}


# --- the few that have parameters, in torch's own signatures -----------------------------------------------------------


def _add(t: Tracer, input: Any, other: Any, *, alpha: float = 1) -> Value:
    if _truths(input, other):
        return t.pointwise(f.either, input, other, dtype=torch.bool)
    return t.pointwise(lambda a, b: a + b * alpha, input, other)


def _sub(t: Tracer, input: Any, other: Any, *, alpha: float = 1) -> Value:
    return t.pointwise(lambda a, b: a - b * alpha, input, other)


def _mul(t: Tracer, input: Any, other: Any) -> Value:
    return t.pointwise(lambda a, b: a * b, input, other, dtype=torch.bool if _truths(input, other) else None)


def _div(t: Tracer, input: Any, other: Any, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode is not None:
        raise NotTraced("div with rounding_mode: write torch.floor(x / y)")
    return t.pointwise(lambda a, b: a / b, input, other)


def _truths(*xs: Any) -> bool:
    return all(isinstance(x, bool) or (isinstance(x, Tensor) and x.dtype == torch.bool) for x in xs)


def _clamp(t: Tracer, input: Any, min: Any = None, max: Any = None) -> Value:
    low = [] if min is None else [min]
    high = [] if max is None else [max]

    def formula(x: Term, *bounds: Term) -> Term:
        return f.clamp(x, bounds[0] if low else None, bounds[-1] if high else None)

    return t.pointwise(formula, input, *low, *high)


def _where(t: Tracer, condition: Any, input: Any, other: Any) -> Value:
    return t.pointwise(lambda c, a, b: c.where(a, b), condition, input, other)


def _masked_fill(t: Tracer, input: Any, mask: Any, value: Any) -> Value:
    return t.pointwise(lambda x, m, v: m.where(v, x), input, mask, value)


def _lerp(t: Tracer, input: Any, end: Any, weight: Any) -> Value:
    return t.pointwise(f.lerp, input, end, weight)


def _addcmul(t: Tracer, input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Value:
    return t.pointwise(lambda x, a, b: x + a * b * value, input, tensor1, tensor2)


def _addcdiv(t: Tracer, input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Value:
    return t.pointwise(lambda x, a, b: x + a / b * value, input, tensor1, tensor2)


def _round(t: Tracer, input: Any, *, decimals: int = 0) -> Value:
    if decimals:
        raise NotTraced("round with decimals: write torch.round(x * 10**n) / 10**n")
    return t.pointwise(primitive("round"), input)


def _dropout(t: Tracer, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p:
        raise NotTraced(_random_words("dropout"))
    return input


def _detach(t: Tracer, input: Any) -> Value:
    x = t.as_value(input, "detach")
    return t.pointwise(primitive("stop"), x, dtype=x.dtype)


def _parameters(formula: Callable[..., Term], *names: str) -> Callable[..., Value]:
    """A function of one tensor and numbers, which torch calls `names`; `inplace` is refused elsewhere."""
    defaults = inspect.signature(formula).parameters

    own = [p for p in defaults if p != "x"]
    signature = inspect.Signature(
        [
            inspect.Parameter("t", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            inspect.Parameter("input", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(
                inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=defaults[mine].default)
                for name, mine in zip(names, own)
            ),
            inspect.Parameter("inplace", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=False),
        ]
    )

    def handler(t: Tracer, input: Any, *args: Any, **kwargs: Any) -> Value:
        bound = signature.bind(t, input, *args, **kwargs)
        bound.arguments.pop("inplace", None)
        numbers = list(bound.arguments.items())[2:]
        for name, number in numbers:
            if isinstance(number, Tensor):
                raise NotTraced(f"{name} given as a tensor: give a number")
        return t.pointwise(lambda x: formula(x, **{own[names.index(n)]: v for n, v in numbers}), input)

    return handler


# --- products ----------------------------------------------------------------------------------------------------------


def _linear(t: Tracer, input: Any, weight: Any, bias: Any = None) -> Value:
    if not isinstance(weight, Value) or weight.weight is None or weight.turned:
        raise NotTraced("linear with what is no declared weight: declare it by rnnkit.weight(blocks)")
    y = t.product(input, weight, "linear")
    return y if bias is None else t.pointwise(lambda a, b: a + b, y, bias)


def _matmul(t: Tracer, input: Any, other: Any) -> Value:
    if not isinstance(other, Value) or other.weight is None:
        raise NotTraced("a matrix product with what is no declared weight: declare it by rnnkit.weight(blocks)")
    if not other.turned:
        raise NotTraced(f"x @ {other.weight}: the weight is [blocks·H, H]; write F.linear(x, {other.weight})")
    return t.product(input, other, "matmul")


# --- over a row --------------------------------------------------------------------------------------------------------


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


def _own(dtype: Any, t: Tracer, what: str) -> None:
    if dtype is not None and dtype != t.dtype:
        raise NotTraced(f"{what} with dtype={dtype}: {_DTYPE}")


def _sum(t: Tracer, input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    _own(dtype, t, "sum")
    return t.reduced(input, [_total(g, t.hidden) for g in t.rowwise(input, dim, "sum")], keepdim)


def _mean_of(terms: list[Term], hidden: int) -> Term:
    return _total(terms, hidden) * (1 / (len(terms) * hidden))


def _mean(t: Tracer, input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    _own(dtype, t, "mean")
    return t.reduced(input, [_mean_of(g, t.hidden) for g in t.rowwise(input, dim, "mean")], keepdim)


def _spread(terms: list[Term], hidden: int, correction: float) -> tuple[list[Term], Term]:
    """The values less their mean, and their variance: in two passes, for the squares of values can be far larger."""
    mean = _mean_of(terms, hidden)
    apart = [x - mean for x in terms]
    return apart, _total([x * x for x in apart], hidden) * (1 / (len(terms) * hidden - correction))


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
    _own(dtype, t, "norm")
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
    length = _clamp(t, _norm(t, input, p, dim, keepdim=True), min=eps)
    return t.pointwise(lambda a, b: a / b, input, length)


def _softmax(t: Tracer, input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Value:
    _own(dtype, t, "softmax")
    made: list[int] = []
    for g in t.rowwise(input, -1 if dim is None else dim, "softmax"):
        top = _largest(g)
        e = [(x - top).point("exp") for x in g]
        scale = _total(e, t.hidden).point("reciprocal")
        made += [(x * scale).n for x in e]
    return t.tensor(input.shape, made)


def _log_softmax(t: Tracer, input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Value:
    _own(dtype, t, "log_softmax")
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
        raise NotTraced(f"{what} over {list(shape)} of {list(input.shape)}: only over the last dimension")
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


# --- dtypes, constants -------------------------------------------------------------------------------------------------

_DTYPE = "a step computes in its states' dtype, float32 or wider: leave the cast away"


def _cast(t: Tracer, input: Any, dtype: Any) -> Value:
    x = t.as_value(input, "a cast")
    if dtype == x.dtype:
        return x
    if x.dtype == torch.bool and dtype.is_floating_point:
        return t.tensor(x.shape, x.nodes)
    if dtype == torch.bool:
        return t.pointwise(f.truth, x, dtype=torch.bool)
    raise NotTraced(f"a change of dtype, {x.dtype} to {dtype}: {_DTYPE}")


def _to(t: Tracer, input: Any, *args: Any, **kwargs: Any) -> Value:
    for x in (*args, *kwargs.values()):
        if isinstance(x, torch.dtype):
            return _cast(t, input, x)
        if isinstance(x, Tensor):
            return _cast(t, input, x.dtype)
    return t.as_value(input, "to")


def _like(fill: float | None) -> Callable[..., Value]:
    def handler(t: Tracer, input: Any, *args: Any, **kwargs: Any) -> Value:
        value = args[0] if fill is None and args else kwargs.pop("fill_value", fill)
        _own(kwargs.get("dtype"), t, "a constant")
        return _filled(t, tuple(input.shape), value)

    return handler


def _filled(t: Tracer, shape: Any, value: Any) -> Value:
    if isinstance(value, Tensor):
        return t.tensor(shape, t.expanded(t.as_value(value), torch.Size(shape)))
    one = t.tensor((), [t.graph.const(value)], torch.bool if isinstance(value, bool) else None)
    return t.tensor(shape, t.expanded(one, torch.Size(shape)), one.dtype)


def _made(fill: float | None, method: bool) -> Callable[..., Value]:
    """zeros, ones, full and new_zeros, ...: shapes as torch takes them."""

    def handler(t: Tracer, *args: Any, **kwargs: Any) -> Value:
        args = args[1:] if method else args
        size = kwargs.pop("size", None)
        if size is None:
            size, args = (args[0], args[1:]) if isinstance(args[0], (tuple, list)) else (args, ())
        value = fill if fill is not None else args[0] if args else kwargs.pop("fill_value")
        _own(kwargs.get("dtype"), t, "a constant")
        return _filled(t, tuple(size), value)

    return handler


def _tensor(t: Tracer, data: Any, **kwargs: Any) -> Value:
    if not isinstance(data, (bool, int, float)):
        raise NotTraced(
            "torch.tensor of more than one number: declare a parameter, or write the numbers in the formula"
        )
    return _filled(t, (), data)


_HANDLERS: dict[str, Callable[..., Any]] = {
    "add": _add, "sub": _sub, "mul": _mul, "div": _div, "clamp": _clamp, "where": _where,
    "masked_fill": _masked_fill, "lerp": _lerp, "addcmul": _addcmul, "addcdiv": _addcdiv, "round": _round,
    "dropout": _dropout, "detach": _detach, "linear": _linear, "matmul": _matmul, "sum": _sum, "mean": _mean,
    "var": _var, "std": _std, "var_mean": _var_mean, "amax": _amax, "logsumexp": _logsumexp, "norm": _norm,
    "vector_norm": _vector_norm, "linalg_vector_norm": _vector_norm, "normalize": _normalize, "softmax": _softmax,
    "log_softmax": _log_softmax, "layer_norm": _layer_norm, "rms_norm": _rms_norm, "to": _to,
    "type": _to, "type_as": _to, "float": lambda t, x: _cast(t, x, torch.float32),
    "double": lambda t, x: _cast(t, x, torch.float64), "bool": lambda t, x: _cast(t, x, torch.bool),
    "zeros_like": _like(0.0), "ones_like": _like(1.0), "full_like": _like(None),
    "zeros": _made(0.0, False), "ones": _made(1.0, False), "full": _made(None, False),
    "new_zeros": _made(0.0, True), "new_ones": _made(1.0, True), "new_full": _made(None, True),
    "tensor": _tensor, "scalar_tensor": _tensor,
    "clamp_min": lambda t, input, min: _clamp(t, input, min), "clamp_max": lambda t, input, max:
    _clamp(t, input, None, max),
    "leaky_relu": _parameters(f.leaky_relu, "negative_slope"), "elu": _parameters(f.elu, "alpha", "scale", "input_scale"),
    "selu": _parameters(f.selu), "celu": _parameters(f.celu, "alpha"), "silu": _parameters(f.silu),
    "gelu": _parameters(f.gelu, "approximate"), "softplus": _parameters(f.softplus, "beta", "threshold"),
    "hardsigmoid": _parameters(f.hardsigmoid), "hardswish": _parameters(f.hardswish),
    "hardtanh": _parameters(f.hardtanh, "min_val", "max_val"), "hardshrink": _parameters(f.hardshrink, "lambd"),
    "softshrink": _parameters(f.softshrink, "lambd"), "mish": _parameters(f.mish),
    "threshold": _parameters(f.threshold, "threshold", "value"),
    "relu": _parameters(primitive("relu")),
}  # fmt: skip


# --- the call ----------------------------------------------------------------------------------------------------------


def call(t: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__", "__delete__"):
        return _attribute(t, func, name, args)
    name = _ALIASES.get(name, name)
    if name in _ASKED:
        return func(*args, **kwargs)
    if name.startswith("__i") and name not in ("__iter__", "__invert__", "__index__", "__int__"):
        raise NotTraced(f"{name}, which changes a tensor in place: write x = x + y, not x += y")
    if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace"):
        raise NotTraced(f"{name}, which changes a tensor in place: write a new value, as x = x.mul(2) or torch.where")
    if name in _RANDOM:
        raise NotTraced(_random_words(name))
    if name in _VALUE:
        raise NotTraced(f"a branch on a value ({name}): which way it goes differs by row; write torch.where")
    if args and isinstance(args[0], Value) and args[0].weight is not None:
        if name in ("t", "transpose", "permute", "swapaxes", "swapdims"):
            return _turned(t, args[0])
    if name == "max" and len(args) == 2 and isinstance(args[1], Tensor):
        name = "maximum"
    if name == "min" and len(args) == 2 and isinstance(args[1], Tensor):
        name = "minimum"
    if name == "__iter__":
        return iter(t.move(torch.unbind, args, {}, "unpacking"))
    if name in _MOVES:
        return t.move(func, args, kwargs, name)
    handler = _HANDLERS.get(name)
    try:
        if handler is not None:
            return handler(t, *args, **kwargs)
        if name in _POINTWISE:
            return t.pointwise(_POINTWISE[name], *args, **_renamed(kwargs))
        if name in _TRUTHS:
            return t.pointwise(_TRUTHS[name], *args, *kwargs.values(), dtype=torch.bool)
    except TypeError as e:
        raise NotTraced(f"{name} with these arguments: {e}") from e
    instead = f"; write {_INSTEAD[name]}" if name in _INSTEAD else ""
    raise NotTraced(f"{name}, for which no kernel is made{instead}")


def _renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs:
        raise TypeError(f"give {', '.join(kwargs)} by position")
    return {}


def _turned(t: Tracer, w: Value) -> Value:
    turned = t.tensor((w.shape[1], w.shape[0]), ())
    turned.weight, turned.turned = w.weight, not w.turned
    return turned


def _attribute(t: Tracer, func: Any, kind: str, args: tuple[Any, ...]) -> Any:
    name = getattr(getattr(func, "__self__", None), "__name__", "an attribute")
    if kind != "__get__":
        raise NotTraced(f"setting .{name} of a tensor: write a new value")
    if name in ("T", "mT") and isinstance(args[0], Value) and args[0].weight is not None:
        return _turned(t, args[0])
    if name == "data":
        return _detach(t, args[0])
    if name in _ASKED:
        return func(*args)
    raise NotTraced(f"the attribute .{name} of a tensor")


def _random_words(name: str) -> str:
    return f"random numbers inside the step ({name}): draw masks outside, and hand them in as per_step inputs"
