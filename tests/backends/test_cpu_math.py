"""sigmoid and tanh of the CPU engine against 64-bit significands (numpy's long double), on every variant.

Every exponent of the type, subnormal numbers included. An error is counted in ulp of the true result; where that is
subnormal, in units of the smallest subnormal number. The variant is chosen once in a process, so each one has its own:
this file run as a program prints its largest errors. All 2^32 float32 are held by the harness: `--exhaustive`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from rnnkit.backends.cpu import extension

pytestmark = [
    pytest.mark.skipif(not extension.available(), reason=extension.reason()),
    pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="long double is no wider than double here"),
]

NAMES = ("sigmoid", "tanh")
MOST = 4.0
"""Ulp, the promise of csrc/cpu/math.h."""


def exact(name: str, x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.longdouble)
    with np.errstate(over="ignore", under="ignore"):
        return np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-wide))


def in_ulp(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """The error of `got`, in units of the last place that its type has at `want`."""
    info = np.finfo(got.dtype)
    exponent = np.frexp(want)[1] - 1
    exponent = np.maximum(np.where(want == 0, info.minexp, exponent), info.minexp)
    return np.abs(got.astype(np.longdouble) - want) / np.ldexp(np.longdouble(1), exponent - info.nmant)


def grid(dtype: type) -> np.ndarray:
    """Both signs of every exponent, subnormal numbers included, each with even, random and outermost significands."""
    unsigned = {np.float32: np.uint32, np.float64: np.uint64}[dtype]
    info, g = np.finfo(dtype), np.random.default_rng(7)
    exponents = np.arange(2 * info.maxexp - 1, dtype=np.uint64)
    spread = np.arange(64, dtype=np.uint64) << np.uint64(info.nmant - 6)
    ends = np.array([0, 1, 2, (1 << info.nmant) - 1], dtype=np.uint64)
    some = g.integers(0, 1 << info.nmant, 400 if dtype is np.float32 else 60, dtype=np.uint64)
    low = np.concatenate([spread, ends, some])
    bits = ((exponents[:, None] << np.uint64(info.nmant)) | low).ravel().astype(unsigned)
    x = bits.view(dtype)
    near = np.linspace(-110 if dtype is np.float32 else -750, 30, 200_000).astype(dtype)  # where they are not flat
    return np.concatenate([x, -x, near])


def run(name: str, x: np.ndarray) -> np.ndarray:
    return torch.ops.rnnkit.cpu_function(NAMES.index(name), torch.from_numpy(x)).numpy()


def measure() -> dict[str, list[float]]:
    """The largest error of each function and type, and where it is."""
    found = {}
    for name in NAMES:
        for dtype in (np.float32, np.float64):
            x = grid(dtype)
            error = in_ulp(run(name, x), exact(name, x))
            worst = int(np.argmax(error))
            found[f"{name} {np.dtype(dtype)}"] = [float(error[worst]), float(x[worst])]
    return found


def variants() -> list[str]:
    return torch.ops.rnnkit.cpu_variants().split()[1:] if extension.available() else []


@pytest.mark.parametrize("variant", variants())
def test_error(variant: str) -> None:
    env = {**os.environ, "RNNKIT_CPU_ISA": variant}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("variant") == variant
    assert len(found) == 4
    for what, (error, at) in found.items():
        assert error <= MOST, f"{what}: {error} ulp at {at!r}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, -nan, 1e30, -1e30], dtype=dtype)
    sigmoid, tanh = (torch.ops.rnnkit.cpu_function(which, x) for which in (0, 1))
    assert tanh[:4].tolist() == [0, 0, 1, -1] and tanh[6:].tolist() == [1, -1]
    assert torch.signbit(tanh[:2]).tolist() == [False, True]
    assert sigmoid[:4].tolist() == [0.5, 0.5, 1, 0] and sigmoid[6:].tolist() == [1, 0]
    assert tanh[4:6].isnan().all() and sigmoid[4:6].isnan().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bounds_and_symmetry(name: str, dtype: type) -> None:
    """No value beyond the limits, and tanh odd to the bit."""
    x = grid(dtype)
    got = run(name, x)
    assert got.max() <= 1 and got.min() >= (0 if name == "sigmoid" else -1)
    if name == "tanh":
        assert np.array_equal(run(name, -x), -got)
        assert np.array_equal(np.signbit(got), np.signbit(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_number_of_values(name: str, dtype: type) -> None:
    """The last values of a tensor, fewer than a vector holds, get the same as in its middle."""
    x = np.random.default_rng(3).standard_normal(70).astype(dtype)
    whole = run(name, x)
    for count in range(len(x)):
        assert np.array_equal(run(name, x[:count].copy()), whole[:count])


def test_messages() -> None:
    with pytest.raises(RuntimeError, match=r"which must be 0 \(sigmoid\) or 1 \(tanh\), got 2"):
        torch.ops.rnnkit.cpu_function(2, torch.zeros(3))
    for wrong in (torch.zeros(3, dtype=torch.bfloat16), torch.zeros(4, 4).T[1:]):
        with pytest.raises(RuntimeError, match="x must be contiguous Float or Double on the CPU"):
            torch.ops.rnnkit.cpu_function(0, wrong)


if __name__ == "__main__":
    print(json.dumps({"variant": torch.ops.rnnkit.cpu_variants().split()[0], **measure()}))
