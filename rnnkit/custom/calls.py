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
from rnnkit.custom.errors import NO_GRAD, NotTraced, StepError
from rnnkit.custom.functions import primitive
from rnnkit.custom.over_rows import DTYPE, ROWS, own_dtype
from rnnkit.custom.term import Term
from rnnkit.custom.trace import Tracer, Value


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ASKED = _words(  # of a tensor, what Python may know while tracing
    "shape size dim ndim ndimension numel nelement dtype device layout is_floating_point is_complex "
    "is_contiguous stride __len__ element_size is_cuda is_cpu is_meta is_sparse is_quantized is_nested "
    "result_type promote_types get_device is_tensor is_storage __hash__"
)

_MOVES = _words(
    "chunk unsafe_chunk split unsafe_split split_with_sizes tensor_split hsplit narrow __getitem__ select unbind "
    "unflatten flatten view reshape view_as reshape_as expand expand_as broadcast_to broadcast_tensors repeat tile "
    "unsqueeze squeeze permute movedim moveaxis transpose swapaxes swapdims flip roll cat concat concatenate hstack "
    "stack index_select contiguous clone alias positive __pos__ requires_grad_"
)

_ALIASES = {
    "__add__": "add", "__radd__": "add", "__sub__": "sub", "__mul__": "mul", "__rmul__": "mul", "__truediv__": "div",
    "__div__": "div", "__neg__": "neg", "__abs__": "abs", "__lt__": "lt", "__le__": "le", "__gt__": "gt",
    "__ge__": "ge", "__eq__": "eq", "__ne__": "ne", "__and__": "logical_and", "__or__": "logical_or",
    "__xor__": "logical_xor", "__rand__": "logical_and", "__ror__": "logical_or", "__rxor__": "logical_xor",
    "__invert__": "logical_not", "bitwise_and": "logical_and", "bitwise_or": "logical_or",
    "bitwise_xor": "logical_xor", "bitwise_not": "logical_not", "__pow__": "pow", "subtract": "sub",
    "multiply": "mul", "divide": "div", "true_divide": "div", "negative": "neg", "absolute": "abs", "less": "lt",
    "less_equal": "le", "greater": "gt", "greater_equal": "ge", "not_equal": "ne", "clip": "clamp", "sgn": "sign",
    "expit": "sigmoid", "fix": "trunc", "swish": "silu", "log_sigmoid": "logsigmoid", "_threshold": "threshold",
    "special_expit": "sigmoid", "special_expm1": "expm1",
    "special_log1p": "log1p", "special_erf": "erf", "special_logsumexp": "logsumexp", "special_softmax": "softmax",
    "special_log_softmax": "log_softmax", "rsub": "__rsub__", "__rdiv__": "__rtruediv__", "mm": "matmul",
    "__matmul__": "matmul", "mv": "matmul", "float_power": "pow",
}  # fmt: skip

_POINTWISE: dict[str, Callable[..., Term]] = {
    **{
        op: primitive(op)
        for op in _words(
            "div maximum minimum neg abs sigmoid tanh exp expm1 log log1p sqrt rsqrt reciprocal sin cos erf "
            "floor"
        )
    },
    "sign": f.sign, "ceil": f.ceil, "trunc": f.trunc, "frac": lambda x: x - f.trunc(x), "square": lambda x: x * x,
    "exp2": lambda x: (x * math.log(2)).point("exp"), "log2": lambda x: x.point("log") * (1 / math.log(2)),
    "log10": lambda x: x.point("log") * (1 / math.log(10)), "sinh": f.sinh, "cosh": f.cosh, "tan": f.tan,
    "relu6": lambda x: f.hardtanh(x, 0.0, 6.0), "softsign": f.softsign, "logsigmoid": f.logsigmoid,
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
    "isfinite": lambda x: x.point("abs") < math.inf,
    "isinf": lambda x: x.point("abs").same(math.inf),
    "signbit": lambda x: x < 0,
}
"""Those whose result is true or false."""

_RANDOM = _words(
    "rand randn randint randperm rand_like randn_like randint_like bernoulli normal multinomial poisson dropout1d "
    "dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout rrelu uniform_ normal_ bernoulli_ random_ "
    "exponential_ gumbel_softmax geometric_ log_normal_ cauchy_ binomial"
)
_VALUE = _words("__float__ __int__ __index__ item tolist numpy __contains__ equal allclose is_nonzero nonzero")
_INSTEAD = {
    "max": "torch.amax over units, torch.maximum of two tensors",
    "min": "-torch.amax(-x, -1) over units, torch.minimum of two tensors",
    "amin": "-torch.amax(-x, -1)",
    "group_norm": "F.layer_norm of each block",
    "einsum": "F.linear with a declared weight",
    "bmm": "F.linear with a declared weight",
    "addmm": "F.linear with a declared weight",
    "nan_to_num": "torch.where(x != x, 0, x)",
    "atan2": "torch.sin and torch.cos of what makes the angle",
    "T": "F.linear for a product",
    "remainder": "x - torch.floor(x / y) * y",
    "__mod__": "x - torch.floor(x / y) * y",
    "__floordiv__": "torch.floor(x / y)",
    "floor_divide": "torch.floor(x / y)",
    "arange": "a parameter per unit, or an input per step",
    "eye": "a declared weight",
    "linspace": "a parameter per unit",
    "fmax": "torch.maximum",
    "fmin": "torch.minimum",
    "cumsum": "another form: a unit's value may not depend on its place among the others",
}


# --- the few that have parameters, in torch's own signatures ---------------------------------------------------------


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
    if not _truths(condition) and _truths(input):  # x.where(condition, y)
        condition, input = input, condition
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
        raise StepError(_random_words("dropout"))
    return input


def _prelu(t: Tracer, input: Any, weight: Any) -> Value:
    return t.pointwise(lambda x, w: (x > 0).where(x, w * x), input, weight)


def _glu(t: Tracer, input: Any, dim: int = -1) -> Value:
    a, b = t.move(torch.chunk, (input, 2, dim), {}, "glu")
    return t.pointwise(lambda x, y: x * y.point("sigmoid"), a, b)


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
                for name, mine in zip(names, own, strict=True)
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


# --- products --------------------------------------------------------------------------------------------------------


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


# --- dtypes, constants -----------------------------------------------------------------------------------------------


def _cast(t: Tracer, input: Any, dtype: Any) -> Value:
    x = t.as_value(input, "a cast")
    if dtype == x.dtype:
        return x
    if x.dtype == torch.bool and dtype.is_floating_point:
        return t.tensor(x.shape, x.nodes)
    if dtype == torch.bool:
        return t.pointwise(f.truth, x, dtype=torch.bool)
    raise NotTraced(f"a change of dtype, {x.dtype} to {dtype}: {DTYPE}")


_CASTS = {
    "float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16,
    "bool": torch.bool, "int": torch.int32, "long": torch.int64, "short": torch.int16, "char": torch.int8,
    "byte": torch.uint8,
}  # fmt: skip


def _caster(dtype: torch.dtype) -> Callable[..., Value]:
    return lambda t, input: _cast(t, input, dtype)


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
        own_dtype(kwargs.get("dtype"), t, "a constant")
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
        own_dtype(kwargs.get("dtype"), t, "a constant")
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
    "dropout": _dropout, "prelu": _prelu, "glu": _glu, "detach": _detach, "linear": _linear, "matmul": _matmul, 
    
     
    "to": _to,
    "type": _to, "type_as": _to, 
    **{name: _caster(dtype) for name, dtype in _CASTS.items()}, 
    **ROWS, "zeros_like": _like(0.0), "ones_like": _like(1.0), "full_like": _like(None),
    "zeros": _made(0.0, False), "ones": _made(1.0, False), "full": _made(None, False),
    "new_zeros": _made(0.0, True), "new_ones": _made(1.0, True), "new_full": _made(None, True),
    "tensor": _tensor, "scalar_tensor": _tensor,
    "clamp_min": lambda t, input, min: _clamp(t, input, min), "clamp_max": lambda t, input, max:
    _clamp(t, input, None, max),
    "leaky_relu": _parameters(f.leaky_relu, "negative_slope"), 
    "elu": _parameters(f.elu, "alpha", "scale", "input_scale"),
    "selu": _parameters(f.selu), "celu": _parameters(f.celu, "alpha"), "silu": _parameters(f.silu),
    "gelu": _parameters(f.gelu, "approximate"), "softplus": _parameters(f.softplus, "beta", "threshold"),
    "hardsigmoid": _parameters(f.hardsigmoid), "hardswish": _parameters(f.hardswish),
    "hardtanh": _parameters(f.hardtanh, "min_val", "max_val"), "hardshrink": _parameters(f.hardshrink, "lambd"),
    "softshrink": _parameters(f.softshrink, "lambd"), "mish": _parameters(f.mish),
    "threshold": _parameters(f.threshold, "threshold", "value"),
    "relu": _parameters(lambda x: x.point("relu")),
}  # fmt: skip


# --- the call --------------------------------------------------------------------------------------------------------


def call(t: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__", "__delete__"):
        return _attribute(t, func, name, args)
    name = _ALIASES.get(name, name)
    if name in _ASKED:
        return func(*args, **kwargs)
    if name == "_set_grad_enabled":
        raise NotTraced(NO_GRAD)
    if name.startswith("__i") and name not in ("__iter__", "__invert__", "__index__", "__int__"):
        raise NotTraced(f"{name}, which changes a tensor in place: write x = x + y, not x += y")
    if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace"):
        raise NotTraced(f"{name}, which changes a tensor in place: write a new value, as x = x.mul(2) or torch.where")
    if name in _RANDOM:
        raise StepError(_random_words(name))
    if name in ("__bool__", "any", "all"):
        raise NotTraced(f"a branch on values ({name}): they differ by row and unit; write torch.where")
    if name in _VALUE:
        raise NotTraced(f"{name}, which reads a tensor's value into Python: it differs by row; stay with tensors")
    kwargs.pop("inplace", None)
    if name in ("t", "transpose", "permute", "swapaxes", "swapdims") and _weight(args[0]):
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


def _weight(x: Any) -> bool:
    return isinstance(x, Value) and x.weight is not None


def _turned(t: Tracer, w: Value) -> Value:
    turned = t.tensor((w.shape[1], w.shape[0]), ())
    turned.weight, turned.turned = w.weight, not w.turned
    return turned


def _attribute(t: Tracer, func: Any, kind: str, args: tuple[Any, ...]) -> Any:
    name = getattr(getattr(func, "__self__", None), "__name__", "an attribute")
    if kind != "__get__":
        raise NotTraced(f"setting .{name} of a tensor: write a new value")
    if name in ("T", "mT") and _weight(args[0]):
        return _turned(t, args[0])
    if name == "data":
        return _detach(t, args[0])
    if name in _ASKED:
        return func(*args)
    raise NotTraced(f"the attribute .{name} of a tensor")


def _random_words(name: str) -> str:
    return f"random numbers inside the step ({name}): draw masks outside, and hand them in as per_step inputs"
