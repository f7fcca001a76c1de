"""Autocast on a CPU: outputs and states come out in the dtype that torch.nn gives, as close to float64 as torch.nn's
are, and gradients reach float32 weights as float32. torch's own rules differ from cell to cell, so nothing is
written down here: torch.nn is asked each time.

torch.nn.LSTM raises in float16, and in bfloat16 on processors without AVX-512, where oneDNN has no such LSTM. There
ours has to run all the same, and torch.nn is asked with oneDNN off.
"""

from __future__ import annotations

import copy
import itertools
import os
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from support import band, error, flat, gradients, lacks_onednn_lstm, ours
from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)
halves = pytest.mark.parametrize("half", HALVES, ids=["bfloat16", "float16"])
T, B, I, H = 5, 4, 6, 8
MODULES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "rnn_tanh": (nn.RNN, {}),
    "lstm": (nn.LSTM, {}),
    "lstm-proj": (nn.LSTM, {"proj_size": 3}),
    "gru": (nn.GRU, {}),
    "lstm-stack": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "gru-stack": (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "lstm-no-bias": (nn.LSTM, {"bias": False}),
    "RNNCell": (nn.RNNCell, {}),
    "LSTMCell": (nn.LSTMCell, {}),
    "GRUCell": (nn.GRUCell, {}),
    "GRUCell-no-bias": (nn.GRUCell, {"bias": False}),
}
kinds = pytest.mark.parametrize("kind", MODULES)


def made(kind: str) -> tuple[nn.Module, Tensor, list[Tensor]]:
    """torch.nn's module, an input and states, all exact in float16 and bfloat16."""
    cls, kwargs = MODULES[kind]
    module = cls(I, H, **kwargs)
    cell = "Cell" in kind
    count = 1 if cell else module.num_layers * (2 if module.bidirectional else 1)
    sizes = [getattr(module, "proj_size", 0) or H] + ([H] if "lstm" in kind.lower() else [])
    shapes = [(B, I) if cell else (T, B, I), *((B, n) if cell else (count, B, n) for n in sizes)]
    if getattr(module, "batch_first", False):
        shapes[0] = (B, T, I)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p.bfloat16().half())
    x, *state = (torch.randn(shape).bfloat16().clamp(-4, 4).half().float() for shape in shapes)
    return module, x, state


def run(module: nn.Module, x: Tensor, state: list[Tensor], half: torch.dtype | None) -> tuple[list[Tensor], Any]:
    """Outputs, and the gradient of everything; `half` None: without autocast."""
    leaves = [v.clone().requires_grad_() for v in (x, *state)]
    hx = None if not state else tuple(leaves[1:]) if len(state) == 2 else leaves[1]
    with torch.autocast("cpu", half, enabled=half is not None):
        outputs = flat(module(leaves[0], hx))
    every = dict(zip(("input", "h", "c"), leaves)) | dict(module.named_parameters())
    return [v.detach() for v in outputs], gradients(outputs, every)


def without_primitive(theirs: nn.Module, x: Tensor, state: list[Tensor], half: torch.dtype) -> tuple[list[Tensor], Any]:
    """What torch.nn gives where oneDNN has no LSTM in `half`. In float16 that is its chain of small operators
    under autocast. In bfloat16 it is the module in bfloat16, which is what oneDNN's LSTM makes of it elsewhere, with
    gradients in the dtypes of what they belong to."""
    with torch.backends.mkldnn.flags(enabled=False):
        if half == torch.float16:
            return run(theirs, x, state, half)
        outputs, grads = run(copy.deepcopy(theirs).to(half), x.to(half), [v.to(half) for v in state], None)
    dtypes = dict(zip(("grad of input", "grad of h", "grad of c"), (v.dtype for v in (x, *state))))
    return outputs, {name: g.to(dtypes.get(name, torch.float32)) for name, g in grads.items()}


@kinds
@halves
def test_dtypes_and_numbers(kind: str, half: torch.dtype) -> None:
    wide: list[torch.dtype | None] = [torch.float32, half]
    mixed = list(itertools.product(wide, repeat=2)) if "lstm" in kind.lower() else [(v, v) for v in wide]
    for xs, states in itertools.product(wide, [None, *mixed]):
        theirs, x, state = made(kind)
        mine = ours(theirs)
        state = [] if states is None else [v.to(dtype) for v, dtype in zip(state, states)]
        got, got_grads = run(mine, x.to(xs), state, half)
        truth, true_grads = run(theirs.double(), x.double(), [v.double() for v in state], None)
        if kind in ("lstm", "lstm-stack", "lstm-no-bias") and lacks_onednn_lstm(half):
            expected, expected_grads = without_primitive(theirs.float(), x.to(xs), state, half)
        else:
            expected, expected_grads = run(theirs.float(), x.to(xs), state, half)
        where = f"x {xs}, states {states}"
        assert [v.dtype for v in got] == [v.dtype for v in expected], where
        for v, theirs_v, t in zip(got, expected, truth):
            assert error(v, t) <= 2 * error(theirs_v, t) + band(t, half), where
        for name, g in got_grads.items():
            assert g.dtype == expected_grads[name].dtype, f"{name}, {where}"
            allowed = 2 * error(expected_grads[name], true_grads[name]) + band(true_grads[name], half)
            assert error(g, true_grads[name]) <= allowed, f"{name}, {where}"


@kinds
@halves
def test_without_onednn(kind: str, half: torch.dtype) -> None:
    """With oneDNN off, torch's LSTM is a chain of small operators and gives other dtypes; so does ours."""
    theirs, x, state = made(kind)
    mine = ours(theirs)
    with torch.backends.mkldnn.flags(enabled=False):
        got, _ = run(mine, x, state, half)
        expected, _ = run(theirs, x, state, half)
    assert [v.dtype for v in got] == [v.dtype for v in expected]


@kinds
@halves
def test_a_float64_module_under_autocast(kind: str, half: torch.dtype) -> None:
    """Autocast leaves float64 alone, as in torch.nn; where torch.nn cannot run, ours does and stays in float64."""
    theirs, x, state = made(kind)
    mine = ours(theirs.double())
    arguments = (x.double(), [v.double() for v in state], half)
    got, _ = run(mine, *arguments)
    try:
        wanted = [v.dtype for v in run(theirs, *arguments)[0]]
    except RuntimeError:
        wanted = [torch.float64] * len(got)
    assert [v.dtype for v in got] == wanted


@kinds
@halves
def test_backward_inside_and_nested(kind: str, half: torch.dtype) -> None:
    """Backward may run inside the block, and an inner block may switch autocast off."""
    theirs, x, state = made(kind)
    mine = ours(theirs)
    hx = tuple(state) if len(state) == 2 else state[0]
    with torch.autocast("cpu", half):
        sum(v.float().sum() for v in flat(mine(x, hx))).backward()
        with torch.autocast("cpu", enabled=False):
            inner = flat(mine(x, hx))
    plain = flat(mine(x, hx))
    assert all(torch.equal(u, v) and u.dtype == torch.float32 for u, v in zip(inner, plain))
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in mine.parameters())


HELD = """
import torch, rnnkit
from torch import nn
torch.manual_seed(0)
theirs = nn.LSTM(6, 8, 2, bidirectional=True)
ours, x = rnnkit.convert(__import__("copy").deepcopy(theirs)), torch.randn(5, 4, 6)
want = theirs.double()(x.double())[0]
try:
    with torch.autocast("cpu", torch.bfloat16):
        theirs.float()(x)
    print("torch.nn runs")
except RuntimeError as error:
    assert "could not create a primitive descriptor" in str(error), error
    print("torch.nn raises")
with torch.autocast("cpu", torch.bfloat16):
    y, (h, c) = ours(x)
    y.float().sum().backward()
assert y.dtype == h.dtype == c.dtype == torch.bfloat16
assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any() for p in ours.parameters())
assert (y.double() - want).abs().max() <= 0.02, (y.double() - want).abs().max()  # |y| < 1, eps 2^-8
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN is held to a set of x86-64")
def test_bfloat16_where_onednn_has_no_lstm_for_it() -> None:
    """Every x86-64 processor can be held to AVX2, where torch.nn's LSTM raises under autocast. Ours runs."""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "RNNKIT_CPU_ISA": "avx2"}
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.nn raises"
