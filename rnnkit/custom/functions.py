"""torch's pointwise functions written by the few that kernels know, each as safe in float32 and as torch at its edges.

Where a branch of `where` could be infinite, its argument is held off first: the derivative would be 0 · inf. No
formula takes -|x| where a derivative at 0 matters, for that of |x| is 0 there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from rnnkit.custom.errors import NotTraced
from rnnkit.custom.term import Term


def primitive(op: str) -> Callable[..., Term]:
    return lambda x, *others: x.point(op, *others)


def truth(x: Term) -> Term:
    return x.point("ne", 0)


def no(x: Term) -> Term:
    return x.same(0)


def both(a: Term, b: Term) -> Term:
    return truth(a) * truth(b)


def either(a: Term, b: Term) -> Term:
    return truth(a).point("maximum", truth(b))


def differ(a: Term, b: Term) -> Term:
    return truth(a).point("ne", truth(b))


def sign(x: Term) -> Term:
    return (x > 0) - (x < 0)


def ceil(x: Term) -> Term:
    return -(-x).point("floor")


def trunc(x: Term) -> Term:
    return (x < 0).where(ceil(x), x.point("floor"))


def clamp(x: Term, low: Term | None = None, high: Term | None = None) -> Term:
    """The gradient goes through at the bounds themselves."""
    if low is not None:
        x = (x < low).where(low, x)
    if high is not None:
        x = (x > high).where(high, x)
    return x


def hardtanh(x: Term, low: float = -1.0, high: float = 1.0) -> Term:
    """The gradient stops at the bounds."""
    return (x <= low).where(low, (x >= high).where(high, x))


def hardsigmoid(x: Term) -> Term:
    return (x <= -3).where(0, (x >= 3).where(1, (x + 3) / 6))


def hardswish(x: Term) -> Term:
    return (x <= -3).where(0, (x >= 3).where(x, x * (x + 3) / 6))


def leaky_relu(x: Term, slope: float = 0.01) -> Term:
    return (x > 0).where(x, x * slope)


def elu(x: Term, alpha: float = 1.0, scale: float = 1.0, inner: float = 1.0) -> Term:
    below = (x > 0).where(0, x)
    return (x > 0).where(x * scale, (below * inner).point("expm1") * (alpha * scale))


def selu(x: Term) -> Term:
    return elu(x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def celu(x: Term, alpha: float = 1.0) -> Term:
    return elu(x, alpha, 1.0, 1 / alpha)


def silu(x: Term) -> Term:
    return x * x.point("sigmoid")


def softplus(x: Term, beta: float = 1.0, threshold: float = 20.0) -> Term:
    scaled = x * beta
    far = scaled > threshold
    near = far.where(0, scaled).point("exp").point("log1p") / beta
    return far.where(x, near)


def logsigmoid(x: Term) -> Term:
    below = x < 0
    return below.where(x, 0) - below.where(x, -x).point("exp").point("log1p")


def logaddexp(a: Term, b: Term) -> Term:
    below = a < b
    apart = a - b
    return below.where(b, a) + below.where(apart, -apart).point("exp").point("log1p")


def mish(x: Term) -> Term:
    return x * softplus(x).point("tanh")


def gelu(x: Term, approximate: str = "none") -> Term:
    if approximate == "tanh":
        return x * 0.5 * (((x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)).point("tanh") + 1)
    return x * 0.5 * ((x * math.sqrt(0.5)).point("erf") + 1)


def softsign(x: Term) -> Term:
    return x / (x.point("abs") + 1)


def hardshrink(x: Term, bound: float = 0.5) -> Term:
    return (x.point("abs") <= bound).where(0, x)


def softshrink(x: Term, bound: float = 0.5) -> Term:
    return (x.point("abs") <= bound).where(0, (x > 0).where(x - bound, x + bound))


def threshold(x: Term, at: float, value: float) -> Term:
    return (x <= at).where(value, x)


def lerp(a: Term, b: Term, weight: Term) -> Term:
    """a itself at weight 0, b itself at 1."""
    return (1 - weight) * a + weight * b


def sinh(x: Term) -> Term:
    e = x.point("expm1")
    return (e + e / (e + 1)) * 0.5


def cosh(x: Term) -> Term:
    return (x.point("exp") + (-x).point("exp")) * 0.5


def tan(x: Term) -> Term:
    return x.point("sin") / x.point("cos")


def power(x: Term, exponent: Term) -> Term:
    """Of a constant exponent, or a positive constant to any power."""
    p, base = x.graph.value(exponent.n), x.graph.value(x.n)
    if p is None and base is not None and base > 0:
        return (exponent * math.log(base)).point("exp")
    if p is None:
        raise NotTraced("a power whose exponent is no number: write torch.exp(y * torch.log(x))")
    return _powers[p](x) if p in _powers else x.point("pow", p)


_powers: dict[float, Callable[[Term], Term]] = {
    0.0: lambda x: x.like(1.0),
    1.0: lambda x: x,
    2.0: lambda x: x * x,
    3.0: lambda x: x * x * x,
    4.0: lambda x: (x * x) * (x * x),
    0.5: lambda x: x.point("sqrt"),
    -0.5: lambda x: x.point("rsqrt"),
    -1.0: lambda x: x.point("reciprocal"),
    -2.0: lambda x: (x * x).point("reciprocal"),
}


def root_or_zero(x: Term) -> Term:
    """The square root, whose derivative at 0 is 0 here, as that of a norm or of a standard deviation is."""
    zero = x.same(0)
    return zero.where(0, zero.where(1, x).point("sqrt"))
