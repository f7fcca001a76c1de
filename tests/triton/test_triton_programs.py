"""Generated kernels of custom cells without a GPU: their text, their compilation for every chip, and what is refused.

Their numbers are tested in tests/triton/interpreted/test_generated.py.
"""

from __future__ import annotations

import ast
import gc
import linecache
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine_programs import CELLS, draw, grads_of, needs_of, program_of
from test_triton import TESTS, interpreted, needs_triton

import rnnkit
from rnnkit.backends.triton import backend
from rnnkit.backends.triton import program as triton
from rnnkit.custom import triton_source
from rnnkit.custom.declare import spec_of
from rnnkit.custom.graph import Node
from rnnkit.custom.inputs import CellOptions

CHIPS = ("sm_80", "sm_90", "gfx942")
COMPILED = ("LSTM", "LayerNormLSTM", "SLSTM", "GRUResetBefore")
REGISTERS = {"sm_80": 128, "sm_90": 128, "gfx942": 128}
"""At most, a thread, at 128 units."""


@needs_triton
def test_kernels_in_the_interpreter() -> None:
    interpreted(str(TESTS / "triton" / "interpreted" / "test_generated.py"), "-m", "not long")


@needs_triton
@pytest.mark.long
def test_errors_are_seen_in_the_interpreter() -> None:
    interpreted(str(TESTS / "triton" / "interpreted" / "test_generated_mutations.py"))


@needs_triton
@pytest.mark.long
def test_more_kernels_in_the_interpreter() -> None:
    interpreted(str(TESTS / "triton" / "interpreted" / "test_generated.py"), "-m", "long")


# The text.


def sample(name: str) -> Any:
    return program_of(spec_of(CELLS[name]), 24)


@needs_triton
def test_the_text_goes_with_its_functions() -> None:
    """Triton and a traceback find it by its file's name as long as there is a kernel of it. Triton itself remembers the
    last function of each name."""
    text = triton_source.source_of(sample("LSTM")).text

    def lines() -> set[str]:
        gc.collect()
        return {name for name in linecache.cache if name.startswith("<rnnkit cell")}

    before = lines()
    found = triton.functions_of(text)
    (path,) = lines() - before
    assert "def forward_" in "".join(linecache.getlines(path))
    kernel = next(v for k, v in found.items() if k.startswith("forward_"))
    del found
    for _ in range(5):
        triton.functions_of(text)
    assert path in lines()
    del kernel
    assert len(lines() - before) == 1 and path not in lines()


@pytest.mark.parametrize("name", CELLS)
def test_the_text_is_kernels_and_nothing_else(name: str) -> None:
    """Functions decorated by triton.jit, whose names are v0, v1, ... and those of the generator."""
    found = ast.parse(triton_source.source_of(sample(name)).text)
    doc, *imports = [node for node in found.body if not isinstance(node, ast.FunctionDef)]
    assert isinstance(doc, ast.Expr) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in imports)
    assert "\n".join(map(ast.unparse, imports)) == ast.unparse(ast.parse(triton_source.HEAD).body[1:])  # type: ignore
    kernels = [node for node in found.body if isinstance(node, ast.FunctionDef)]
    assert 2 <= len(kernels) <= 8
    for kernel in kernels:
        assert kernel.name.partition("_")[0] in ("forward", "backward")
        assert [ast.unparse(d).partition("(")[0] for d in kernel.decorator_list] == ["triton.jit"]


def test_what_a_user_calls_things_is_not_in_the_text() -> None:
    """Names that would be code, were they written there."""
    odd = "import os; os.abort()\n#"

    def step(a: Any, h: Any) -> Any:
        return torch.tanh(a + h)

    fields = {"gates": 1, "states": ("h",), "step": staticmethod(step), "__qualname__": odd, "__doc__": odd}
    program = program_of(spec_of(type(odd, (rnnkit.Cell,), fields)), 24)
    assert program.name == odd
    text = triton_source.source_of(program).text
    assert "abort" not in text
    other = program_of(spec_of(type("os", (rnnkit.Cell,), {**fields, "__qualname__": "os"})), 24)
    assert triton_source.source_of(other).text == text


def test_other_names_of_parameters_make_the_same_text() -> None:
    def one(a: Any, h: Any, p: Any) -> Any:
        return torch.tanh(a + h * p)

    def two(a: Any, tl: Any, triton: Any) -> Any:
        return torch.tanh(a + tl * triton)

    texts = []
    for step, state, name in ((one, "h", "p"), (two, "tl", "triton")):
        fields = {"gates": 1, "states": (state,), name: rnnkit.per_unit(), "step": staticmethod(step)}
        program = program_of(spec_of(type("Named", (rnnkit.Cell,), fields)), 24)
        texts.append(triton_source.source_of(program).text)
    assert texts[0] == texts[1]


def test_a_constant_is_written_as_a_number() -> None:
    """Whatever a graph holds: a number that torch makes of itself, infinite and NaN included."""
    number = triton_source._Text._number
    assert number(0.1) == "tl.full((), 0.1, F)" and number(float("-inf")) == 'tl.full((), float("-inf"), F)'
    program = sample("LSTM")
    graph = program.forward.copy()
    graph.nodes = [Node("const", (), "os.abort()") if n.op == "input" else n for n in graph.nodes]
    with pytest.raises(ValueError, match="could not convert string to float"):
        triton_source.constant_value(graph, 0, program.hidden)


# Compilation.


def kernels_of(name: str, hidden: int, dtype: torch.dtype) -> dict[str, tuple[Any, dict[str, Any], int]]:
    """Each kernel with the arguments of a launch and its warps: everything on."""
    spec, found = spec_of(CELLS[name]), {}
    program = program_of(spec, hidden)
    t, o = draw(spec, steps=2, rows=3, hidden=hidden, lengths=True, reset=True).to(dtype), CellOptions(all_states=True)

    def run(kernel: Any, grid: tuple[int], warps: int, arguments: dict[str, Any]) -> None:
        found[kernel.fn.__name__] = kernel, arguments, warps

    outputs, saved = triton.forward(program, t, o, True, run=run)
    triton.backward(program, t, o, outputs.y, saved, grads_of(spec, t, dtype), needs_of(spec, t), run=run)
    return found


def report(name: str, chip: str, hidden: int, dtype: torch.dtype) -> list[tuple[str, int, int]]:
    """Registers and bytes of stack of each kernel."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from rnnkit.benchmarks.usage import triton_usage

    lines = []
    for kernel_name, (kernel, arguments, warps) in kernels_of(name, hidden, dtype).items():
        target, asked = make_backend(triton_usage._target(chip)), {"num_warps": warps, **triton.OPTIONS}
        bind = create_function_from_signature(kernel.signature, kernel.params, target)
        bound, special, _ = bind(**arguments, **asked)
        _, types, constants, known = kernel._pack_args(target, asked, bound, special, asked)
        facts = tuple((place, tuple(map(tuple, some))) for place, some in known.items())
        usage = triton_usage._usage(
            kernel, chip, tuple(types.items()), tuple(constants.items()), facts, tuple(asked.items())
        )
        lines.append((kernel_name, *usage[:2]))
    return lines


SHORT = list(zip(COMPILED, (*CHIPS, "sm_90"), ("float32", "bfloat16", "bfloat16", "float16"), strict=True))
LONG = {
    chip: [(name, chip, dtype) for name in COMPILED for dtype in ("float32", "bfloat16", "float64")] for chip in CHIPS
}


@needs_triton
@pytest.mark.parametrize("cases", [SHORT, *(pytest.param(v, marks=pytest.mark.long, id=k) for k, v in LONG.items())])
def test_kernels_compile_and_spill_nothing(tmp_path: Path, cases: list[tuple[str, str, str]]) -> None:
    """In a process whose cache of compiled kernels is empty."""
    code = "import torch, test_triton_programs as t; print(["
    code += ", ".join(f"t.report({name!r}, {chip!r}, 128, torch.{dtype})" for name, chip, dtype in cases) + "])"
    path = os.pathsep.join([str(TESTS.parent), *(str(TESTS / d) for d in ("oracles", "custom", "triton", "backends"))])
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS.parent, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    for (name, chip, dtype), lines in zip(cases, ast.literal_eval(done.stdout), strict=True):
        assert {line[0].partition("_")[0] for line in lines} == {"forward", "backward"}
        for kernel, registers, stack in lines:
            assert stack == 0, f"{name} {kernel} spills {stack} bytes on {chip}"
            assert registers <= REGISTERS[chip] * (2 if dtype == "float64" else 1), f"{name} {kernel} takes {registers}"


# What is refused.


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    o, program = CellOptions(), sample("LSTM")
    monkeypatch.setattr(backend, "uninstalled", lambda: "Triton is not installed")
    assert triton.unsupported(program, "cuda", torch.float32, o) == ["Triton is not installed"]
    monkeypatch.setattr(backend, "uninstalled", lambda: None)
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    monkeypatch.setattr(backend, "missing", lambda: None)
    for dtype in triton.DTYPES:
        assert triton.unsupported(program, "cuda", dtype, o) == triton.unsupported(None, "cuda", dtype, o) == []
    assert triton.unsupported(program, "cpu", torch.float32, o) == ["runs on the device cuda, got cpu"]
    (reason,) = triton.unsupported(program, "cuda", torch.complex64, o)
    assert reason.endswith("float16, got torch.complex64")
    monkeypatch.setattr(backend, "missing", lambda: "needs a GPU")
    assert triton.unsupported(None, "cuda", torch.float32, o) == ["needs a GPU"]


def test_the_tile_holds_a_row() -> None:
    for hidden in (1, 2, 5, 16, 24, 256, 257, 1000, 4096):
        rows, units, warps = triton.tile(hidden)
        assert units >= hidden > units // 2 and rows & (rows - 1) == 0 and 1 <= warps <= triton.MOST_WARPS
