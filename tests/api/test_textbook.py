"""Textbooks write the GRU with one matrix per gate over the concatenation [h, x], without biases, and with the update
gate the other way round. Here their equations stand literally, and `reset_after=False` must reproduce them from the
textbook's weights, so that a reader who knows only the book can trust the layer and knows how to convert."""

from __future__ import annotations

import pytest
import torch
from sequences import F64, Case, compare, ways, with_gradients

import rnnkit

I, H, T, B = 3, 5, 7, 4


def textbook_gru(x, h, w_z, w_r, w):
    """One step. x [B, I], h [B, H], each weight [H, H + I] over [h, x]."""
    z = torch.sigmoid(torch.cat([h, x], 1) @ w_z.T)
    r = torch.sigmoid(torch.cat([h, x], 1) @ w_r.T)
    h_tilde = torch.tanh(torch.cat([r * h, x], 1) @ w.T)
    return (1 - z) * h + z * h_tilde


def convert(w_z, w_r, w):
    """Textbook weights to weight_ih [3H, I] and weight_hh [3H, H], blocks r, z, n: σ(−a) = 1 − σ(a)."""
    stacked = torch.cat([w_r, -w_z, w])
    return stacked[:, H:], stacked[:, :H]


@pytest.fixture
def book():
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (T, B, I), "h": (B, H), "w_z": (H, H + I), "w_r": (H, H + I), "w": (H, H + I)}
    return {k: torch.randn(s, generator=g, dtype=F64).requires_grad_() for k, s in shapes.items()}


def assert_same(ours, theirs, book):
    """Outputs and the gradients of every textbook quantity."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    cotangent = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    for a, b in zip(*(torch.autograd.grad(v, list(book.values()), cotangent) for v in (ours, theirs)), strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def unrolled(x, h, w_z, w_r, w):
    states = []
    for x_t in x:
        h = textbook_gru(x_t, h, w_z, w_r, w)
        states.append(h)
    return torch.stack(states)


def test_cell_reproduces_the_textbook(book):
    w_ih, w_hh = convert(book["w_z"], book["w_r"], book["w"])
    cell = rnnkit.GRUCell(I, H, bias=False, dtype=F64, reset_after=False)
    weights = {"weight_ih": w_ih, "weight_hh": w_hh}
    ours = torch.func.functional_call(cell, weights, (book["x"][0], book["h"]))
    assert_same(ours, textbook_gru(book["x"][0], *(book[k] for k in ("h", "w_z", "w_r", "w"))), book)


@ways([Case("gru_reset_before", bias=False)])
def test_layer_reproduces_the_textbook(book, case, backend, dtype):
    narrow = {name: v.detach().to(dtype).requires_grad_() for name, v in book.items()}
    w_ih, w_hh = convert(*(narrow[k] for k in ("w_z", "w_r", "w")))
    layer = rnnkit.GRU(I, H, bias=False, dtype=dtype, reset_after=False, backend=backend)
    weights = {"weight_ih_l0": w_ih, "weight_hh_l0": w_hh}
    ours, h_n = torch.func.functional_call(layer, weights, (narrow["x"], narrow["h"][None]))
    assert torch.equal(h_n[0], ours[-1])
    wide = {name: v.detach().double().requires_grad_() for name, v in narrow.items()}
    compare(
        *(
            with_gradients(case, {"y": y}, by)
            for y, by in ((ours, narrow), (unrolled(**wide), wide), (unrolled(**narrow), narrow))
        )
    )


def test_biases_keep_the_family():
    """With zero biases the layer is the textbook's; a bias moves each gate as W [h, x] + b would."""
    g = torch.Generator().manual_seed(2)
    cell = rnnkit.GRUCell(I, H, dtype=F64, reset_after=False)
    x, h = torch.randn(B, I, generator=g, dtype=F64), torch.randn(B, H, generator=g, dtype=F64)
    b_r, b_z, b_n = (cell.bias_ih + cell.bias_hh).chunk(3)
    w_r, w_z, w_n = (torch.cat(pair, 1) for pair in zip(cell.weight_hh.chunk(3), cell.weight_ih.chunk(3), strict=True))
    z = torch.sigmoid(torch.cat([h, x], 1) @ -w_z.T - b_z)  # the textbook's z
    r = torch.sigmoid(torch.cat([h, x], 1) @ w_r.T + b_r)
    n = torch.tanh(torch.cat([r * h, x], 1) @ w_n.T + b_n)
    torch.testing.assert_close(cell(x, h), (1 - z) * h + z * n, rtol=0, atol=1e-14)


def test_it_is_not_the_gru_of_torch(book):
    """Where the reset gate acts makes a difference, so neither can pass for the other."""
    w_ih, w_hh = convert(book["w_z"], book["w_r"], book["w"])
    theirs = torch.gru_cell(book["x"][0], book["h"], w_ih, w_hh)
    after = rnnkit.functional.gru_cell(book["x"][0], book["h"], [w_ih, w_hh])
    before = rnnkit.functional.gru_cell(book["x"][0], book["h"], [w_ih, w_hh], reset_after=False)
    torch.testing.assert_close(after, theirs, rtol=0, atol=1e-14)
    assert (before - theirs).abs().max() > 1e-2
