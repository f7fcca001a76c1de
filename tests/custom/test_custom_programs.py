"""Programs made from eleven steps: right to float64's rounding, and they keep no more than hand-written cells do."""

from __future__ import annotations

import sys

import pytest
import torch
from custom_cells import CELLS, StepSpec, distance, inputs_of, spec_of

from rnnkit.custom.check import compile_step, program_of
from rnnkit.custom.graph import CellProgram


@pytest.mark.parametrize("hidden", [2, 5, 16])
@pytest.mark.parametrize("name", CELLS)
def test_programs_are_their_steps(name: str, hidden: int) -> None:
    spec = CELLS[name]
    error, where = distance(spec, compile_step(spec, hidden), inputs_of(spec, hidden, 3, seed=hidden))
    assert error < 1e-13, where


@pytest.mark.parametrize("name", CELLS)
def test_the_check_passes_them(name: str) -> None:
    checked = program_of(CELLS[name], 24)
    assert checked.reason is None
    assert checked.program is not None and checked.program.hidden == 24
    assert program_of(CELLS[name], 24) is checked, "kept for the next call"


KEPT = {  # per unit, per row, and the states that the backward reads
    "lstm": (4, 0, ("h", "c")),
    "gru": (4, 0, ("h",)),
    "peephole": (4, 0, ("h", "c")),
    "zoneout": (4, 0, ("h", "c")),
    "cifg": (3, 0, ("h", "c")),
    "layernorm_lstm": (8, 3, ("h", "c")),
    "gru_before": (3, 0, ("h",)),
    "slstm": (4, 0, ("h", "c", "n", "m")),
    "augru": (4, 0, ("h",)),
    "indrnn": (0, 0, ("h",)),
    "gal_lstm": (4, 0, ("h", "c")),
}


@pytest.mark.parametrize("name", CELLS)
def test_what_is_kept(name: str) -> None:
    program = compile_step(CELLS[name], 16)
    assert (len(program.saved), len(program.saved_rows), program.needs) == KEPT[name]


def _ops(program: CellProgram) -> list[str]:
    return sorted(program.forward.nodes[n].op for n in program.saved)


def test_results_of_expensive_functions_are_kept() -> None:
    assert _ops(compile_step(CELLS["lstm"], 16)) == ["sigmoid", "sigmoid", "sigmoid", "tanh"]
    assert _ops(compile_step(CELLS["gru"], 16)) == ["product", "sigmoid", "sigmoid", "tanh"]


@pytest.mark.parametrize("name", CELLS)
def test_the_backward_is_a_graph_of_its_own(name: str) -> None:
    """Its leaves are those that the forward hands on; it multiplies by transposed weights only, and never by gx."""
    spec = CELLS[name]
    program = compile_step(spec, 16)
    given = {*spec.units, *(n for n, _, _ in spec.steps), "saved", "saved_row"}
    given |= {prefix + s for s in spec.states for prefix in ("", "new_", "d_")}
    assert {node.data.name for node in program.backward.nodes if node.op == "input"} <= given
    assert all(p.transposed and p.bias is None for p in program.backward.products)
    assert all(not p.transposed for p in program.forward.products)
    assert len(program.d_products) == len(program.forward.products)
    for graph in (program.forward, program.backward):
        assert all(x < n for n in range(len(graph.nodes)) for x in graph.operands(n))


def test_a_state_that_stays_and_one_that_is_constant() -> None:
    def step(a: torch.Tensor, h: torch.Tensor, c: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.tanh(a) * c, c, torch.zeros_like(k)

    spec = spec_of(step, 1, ("h", "c", "k"))
    error, where = distance(spec, compile_step(spec, 4), inputs_of(spec, 4, 3, seed=1))
    assert error < 1e-14, where


def test_values_per_row_reach_units_and_back() -> None:
    """A value per row that becomes a whole state, a row's sum of one, a parameter's own sum."""

    def step(gx: torch.Tensor, h: torch.Tensor, u: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wide = r.expand_as(h)
        return (gx + wide.sum(-1, keepdim=True) * h + wide * u.mean() + (u * u).sum(-1),)

    spec = spec_of(step, 1, ("h",), units=("u",), steps=(("r", "row", True),))
    error, where = distance(spec, compile_step(spec, 4), inputs_of(spec, 4, 3, seed=1))
    assert error < 1e-14, where

    def spread(gx: torch.Tensor, h: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return r.expand_as(h)

    spec = spec_of(spread, 1, ("h",), steps=(("r", "row", True),))
    spec = StepSpec("spread", lambda gx, h, r: (spread(gx, h, r),), 1, ("h",), steps=spec.steps)
    error, where = distance(spec, compile_step(spec, 4), inputs_of(spec, 4, 3, seed=1))
    assert error < 1e-14, where


def test_a_weight_that_is_used_twice() -> None:
    def step(gx: torch.Tensor, h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        once = torch.tanh(gx + torch.nn.functional.linear(h, w))
        return (torch.tanh(once @ w.T) + h @ w.t(),)

    spec = spec_of(step, 1, ("h",), weights=(("w", 1),))
    program = compile_step(spec, 4)
    assert [name for name, _, _ in program.d_products] == ["w", "w"]
    error, where = distance(spec, program, inputs_of(spec, 4, 3, seed=1))
    assert error < 1e-14, where


def test_what_rms_norm_adds_is_of_the_dtype() -> None:
    def step(a: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.nn.functional.rms_norm(a * 1e-5, a.shape[-1:]),)

    spec = spec_of(step, 1, ("h",))
    for dtype in (torch.float32, torch.float64):
        checked = program_of(spec, 8, dtype)
        assert checked.program is not None, checked.reason
        assert torch.finfo(dtype).eps in [n.data for n in checked.program.forward.nodes if n.op == "const"]


def test_nothing_heavy_is_imported() -> None:
    """torch.broadcast_shapes and autograd.grad with grad_outputs would import sympy, a second's work."""
    import subprocess

    code = (
        "import sys; sys.path.insert(0, 'tests/oracles'); from custom_cells import CELLS;"
        "from rnnkit.custom.check import program_of; assert program_of(CELLS['slstm'], 8).program;"
        "print(sorted({'sympy', 'networkx', 'torch._inductor', 'torch._dynamo'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
