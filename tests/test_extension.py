"""The extension's operators against a loop written out here in float64, their gradients against autograd's.

What they are asked: lengths, resets, the state at a reset, both directions, both activations, chunks of time,
NaN where nothing may read it, odd sizes, no steps and no rows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from rnnkit.backends import extension

pytestmark = pytest.mark.skipif(not extension.available(), reason=extension.reason())

NAN = float("nan")
SIZES = [(7, 5, 13), (1, 1, 1), (9, 3, 33), (0, 4, 6), (5, 0, 6)]
KINDS = list(itertools.product((False, True), repeat=5))  # lengths, reset, h_r, relu, reverse


@dataclass(frozen=True)
class Case:
    """The operands of a scan over T steps, B rows and H units."""

    gx: Tensor  # [T, B, H]
    w_hh: Tensor  # [H, H]
    h: Tensor  # [B, H]
    lengths: Tensor | None  # [B]
    reset: Tensor | None  # [T, B]
    h_r: Tensor | None  # [B, H]
    relu: bool
    reverse: bool

    def live(self, t: int, b: int) -> bool:
        return self.lengths is None or t < int(self.lengths[b])

    def cut(self, t: int, b: int) -> bool:
        """The state is replaced before step t: by its own reset forwards, by that of t + 1 backwards."""
        at = t + 1 if self.reverse else t
        return self.reset is not None and at < len(self.reset) and self.live(at, b) and bool(self.reset[at, b])

    def times(self) -> list[int]:
        steps = list(range(len(self.gx)))
        return steps[::-1] if self.reverse else steps


def make(sizes: tuple[int, int, int], kind: tuple[bool, ...], seed: int = 0) -> Case:
    steps, rows, width = sizes
    lengths, reset, h_r, relu, reverse = kind
    g = torch.Generator().manual_seed(seed)
    return Case(
        gx=torch.randn(steps, rows, width, generator=g),
        w_hh=torch.randn(width, width, generator=g) / max(width, 1) ** 0.5,
        h=torch.randn(rows, width, generator=g),
        lengths=torch.randint(0, steps + 1, (rows,), generator=g) if lengths else None,
        reset=torch.rand(steps, rows, generator=g) < 0.4 if reset else None,
        h_r=torch.randn(rows, width, generator=g) if h_r else None,
        relu=relu,
        reverse=reverse,
    )


def loop(c: Case) -> tuple[Tensor, Tensor]:
    """y [T, B, H] and h_n [B, H], row by row and step by step, differentiable."""
    ys = [[torch.zeros_like(c.h[b]) for b in range(len(c.h))] for _ in c.gx]
    states = list(c.h.unbind(0))
    for t, b in itertools.product(c.times(), range(len(states))):
        if not c.live(t, b):
            continue
        state = states[b]
        if c.cut(t, b):
            state = torch.zeros_like(state) if c.h_r is None else c.h_r[b]
        a = c.gx[t, b] + c.w_hh @ state
        states[b] = ys[t][b] = torch.relu(a) if c.relu else torch.tanh(a)
    y = torch.stack([torch.stack(row) for row in ys]) if c.gx.numel() else c.gx * 1
    return y, torch.stack(states) if states else c.h.clone()


def wide(c: Case, grad: bool = False) -> Case:
    """The case in float64, its floating tensors leaves of a graph where `grad`."""
    names = ("gx", "w_hh", "h", "h_r")
    tensors = {name: getattr(c, name) for name in names}
    return replace(c, **{n: v.double().requires_grad_(grad) for n, v in tensors.items() if v is not None})


def forward(c: Case, first: int = 0, last: int | None = None, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
    gx = c.gx[first:last]
    start = c.h if h is None else h
    return torch.ops.rnnkit.rnn_scan_forward(gx, c.w_hh, start, c.lengths, c.reset, c.h_r, first, c.relu, c.reverse)


def backward(c: Case, gy: Tensor, gh_n: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.rnnkit.rnn_scan_backward(gy, gh_n, y, c.w_hh, c.lengths, c.reset, c.relu, c.reverse)


def close(got: Tensor, exact: Tensor, plain: Tensor) -> None:
    """At most twice the error of the same loop in float32, and four ulp of the largest value."""
    if got.numel():
        error, budget = ((v.double() - exact).abs().max() for v in (got, plain))
        assert error <= 2 * budget + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert got.shape == exact.shape


def narrow(c: Case) -> Case:
    """The case in float32, its floating tensors leaves of a graph of their own."""
    w = wide(c)
    tensors = {name: getattr(w, name) for name in ("gx", "w_hh", "h", "h_r")}
    return replace(w, **{n: v.detach().float().requires_grad_() for n, v in tensors.items() if v is not None})


def gradients(graph: Case, gy: Tensor, gh_n: Tensor) -> tuple[Tensor, ...]:
    """Of gx, h and h_r, by autograd through the loop."""
    leaves = [graph.gx, graph.h] + ([] if graph.h_r is None else [graph.h_r])
    given = (gy.to(graph.gx.dtype), gh_n.to(graph.gx.dtype))
    return torch.autograd.grad(loop(graph), leaves, given, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_forward(sizes, kind):
    case = make(sizes, kind)
    for got, exact, plain in zip(forward(case), loop(wide(case)), loop(case)):
        close(got, exact, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_backward(sizes, kind):
    case = make(sizes, kind)
    y, h_n = forward(case)
    gy, gh_n = torch.randn_like(y), torch.randn_like(h_n)
    exact, plain = (gradients(graph, gy, gh_n) for graph in (wide(case, grad=True), narrow(case)))
    for got, want, rounded in zip(backward(case, gy, gh_n, y), exact, plain):
        close(got, want, rounded)


def test_backward_counts_h_r_where_none_was_given():
    case = make((7, 5, 13), (True, True, True, False, False))
    zeros = replace(case, h_r=torch.zeros_like(case.h))
    y, h_n = forward(zeros)
    same_y, _ = forward(replace(case, h_r=None))
    assert torch.equal(y, same_y)
    assert backward(case, y, h_n, y)[2].abs().sum() > 0
    assert torch.equal(backward(replace(case, reset=None), y, h_n, y)[2], torch.zeros_like(h_n))


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind):
    case = make((9, 3, 33), kind)
    y, h_n = forward(case)
    bounds = [0, 2, 2, 3, 7, 9]
    chunks = list(itertools.pairwise(bounds))
    h, parts = case.h, []
    for first, last in chunks[::-1] if case.reverse else chunks:
        part, h = forward(case, first, last, h)
        parts.append(part)
    assert torch.equal(torch.cat(parts[::-1] if case.reverse else parts), y)
    assert torch.equal(h, h_n)


def test_threads_change_nothing():
    case = make((40, 8, 64), (True, True, True, False, False))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y, h_n = forward(case)
            results.append((y, h_n, *backward(case, y, h_n, y)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_nan_in_padding_and_before_a_reset_stays_there(relu, reverse):
    clean = make((7, 5, 13), (True, True, True, relu, reverse))
    clean.lengths.copy_(torch.tensor([7, 4, 0, 6, 5]))
    clean.reset.zero_()[3] = True
    gx = clean.gx.clone()
    gx[4:, 1] = gx[:, 2] = NAN  # padding
    lost = slice(3, None) if reverse else slice(None, 3)
    gx[lost, 0] = NAN  # what the reset separates from the rest
    kept = slice(None, 3) if reverse else slice(3, None)
    h_0 = clean.h.clone()
    h_0[0] = NAN
    dirty = replace(clean, gx=gx, h=h_0)

    y, h_n = forward(dirty)
    want_y, want_h_n = forward(clean)
    assert y[lost, 0].isnan().all()
    assert torch.equal(y[kept], want_y[kept])
    assert torch.equal(y[:, 1:], want_y[:, 1:])
    assert torch.equal(h_n, want_h_n)

    gy = torch.randn(7, 5, 13)
    gy[lost, 0] = 0  # no gradient enters the lost part, so none may leave it
    gh_n = torch.randn(5, 13)
    for got, want in zip(backward(dirty, gy, gh_n, y), backward(clean, gy, gh_n, want_y), strict=True):
        assert torch.equal(got, want)


def test_nan_spreads_where_nothing_cuts():
    """Without lengths and resets it is plain arithmetic, as in torch."""
    case = make((3, 1, 4), (False,) * 5)
    y = torch.full((3, 1, 4), NAN)
    dg, dh_0, _ = backward(case, torch.zeros_like(y), torch.zeros(1, 4), y)
    assert dg.isnan().all()
    assert dh_0.isnan().all()
    relu = replace(case, relu=True)
    assert forward(replace(relu, gx=y))[0].isnan().all()


def test_any_strides_and_fresh_memory():
    case = make((6, 4, 8), (True, True, True, False, True))
    y, h_n = forward(case)
    strided = replace(
        case,
        gx=case.gx.transpose(0, 1).contiguous().transpose(0, 1),
        w_hh=case.w_hh.T.contiguous().T,
        h=case.h.repeat_interleave(2, 0)[::2],
        lengths=case.lengths.repeat_interleave(2)[::2],
        reset=case.reset.T.contiguous().T,
    )
    for got, want in zip(forward(strided), (y, h_n), strict=True):
        assert torch.equal(got, want)
    nothing, state = forward(case, 0, 0)
    assert nothing.shape == (0, 4, 8)
    assert torch.equal(state, case.h)
    assert state.data_ptr() != case.h.data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gx": torch.zeros(3, 4)}, r"gx must be \[n, B, H\], got \[3, 4\]"),
        ({"gx": torch.zeros(7, 5, 13).double()}, r"gx must be Float \[7, 5, 13\], got Double \[7, 5, 13\]"),
        ({"w_hh": torch.zeros(13, 12)}, r"w_hh must be Float \[13, 13\], got Float \[13, 12\]"),
        ({"h": torch.zeros(4, 13)}, r"h must be Float \[5, 13\], got Float \[4, 13\]"),
        ({"h_r": torch.zeros(13)}, r"h_r must be Float \[5, 13\], got Float \[13\]"),
        ({"lengths": torch.zeros(5)}, r"lengths must be Long \[5\], got Float \[5\]"),
        (
            {"reset": torch.zeros(6, 5) > 0},
            r"reset must be \[T, B\] with T at least t0 \+ n = 7, got \[6, 5\]",
        ),
        ({"reset": torch.zeros(7, 5)}, r"reset must be Bool \[7, 5\], got Float \[7, 5\]"),
    ],
)
def test_messages(change, message):
    case = replace(make((7, 5, 13), (True,) * 5), **change)
    with pytest.raises(RuntimeError, match=message):
        forward(case)


def test_messages_of_times():
    case = make((7, 5, 13), (True, True, False, False, False))
    with pytest.raises(RuntimeError, match="t0 must not be negative, got -1"):
        torch.ops.rnnkit.rnn_scan_forward(case.gx, case.w_hh, case.h, None, None, None, -1, False, False)
    with pytest.raises(RuntimeError, match=r"t0 \+ n = 8, got \[7, 5\]"):
        torch.ops.rnnkit.rnn_scan_forward(case.gx, case.w_hh, case.h, case.lengths, case.reset, None, 1, False, False)
    y, h_n = forward(case)
    with pytest.raises(RuntimeError, match=r"y must be Float \[7, 5, 13\], got Float \[6, 5, 13\]"):
        backward(case, y, h_n, y[1:])


def test_opcheck():
    case = make((4, 3, 5), (True,) * 5)
    y, h_n = forward(case)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.rnnkit.rnn_scan_forward.default,
        (case.gx, case.w_hh, case.h, case.lengths, case.reset, case.h_r, 0, True, True),
        test_utils=tests,
    )
    torch.library.opcheck(
        torch.ops.rnnkit.rnn_scan_backward.default,
        (y, h_n, y, case.w_hh, case.lengths, case.reset, True, True),
        test_utils=tests,
    )


def test_missing_library_has_a_reason(tmp_path):
    assert "not built" in extension._load(tmp_path)
    (tmp_path / "_C.abi3.so").write_bytes(b"no library")
    assert "_C.abi3.so does not load" in extension._load(tmp_path)
