"""The extension's operators, called as backend `cpu` calls them: what they refuse, strides, chunks, NaN, the library.

Their numbers are held by test_parity.py and, step by step, by harness/; here every result is compared bit by bit
with that of another call which must give the same. Threads and processes: test_extension_threads.py.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from layers import CELLS_AND_PROJECTION, ORDER, assert_same, backward, both, forward, gradients_for, make
from torch import Tensor

import rnnkit.ops
from rnnkit.backends.cpu import extension
from rnnkit.backends.cpu.backend import CELL_IDS

pytestmark = pytest.mark.skipif(not extension.available(), reason=extension.reason())

NAN = float("nan")
every_cell = pytest.mark.parametrize(("cell", "proj"), CELLS_AND_PROJECTION)
both_ways = pytest.mark.parametrize("reverse", [False, True])


@every_cell
@both_ways
def test_any_strides(cell, proj, reverse):
    layer = make(cell, proj, reverse=reverse)
    t = layer.t

    def turned(v: Tensor) -> Tensor:
        return v.transpose(0, 1).contiguous().transpose(0, 1)

    def every_second(v: Tensor) -> Tensor:
        return v.repeat_interleave(2, 0)[::2]

    kinds = {
        "x": turned(t.x),
        **{name: turned(getattr(t, name)) for name in ("w_ih", "w_hh", "w_hr", "reset", "h_reset")},
        **{name: every_second(getattr(t, name)) for name in ("h_0", "c_0", "b_ih", "b_hh", "lengths", "c_reset")},
    } if proj else {
        "x": t.x.repeat(1, 1, 2)[:, :, : t.x.shape[2]],
        **{name: turned(getattr(t, name)) for name in ("w_ih", "w_hh", "reset", "h_0")},
        **{name: every_second(getattr(t, name)) for name in ("h_reset", "b_ih", "b_hh", "lengths")},
    }  # fmt: skip
    assert not any(v.is_contiguous() for v in kinds.values())
    assert_same(both(layer.change(**kinds), all_states=True), both(layer, all_states=True))


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_row_is_the_same_alone_and_beside_others(cell, proj, dtype, steps):
    """A single step multiplies in one way for a few rows and in another for many, each with the same order of sums."""
    whole = make(cell, proj, size=(steps, 37, 21, 19), dtype=dtype, lengths=False, reset=False)
    t = whole.t
    many = forward(whole)
    for b in range(0, 37, 6):
        c_0 = None if t.c_0 is None else t.c_0[b : b + 1]
        alone = forward(whole.change(x=t.x[:, b : b + 1].contiguous(), h_0=t.h_0[b : b + 1], c_0=c_0))
        for name, v in alone.items():
            beside = many[name]
            assert torch.equal(v, beside[b : b + 1] if beside.dim() == 2 else beside[:, b : b + 1]), (name, b)


@every_cell
@both_ways
@pytest.mark.parametrize("name", ["batch first", "one number a row", "one number a step", "one number", "gaps"])
def test_any_strides_of_a_gradient(cell, proj, reverse, name):
    layer = make(cell, proj, reverse=reverse)
    results = forward(layer, all_states=True)
    grads = gradients_for(results)
    steps, rows, width = results["y"].shape
    gy = {
        "batch first": grads["gy"].transpose(0, 1).contiguous().transpose(0, 1),
        "one number a row": torch.randn(steps, rows, 1).expand(steps, rows, width),
        "one number a step": torch.randn(steps, 1, 1).expand(steps, rows, width),
        "one number": torch.ones(()).expand(steps, rows, width),
        "gaps": grads["gy"].repeat_interleave(3, 2)[:, :, ::3],
    }[name]
    assert not gy.is_contiguous()
    strided = {**grads, "gy": gy}
    if "gc_all" in grads:
        strided["gc_all"] = grads["gc_all"].transpose(0, 1).contiguous().transpose(0, 1)
    plain = {**grads, "gy": gy.contiguous()}
    assert_same(backward(layer, results, strided), backward(layer, results, plain))


@every_cell
@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("save", [False, True])
def test_chunks_change_nothing(cell, proj, reverse, dtype, save):
    layer = make(cell, proj, size=(9, 3, 4, 17), dtype=dtype, reverse=reverse)
    whole = forward(layer, save=save, all_states=True, chunk=9)
    for chunk in (0, 1, 2, 4, 1000):
        assert_same(forward(layer, save=save, all_states=True, chunk=chunk), whole)


@every_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunks_change_nothing_in_the_scan(cell, proj, dtype):
    """torch's product of halves may depend on the number of rows: here the input is exact in any order."""
    layer = make(cell, proj, size=(9, 3, 1, 17), dtype=dtype)
    whole = forward(layer, all_states=True, chunk=9)
    for chunk in (0, 1, 2, 4):
        assert_same(forward(layer, all_states=True, chunk=chunk), whole)


@every_cell
def test_saving_changes_nothing(cell, proj):
    layer = make(cell, proj)
    saved, not_saved = forward(layer), forward(layer, save=False)
    assert_same(not_saved, {name: saved[name] for name in not_saved})


@every_cell
@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recomputing_gives_the_same_gradients(cell, proj, reverse, dtype):
    """In ranges of three steps, bit by bit. Half types start a range from a rounded state: test_recompute.py."""
    layer = make(cell, proj, dtype=dtype, reverse=reverse)
    t, found = layer.t, []
    weights = [w.requires_grad_() for w in (t.w_ih, t.w_hh, t.b_ih, t.b_hh, t.w_hr) if w is not None]
    leaves = [t.x.requires_grad_(), t.h_0.requires_grad_(), *weights]
    for recompute in (False, True):
        y, h_n, _, _ = rnnkit.ops.layer(
            cell, t.x, t.h_0, t.c_0, weights, lengths=t.lengths, reset=t.reset, reverse=reverse,
            recompute=recompute, backend="cpu",
        )  # fmt: skip
        found.append((y, h_n, *torch.autograd.grad((y, h_n), leaves, (torch.ones_like(y), torch.ones_like(h_n)))))
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))


@every_cell
def test_what_is_missing_is_zero(cell, proj):
    layer = make(cell, proj, dtype=torch.float64)
    names = [name for name in ("h_0", "c_0", "h_reset", "c_reset") if getattr(layer.t, name) is not None]
    biases = ("b_ih", "b_hh")
    zeros = layer.change(**{name: torch.zeros_like(getattr(layer.t, name)) for name in (*names, *biases)})
    missing = layer.change(**dict.fromkeys((*names, *biases)))
    results = forward(zeros)
    assert_same(forward(missing), results)
    grads = gradients_for(results)
    want, got = backward(zeros, results, grads), backward(missing, results, grads)
    assert all(torch.equal(got[name], want[name]) for name in got)


@every_cell
def test_each_gradient_alone(cell, proj):
    layer = make(cell, proj)
    results = forward(layer)
    grads = gradients_for(results)
    every = backward(layer, results, grads)
    for k, name in enumerate(ORDER):
        if layer.needs >> k & 1:
            assert_same(backward(layer, results, grads, 1 << k), {name: every[name]})
    assert backward(layer, results, grads, 0) == {}
    for given in grads:  # each gradient of a result alone; those that are missing are zeros
        zeros = {name: v if name == given else torch.zeros_like(v) for name, v in grads.items()}
        assert_same(backward(layer, results, {given: grads[given]}), backward(layer, results, zeros))


@every_cell
@both_ways
def test_nan_in_padding_and_before_a_reset_stays_there(cell, proj, reverse):
    clean = make(cell, proj, reverse=reverse)
    clean.t.lengths.copy_(torch.tensor([7, 4, 0, 6, 5]))
    clean.t.reset.zero_()[3] = True
    x, h_0 = clean.t.x.clone(), clean.t.h_0.clone()
    x[4:, 1] = x[:, 2] = NAN  # padding
    lost = slice(3, None) if reverse else slice(None, 3)
    kept = slice(None, 3) if reverse else slice(3, None)
    x[lost, 0] = h_0[0] = NAN  # what the reset separates from the rest
    dirty = clean.change(x=x, h_0=h_0)

    got, want = forward(dirty), forward(clean)
    assert got["y"][lost, 0].isnan().all()
    assert torch.equal(got["y"][kept], want["y"][kept])
    assert torch.equal(got["y"][:, 1:], want["y"][:, 1:])
    assert all(torch.equal(got[name], want[name]) for name in ("h_n", "c_n") if name in got)

    grads = gradients_for(want)
    grads["gy"][lost, 0] = 0  # no gradient enters the lost part, so none may leave it
    found = backward(dirty, got, grads)
    assert all(v.isfinite().all() for v in found.values())
    assert_same(found, backward(clean, want, grads))


@every_cell
def test_nan_spreads_where_nothing_cuts(cell, proj):
    """Without lengths and resets it is plain arithmetic, as in torch."""
    layer = make(cell, proj, size=(3, 2, 2, 6), lengths=False, reset=False)
    layer.t.x[1, 0] = NAN
    found = both(layer)
    assert found["y"][1:, 0].isnan().all()
    assert cell == "rnn_relu" or found["dx"][:2, 0].isnan().all()  # relu passes a gradient on, whatever the state
    assert found["y"][:, 1].isfinite().all() and found["y"][0].isfinite().all() and found["dx"][:, 1].isfinite().all()


@every_cell
@pytest.mark.parametrize("size", [(0, 4, 3, 6), (5, 0, 3, 6), (0, 0, 3, 6), (5, 4, 0, 6), (1, 1, 1, 1), (5, 4, 3, 0)])
def test_empty_sizes_and_fresh_memory(cell, proj, size):
    if proj and size[3] != 6:
        pytest.skip("a projection is narrower than the state")
    layer = make(cell, proj, size=size, lengths=False, reset=False)
    found = both(layer, all_states=True)
    steps, rows, features, hidden = size
    assert found["y"].shape == (steps, rows, proj or hidden)
    assert found["dx"].shape == (steps, rows, features) and found["dw_hh"].shape == layer.t.w_hh.shape
    assert all(v.isfinite().all() for v in found.values())
    if steps == 0:
        assert torch.equal(found["h_n"], layer.t.h_0)
        assert not found["dw_ih"].any() and not found["dw_hh"].any() and not found["db_ih"].any()
    if rows and hidden:
        assert found["h_n"].data_ptr() != layer.t.h_0.data_ptr()


WRONG = [
    ({"x": torch.zeros(3, 4)}, r"x must be \[T, B, I\], got \[3, 4\]"),
    ({"x": torch.zeros(7, 5, 3, dtype=torch.int64)}, "x must be Float, Double, BFloat16 or Half, got Long"),
    ({"w_hh": torch.zeros(52)}, r"w_hh must be \[G H, N\], got \[52\]"),
    ({"w_hh": torch.zeros(53, 13)}, "w_hh must have 4 blocks of rows, got 53 rows"),
    ({"w_hh": torch.zeros(52, 12)}, r"w_hh must be Float \[52, 13\], got Float \[52, 12\]"),
    ({"w_ih": torch.zeros(52, 4)}, r"w_ih must be Float \[52, 3\], got Float \[52, 4\]"),
    ({"w_ih": torch.zeros(52, 3).double()}, r"w_ih must be Float \[52, 3\], got Double \[52, 3\]"),
    ({"b_ih": torch.zeros(51)}, r"b_ih must be Float \[52\], got Float \[51\]"),
    ({"b_hh": None}, "b_ih and b_hh must both be given, or neither"),
    ({"w_hr": torch.zeros(0, 13)}, r"w_hr must be \[P, H\] with P > 0, got \[0, 13\]"),
    ({"w_hr": torch.zeros(13, 12)}, r"w_hr must be Float \[13, 13\], got Float \[13, 12\]"),
    ({"h_0": torch.zeros(4, 13)}, r"h_0 must be Float \[5, 13\], got Float \[4, 13\]"),
    ({"c_0": torch.zeros(5, 12)}, r"c_0 must be Float \[5, 13\], got Float \[5, 12\]"),
    ({"h_reset": torch.zeros(13)}, r"h_r must be Float \[5, 13\], got Float \[13\]"),
    ({"c_reset": torch.zeros(5, 13).half()}, r"c_r must be Float \[5, 13\], got Half \[5, 13\]"),
    ({"lengths": torch.zeros(5)}, r"lengths must be Long \[5\], got Float \[5\]"),
    ({"lengths": torch.zeros(4, dtype=torch.int64)}, r"lengths must be Long \[5\], got Long \[4\]"),
    ({"reset": torch.zeros(6, 5) > 0}, r"reset must be Bool \[7, 5\], got Bool \[6, 5\]"),
    ({"reset": torch.zeros(7, 5)}, r"reset must be Bool \[7, 5\], got Float \[7, 5\]"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_messages(change, message):
    right = make()
    results = forward(right)
    with pytest.raises(RuntimeError, match=f"^rnnkit: {message}$"):
        forward(right.change(**change))
    with pytest.raises(RuntimeError, match=f"^rnnkit: {message}$"):
        backward(right.change(**change), results, gradients_for(results))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("y", torch.zeros(6, 5, 13), r"y must be Float \[7, 5, 13\], got Float \[6, 5, 13\]"),
        ("gates", torch.zeros(7, 5, 39), r"gates must be Float \[7, 5, 52\], got Float \[7, 5, 39\]"),
        ("c", None, "c must be given, as the forward gave it"),
        ("c", torch.zeros(7, 5, 13).double(), r"c must be Float \[7, 5, 13\], got Double \[7, 5, 13\]"),
        ("gy", torch.zeros(7, 5, 12), r"gy must be Float \[7, 5, 13\], got Float \[7, 5, 12\]"),
        ("gh_n", torch.zeros(5, 12), r"gh_n must be Float \[5, 13\], got Float \[5, 12\]"),
        ("gc_n", torch.zeros(5, 13).half(), r"gc_n must be Float \[5, 13\], got Half \[5, 13\]"),
        ("gc_all", torch.zeros(5, 13), r"gc_all must be Float \[7, 5, 13\], got Float \[5, 13\]"),
    ],
)
def test_messages_of_the_backward(name, value, message):
    layer = make()
    results = forward(layer)
    grads = gradients_for(results)
    (results if name in results else grads)[name] = value
    with pytest.raises(RuntimeError, match=f"^rnnkit: {message}$"):
        backward(layer, results, grads)


def test_messages_of_a_cell():
    layer = make("gru")
    with pytest.raises(RuntimeError, match=r"^rnnkit: w_hr must be absent but for an LSTM$"):
        forward(layer.change(w_hr=torch.zeros(5, 13)))


@pytest.mark.parametrize("number", [-1, 5, 1 << 40])
def test_a_number_that_is_no_cell_is_named(number):
    """By every operator, and never computed with another cell's formulas."""
    layer = make("gru")
    results = forward(layer, save=True)
    known = ", ".join(f"{k} {name}" for name, k in CELL_IDS.items())
    named = rf"^rnnkit: cell must be one of {known}; got {number}$"
    with pytest.raises(RuntimeError, match=named):
        torch.ops.rnnkit.cpu_layer_forward(number, *layer.t, False, False, False, 0)
    with pytest.raises(RuntimeError, match=named):
        left = [results["y"], results["gates"], *[None] * 5]
        torch.ops.rnnkit.cpu_layer_backward(number, *layer.t, False, *left, 1)
    x, w = torch.zeros(2, 3), torch.zeros(12, 3)
    if extension.native is not None:
        with pytest.raises(RuntimeError, match=named):
            extension.native.stack_forward(number, 1, 1, 0, 3, False, False, 0.0, b"", (x, *[None] * 6, w, w), ())


def test_other_devices_have_no_kernel():
    layer = make()
    elsewhere = layer.t._make(None if v is None else v.to("meta") for v in layer.t)
    with pytest.raises(NotImplementedError, match="cpu_layer_forward"):
        torch.ops.rnnkit.cpu_layer_forward(CELL_IDS["lstm"], *elsewhere, False, False, False, 0)


@every_cell
def test_schema(cell, proj):
    layer = make(cell, proj)
    torch.library.opcheck(
        torch.ops.rnnkit.cpu_layer_forward.default,
        (CELL_IDS[cell], *layer.t, False, True, True, 0),
        test_utils=("test_schema",),
    )
    results = forward(layer)
    saved = (results["y"], results.get("gates"), results.get("c"))
    grads = (gradients_for(results).get(name) for name in ("gy", "gh_n", "gc_n", "gc_all"))
    torch.library.opcheck(
        torch.ops.rnnkit.cpu_layer_backward.default,
        (CELL_IDS[cell], *layer.t, False, *saved, *grads, layer.needs),
        test_utils=("test_schema",),
    )


def test_missing_library_has_a_reason(tmp_path):
    assert f"not built in {tmp_path}; `pip" in extension._load(tmp_path)
    (tmp_path / "_C.abi3.so").write_bytes(b"no library")
    assert "_C.abi3.so does not load" in extension._load(tmp_path)


CHOSEN = """
import torch, rnnkit
print(torch.ops.rnnkit.cpu_variants())
print(torch.ops.rnnkit.cpu_function(1, torch.ones(1)).item())
"""


def choose(name: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "RNNKIT_CPU_ISA": name}
    return subprocess.run([sys.executable, "-c", CHOSEN], env=env, capture_output=True, text=True, timeout=120)


def at_hand() -> list[str]:
    return torch.ops.rnnkit.cpu_variants().split()[1:] if extension.available() else []


@pytest.mark.parametrize("name", ["", *at_hand()])
def test_a_variant_can_be_asked_for(name):
    done = choose(name)
    assert done.returncode == 0, done.stderr
    first, value = done.stdout.splitlines()
    assert first.split() == [name or at_hand()[0], *at_hand()]
    assert abs(float(value) - 0.7615941559557649) < 2e-7


def test_an_unknown_variant_is_an_error_that_lists_those_there_are():
    done = choose("sse9")
    assert done.returncode != 0
    known = ", ".join(at_hand())
    assert f"RNNKIT_CPU_ISA must be one of {known} on this processor, got 'sse9'" in done.stderr
