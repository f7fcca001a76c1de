"""Operands for the extension's operators, cpu_layer_forward and cpu_layer_backward, and calls of them by name.

What the tests of the extension share. Shapes as in rnnkit/backends/spec.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rnnkit.backends.cpu.backend import CELL_IDS
from rnnkit.backends.spec import LayerInputs
from rnnkit.cells import CELLS

CELLS_AND_PROJECTION = (*((cell, 0) for cell in CELL_IDS), ("lstm", 5))
"""Every cell, and an LSTM with a projection to five units."""
ORDER = ("x", "h_0", "c_0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "h_reset", "c_reset")
"""The gradients of cpu_layer_backward, bit by bit of `needs`."""
OF_THE_SCAN = ("h_0", "c_0", "h_reset", "c_reset")
"""Those that no product of torch's takes part in."""


@dataclass(frozen=True)
class Layer:
    cell: str
    t: LayerInputs
    reverse: bool = False

    @property
    def has_c(self) -> bool:
        return CELLS[self.cell].has_c

    def change(self, **tensors: Any) -> Layer:
        return replace(self, t=self.t._replace(**tensors))

    @property
    def needs(self) -> int:
        """Every gradient that this layer has."""
        has = {
            name: getattr(self.t, name) is not None or (name in ("h_0", "c_0") and (self.has_c or name == "h_0"))
            for name in ORDER
        }
        return sum(1 << k for k, name in enumerate(ORDER) if has[name])


def make(
    cell: str = "lstm",
    proj: int = 0,
    *,
    size: tuple[int, int, int, int] = (7, 5, 3, 13),
    dtype: torch.dtype = torch.float32,
    lengths: bool = True,
    reset: bool = True,
    reverse: bool = False,
    seed: int = 0,
) -> Layer:
    """A layer over T, B, I, H with everything that it can have."""
    steps, rows, features, hidden = size
    gates, has_c, state = CELLS[cell].gates, CELLS[cell].has_c, proj or hidden
    g = torch.Generator().manual_seed(seed)

    def some(*sizes: int) -> Tensor:
        return (torch.randn(sizes, generator=g) / max(1, sizes[-1]) ** 0.5).to(dtype)

    t = LayerInputs(
        x=some(steps, rows, features),
        h_0=some(rows, state),
        c_0=some(rows, hidden) if has_c else None,
        w_ih=some(gates * hidden, features),
        w_hh=some(gates * hidden, state),
        b_ih=some(gates * hidden),
        b_hh=some(gates * hidden),
        w_hr=some(proj, hidden) if proj else None,
        lengths=torch.randint(0, steps + 1, (rows,), generator=g) if lengths else None,
        reset=torch.rand(steps, rows, generator=g) < 0.3 if reset else None,
        h_reset=some(rows, state) if reset else None,
        c_reset=some(rows, hidden) if reset and has_c else None,
    )
    return Layer(cell, t, reverse)


def forward(layer: Layer, *, save: bool = True, all_states: bool = False, chunk: int = 0) -> dict[str, Tensor]:
    """The results by name: y, h_n, c_n, c_all, gates, c."""
    found = iter(
        torch.ops.rnnkit.cpu_layer_forward(CELL_IDS[layer.cell], *layer.t, layer.reverse, all_states, save, chunk)
    )
    names = ["y", "h_n"] + ["c_n"] * layer.has_c + ["c_all"] * (layer.has_c and all_states)
    names += ["gates"] * (save and CELLS[layer.cell].saved > 0) + ["c"] * (save and layer.has_c)
    results = dict(zip(names, found, strict=True))
    return results


def gradients_for(results: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Random gradients of the results: gy, gh_n, gc_n, gc_all."""
    g = torch.Generator().manual_seed(seed)
    names = {"y": "gy", "h_n": "gh_n", "c_n": "gc_n", "c_all": "gc_all"}
    return {names[name]: torch.randn(v.shape, generator=g).to(v.dtype) for name, v in results.items() if name in names}


def backward(
    layer: Layer, results: dict[str, Tensor], grads: dict[str, Tensor], needs: int | None = None
) -> dict[str, Tensor]:
    """The gradients by name."""
    asked = layer.needs if needs is None else needs
    found = torch.ops.rnnkit.cpu_layer_backward(
        CELL_IDS[layer.cell],
        *layer.t,
        layer.reverse,
        results["y"],
        results.get("gates"),
        results.get("c"),
        *(grads.get(name) for name in ("gy", "gh_n", "gc_n", "gc_all")),
        asked,
    )
    return dict(zip([name for k, name in enumerate(ORDER) if asked >> k & 1], found, strict=True))


def both(layer: Layer, **how: Any) -> dict[str, Tensor]:
    """Results, and the gradients of everything for the same random gradients."""
    results = forward(layer, **how)
    gradients = backward(layer, results, gradients_for(results))
    return {**results, **{f"d{name}": v for name, v in gradients.items()}}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], *, only: tuple[str, ...] | None = None) -> None:
    """Bit by bit, NaN where NaN is."""
    assert got.keys() == want.keys()
    for name in got.keys() if only is None else only:
        assert got[name].shape == want[name].shape, name
        assert torch.equal(got[name].nan_to_num(7e3), want[name].nan_to_num(7e3)), name
