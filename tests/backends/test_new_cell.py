"""A cell that a backend does not know is a reason of that backend, by the cell's name, and never another cell's
formulas: a sixth cell that the reference alone has. And what a new cell asks for, as CONTRIBUTING lists it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rnnkit import ops
from rnnkit.backends import BACKENDS, BY_NAME, REFERENCE, LayerSpec, record, select_backend
from rnnkit.cells import CELLS
from rnnkit.reference import STEPS

ROOT = Path(__file__).resolve().parents[2]
T, B, I, H = 4, 2, 3, 5
OTHERS = [backend.name for backend in BACKENDS if backend is not REFERENCE]


@pytest.fixture(params=["rnn_tanh", "lstm", "gru", "gru_reset_before"])
def like(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The cell `sixth` in the table, with another one's facts, and in the reference, with its formulas turned round."""
    step, vjp = STEPS[request.param]
    monkeypatch.setitem(CELLS, "sixth", replace(CELLS[request.param], name="sixth"))
    monkeypatch.setitem(STEPS, "sixth", (step, vjp))
    return request.param


def spec(**changed: object) -> LayerSpec:
    facts = {"device": "cpu", "dtype": torch.float32, "steps": T, "batch": B, "input_size": I, "hidden_size": H}
    return LayerSpec(**{"cell": "sixth", "proj_size": 0, "bias": True, **facts, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", OTHERS)
def test_each_backend_refuses_it_by_name(name: str, device: str, like: str) -> None:
    (reason,) = [text for text in BY_NAME[name].unsupported(spec(device=device)) if "sixth" in text]
    assert "the cell 'sixth'" in reason
    for cell in set(CELLS) - {"sixth"}:
        assert not any("the cell" in text for text in BY_NAME[name].unsupported(spec(cell=cell))) or (
            name == "torch" and cell == "gru_reset_before"
        )


@pytest.mark.parametrize("name", OTHERS)
def test_named_it_raises_with_that_reason(name: str, like: str) -> None:
    x, h, c, weights = draw(like)
    with pytest.raises(NotImplementedError, match=rf"backend '{name}' cannot run this sixth layer.*the cell 'sixth'"):
        ops.layer("sixth", x, h, c, weights, backend=name)


def test_auto_runs_the_reference(like: str) -> None:
    """Forward and backward, as the cell whose formulas these are."""
    with record() as met:
        got = run("sixth", like, "auto")
    assert {chosen for _, _, chosen in met} == {"reference"}
    want = run(like, like, "reference")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert select_backend("auto", spec(device="cuda", device_index=0), cache=False) is REFERENCE


def test_auto_runs_the_reference_when_compiled(like: str) -> None:
    x, h, c, weights = draw(like)
    compiled = torch.compile(lambda x: ops.layer("sixth", x, h, c, weights)[0], backend="eager")
    assert torch.equal(compiled(x), ops.layer(like, x, h, c, weights, backend="reference")[0])


def test_one_step_runs_the_reference(like: str) -> None:
    x, h, c, weights = draw(like)
    got, want = ops.step("sixth", x[0], h, c, weights), ops.step(like, x[0], h, c, weights, backend="reference")
    assert torch.equal(got[0], want[0])


def draw(cell: str) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    g = torch.Generator().manual_seed(3)
    gates, has_c = CELLS[cell].gates, CELLS[cell].has_c
    sizes = [(gates * H, I), (gates * H, H), (gates * H,), (gates * H,)]
    weights = [torch.randn(size, generator=g).requires_grad_() for size in sizes]
    x, h = torch.randn((T, B, I), generator=g).requires_grad_(), torch.randn((B, H), generator=g)
    return x, h, torch.randn((B, H), generator=g) if has_c else None, weights


def run(cell: str, like: str, backend: str) -> list[Tensor]:
    """Outputs and gradients."""
    x, h, c, weights = draw(like)
    y, h_n, *_ = ops.layer(cell, x, h, c, weights, backend=backend)
    return [y, h_n, *torch.autograd.grad(y.square().sum() + h_n.sum(), (x, *weights))]


# What a new cell asks for.

NAMED = re.compile(
    r"gru_(reset_)?before|Gru(Reset)?Before|family is gru|cells/gru\.h"
    r'|(?<!cell\.)\breset_after\b|\b(RNN|LSTM|GRU)Cell\b|"GRU"'
)
"""The most recently added cell in each language, its file of Triton kernels and its header; classes of modules and the
option that makes this cell of one; modules by their names."""
COUNTED = ("rnnkit", "kernels", "csrc", "benchmarks", "docs/api", "tests/oracles", "tests/backends/harness")
EXEMPT = (
    *("rnnkit/demo/", "rnnkit/experiments/", "tests/oracles/made_rows.py"),
    *("rnnkit/variants/", "benchmarks/speed/variant_cells.py"),
    *("tests/oracles/custom_cells.py", "tests/oracles/variant_cells.py"),
)
"""Programs that choose among the cells, rows that are made up, and cells written as steps: a new cell asks nothing of
them."""


def test_contributing_lists_every_file_that_names_a_cell() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## A new cell\n")[2].partition("\n## ")[0]
    listed = set(re.findall(rf"`((?:{'|'.join(COUNTED)})/[^` ]+\.\w+)`", section))
    own = {path for path in listed if "<cell>" in path}
    assert own == {f"{folder}/<cell>.{kind}" for folder, kind in OWN}
    assert all((ROOT / path.replace("<cell>", cell)).is_file() for path in listed for cell in FILES)
    sources = [
        path
        for folder in COUNTED
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".h", ".cpp", ".cuh", ".cu", ".md"} and path.is_file()
    ]
    named = {path.relative_to(ROOT).as_posix() for path in sources if NAMED.search(path.read_text(encoding="utf-8"))}
    named = {path for path in named if not path.startswith(EXEMPT)}
    assert named - {path.replace("<cell>", cell) for path in own for cell in FILES} == listed - own


OWN = (("rnnkit/reference", "py"), ("rnnkit/nn", "py"), ("csrc/cells", "h"), ("kernels", "py"))
"""Files that a new cell brings."""
FILES = ("rnn", "lstm", "gru")
"""The cells that have such files: the most recently added one stands in gru's."""
