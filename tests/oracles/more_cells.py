"""Ten cells of other shapes than the variants: numbers of gates and states that no known cell has, sums over a row,
products in a chain, branches, powers. Each has its step once more for one row, as in variant_cells."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F
from variant_cells import Oracle, from_h, from_x, sums, times

import rnnkit
from rnnkit import per_step, per_unit, weight


class OneGateThreeStates(rnnkit.Cell):
    """Moving averages of three speeds; only the first product's state feeds back."""

    gates, states = 1, ("fast", "mid", "slow")
    rate = per_unit()

    @staticmethod
    def step(a, fast, mid, slow, rate):
        p = torch.sigmoid(rate)
        fast = torch.tanh(a + 0.5 * slow)
        mid = torch.lerp(mid, fast, 0.25)
        return fast, mid, p * slow + (1 - p) * mid


def one_gate_three_states(x, s, p, e, phi, sigma):
    fast = phi(sums(p, 1, x, s[0])[0] + s[2] / 2)
    mid = 0.75 * s[1] + 0.25 * fast
    share = 1 / (1 + torch.exp(-p["rate"]))
    return [fast, mid, mid + share * (s[2] - mid)]


class FiveGatesOneState(rnnkit.Cell):
    """A gate of every activation."""

    gates, states = 5, ("h",)

    @staticmethod
    def step(gx, gh, h):
        a, b, c, d, e = (gx * torch.sigmoid(gh)).chunk(5, -1)
        return F.silu(a) * torch.tanh(h) + F.gelu(b) * F.softplus(c) * 0.5 + F.elu(d) * F.hardtanh((e + 3) / 6, 0, 1)


def five_gates_one_state(x, s, p, e, phi, sigma):
    (h,) = s
    v = [from_x(p, k, x, len(h)) * sigma(from_h(p, k, h)) for k in range(5)]
    normal = 0.5 * v[1] * (1 + torch.erf(v[1] / math.sqrt(2)))
    bent = torch.where(v[3] > 0, v[3], torch.exp(v[3]) - 1)
    ramp = ((v[4] + 3) / 6).clamp(0, 1)
    return [v[0] * sigma(v[0]) * phi(h) + normal * torch.log(1 + torch.exp(v[2])) / 2 + bent * ramp]


class Chain(rnnkit.Cell):
    """Two weights, one after the other."""

    gates, states = 2, ("h",)
    w_in, w_out = weight(1), weight(2)

    @staticmethod
    def step(gx, h, w_in, w_out):
        b, c = F.linear(torch.tanh(F.linear(h, w_in)), w_out).chunk(2, -1)
        x, z = gx.chunk(2, -1)
        z = torch.sigmoid(z + c)
        return z * h + (1 - z) * torch.tanh(x + b)


def chain(x, s, p, e, phi, sigma):
    (h,) = s
    inner = phi(times(p, "w_in", 0, h))
    z = sigma(from_x(p, 1, x, len(h)) + times(p, "w_out", 1, inner))
    new = phi(from_x(p, 0, x, len(h)) + times(p, "w_out", 0, inner))
    return [new + z * (h - new)]


class SoftmaxUnits(rnnkit.Cell):
    """Units compete for what is let in."""

    gates, states = 2, ("h", "c")

    @staticmethod
    def step(a, h, c):
        score, value = a.chunk(2, -1)
        c = 0.9 * c + torch.softmax(score, -1) * value
        return torch.tanh(c), c


def softmax_units(x, s, p, e, phi, sigma):
    score, value = sums(p, 2, x, s[0])
    share = torch.exp(score) / sum(torch.exp(score).unbind())
    c = s[1] - s[1] / 10 + share * value
    return [phi(c), c]


class RmsState(rnnkit.Cell):
    """The state is held to a length, by what it was."""

    gates, states = 1, ("h",)
    gain = per_unit()

    @staticmethod
    def step(a, h, gain):
        return F.rms_norm(h + torch.tanh(a), h.shape[-1:], gain, 1e-3)


def rms_state(x, s, p, e, phi, sigma):
    v = s[0] + phi(sums(p, 1, x, s[0])[0])
    return [v * p["gain"] / torch.sqrt((v @ v) / len(v) + 1e-3)]


class TwiceTheRow(rnnkit.Cell):
    """One input of a row, used in two places; and one of each unit."""

    gates, states = 2, ("h",)
    time, drive = per_step("row"), per_step("unit")

    @staticmethod
    def step(a, h, time, drive):
        z, n = a.chunk(2, -1)
        z = torch.exp(-time * torch.sigmoid(z))
        return z * h + (1 - z) * torch.tanh(n + time * drive)


def twice_the_row(x, s, p, e, phi, sigma):
    z, n = sums(p, 2, x, s[0])
    keep = torch.exp(sigma(z)) ** -e["time"]
    new = phi(n + e["drive"] * e["time"])
    return [new + keep * (s[0] - new)]


class Branches(rnnkit.Cell):
    """Each unit goes one way or the other."""

    gates, states = 2, ("h", "c")
    limit = per_unit()

    @staticmethod
    def step(a, h, c, limit):
        x, y = a.chunk(2, -1)
        c = torch.where(x > limit, c + limit * torch.tanh(x), 0.5 * c - torch.sin(y))
        return torch.where((c < 0) & (y <= 0.3), -0.1 * c, torch.cos(c) * torch.sigmoid(y)), c


def branches(x, s, p, e, phi, sigma):
    out = []
    for a, b, c, limit in zip(*sums(p, 2, x, s[0]), s[1], p["limit"]):
        c = c + limit * phi(a) if a > limit else c / 2 - torch.sin(b)
        out.append((-c / 10 if c < 0 and b <= 0.3 else torch.cos(c) * sigma(b), c))
    return [torch.stack(v) for v in zip(*out)]


class NoProduct(rnnkit.Cell):
    """Complex numbers that turn and shrink, unit by unit: two states, and no weight."""

    gates, states = 2, ("re", "im")
    turn, shrink = per_unit(), per_unit()

    @staticmethod
    def step(gx, re, im, turn, shrink):
        x, y = gx.chunk(2, -1)
        size = torch.exp(-torch.exp(shrink))
        cos, sin = size * torch.cos(turn), size * torch.sin(turn)
        return cos * re - sin * im + x, sin * re + cos * im + y


def no_product(x, s, p, e, phi, sigma):
    n = len(s[0])
    turned = torch.complex(*s) * torch.exp(torch.complex(-torch.exp(p["shrink"]), p["turn"]))
    return [turned.real + from_x(p, 0, x, n), turned.imag + from_x(p, 1, x, n)]


class TwoProducts(rnnkit.Cell):
    """Both states are multiplied, by weights of their own; a third counts along and is read by nothing."""

    gates, states = 2, ("h", "c", "seen")
    w_c = weight(1)

    @staticmethod
    def step(gx, gh, h, c, seen, w_c):
        a, b = (gx + gh).chunk(2, -1)
        c = torch.tanh(b + F.linear(c, w_c))
        return torch.sigmoid(a) * c + 0.1 * h, c, seen + c.abs()


def two_products(x, s, p, e, phi, sigma):
    h, c, seen = s
    a, b = sums(p, 2, x, h)
    c = phi(b + times(p, "w_c", 0, c))
    return [h / 10 + sigma(a) * c, c, torch.where(c < 0, seen - c, seen + c)]


class Extremes(rnnkit.Cell):
    """abs, maximum, minimum, clamp, the row's largest, and the distance to it; powers and roots."""

    gates, states = 3, ("h",)

    @staticmethod
    def step(a, h):
        x, y, z = a.chunk(3, -1)
        top = torch.maximum(x, torch.minimum(y.abs(), h))
        most = z.amax(-1, keepdim=True)
        near = (1 + (most - z) ** 2) ** -0.5
        return near * top.clamp(-2, 2) - torch.sqrt(1 + h * h) * torch.relu(y).pow(3) * 0.01


def extremes(x, s, p, e, phi, sigma):
    (h,) = s
    out = []
    x, y, z = sums(p, 3, x, h)
    most = max(z.unbind())
    for a, b, c, old in zip(x, y, z, h):
        top = max(a, min(b if b > 0 else -b, old))
        top = top if -2 <= top <= 2 else torch.sign(top).detach() * 2
        cube = b * b * b if b > 0 else b * 0
        out.append(top / torch.sqrt(1 + (most - c) * (most - c)) - (1 + old * old).sqrt() * cube / 100)
    return [torch.stack(out)]


class RowStatistics(rnnkit.Cell):
    """mean, var and sum over the units, of which one goes on to the gates of every unit; one block is a slice."""

    gates, states = 3, ("h", "c")

    @staticmethod
    def step(a, h, c):
        n = h.shape[-1]
        x, y, o = a[..., :n], a[..., n : 2 * n], a[..., 2 * n :]
        centre, spread = x.mean(-1, keepdim=True), y.var(-1, keepdim=True, unbiased=False)
        c = torch.tanh(c + (x - centre) / (1 + spread)) + 0.01 * h.sum(-1, keepdim=True)
        return c * F.leaky_relu(o, 0.1).exp().reciprocal(), c


def row_statistics(x, s, p, e, phi, sigma):
    x, y, o = sums(p, 3, x, s[0])
    n = len(x)
    mean = sum(y.unbind()) / n
    spread = (y @ y) / n - mean * mean
    c = phi(s[1] + (x - sum(x.unbind()) / n) / (1 + spread)) + sum(s[0].unbind()) / 100
    return [c / torch.exp(torch.where(o > 0, o, o / 10)), c]


MORE: dict[str, Oracle] = {
    "OneGateThreeStates": Oracle(OneGateThreeStates, one_gate_three_states),
    "FiveGatesOneState": Oracle(FiveGatesOneState, five_gates_one_state),
    "Chain": Oracle(Chain, chain),
    "SoftmaxUnits": Oracle(SoftmaxUnits, softmax_units),
    "RmsState": Oracle(RmsState, rms_state),
    "TwiceTheRow": Oracle(TwiceTheRow, twice_the_row, {"time": "row", "drive": "unit"}),
    "Branches": Oracle(Branches, branches),
    "NoProduct": Oracle(NoProduct, no_product),
    "TwoProducts": Oracle(TwoProducts, two_products),
    "Extremes": Oracle(Extremes, extremes),
    "RowStatistics": Oracle(RowStatistics, row_statistics),
}
"""Name to cell and oracle; eleven, one more than were asked for."""
