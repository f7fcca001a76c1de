"""No hot loop of the compiled engine keeps its sums on the stack, by tests/ci/spills.py.

A tile that is a row too tall gives the same numbers and takes up to twice the time. The check itself is held by tiles
compiled here: the engine's own, which fits, and one row more, which does not.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import rnnkit

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "csrc" / "cpu"
TOOLS = {"objdump": "binutils", "g++": "g++"}

PLANT = """
#include <immintrin.h>
#include "headers.h"
#define RNNKIT_AVX2
#define RNNKIT_BYTES 32
#define RNNKIT_REGISTERS 16
namespace rnnkit {
#include "simd.h"
#include "operands.h"
#include "tiles.h"
constexpr int width = 2;
template void tile<TYPE, width, 1, tile_rows(width) + MORE>(const TYPE* const*, int64_t, const TYPE*, int64_t,
                                                            int64_t, TYPE*, int64_t, bool, const TYPE*, int64_t);
}
"""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("spills", ROOT / "tests" / "ci" / "spills.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


spills = load()


def need(*commands: str) -> None:
    """Skip where a command is missing; in CI that is an error."""
    for command in commands:
        if shutil.which(command) is None:
            reason = f"there is no {command} (Debian's package {TOOLS[command]})"
            pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)


def test_the_built_engine_keeps_its_sums_in_registers() -> None:
    need("objdump")
    libraries = sorted(Path(rnnkit.__file__).parent.glob("_C*.so"))
    if not libraries:
        pytest.skip("the extension is not built")
    loops = spills.hot_loops(libraries[0])
    variants = ("avx512", "avx2", "baseline") if platform.machine() == "x86_64" else ("baseline",)
    for variant in variants:
        own = [loop for loop in loops if f"::{variant}::" in loop.function]
        assert len(own) >= 20, f"{len(own)} hot loops of {variant}: is the library stripped?"
        for name in ("tile<float", "tile<double", "tn_tile<float", "tn_tile<double"):
            assert any(name in loop.function for loop in own), f"no hot loop of {variant}'s {name}"
    assert [loop for loop in loops if loop.spills] == []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the planted tile is AVX2's")
@pytest.mark.parametrize("number", ["float", "double"])
@pytest.mark.parametrize("more", [0, 1])
def test_a_tile_that_is_a_row_too_tall_is_found(number: str, more: int, tmp_path: Path) -> None:
    need("objdump", "g++")
    source, built = tmp_path / "plant.cpp", tmp_path / "plant.o"
    source.write_text(PLANT.replace("TYPE", number).replace("MORE", str(more)), encoding="utf-8")
    flags = ["-O3", "-std=c++17", "-fPIC", "-Wno-psabi", "-mavx2", "-mfma", f"-I{CPU}"]
    subprocess.run(["g++", *flags, "-c", str(source), "-o", str(built)], check=True)
    loops = spills.hot_loops(built)
    assert len(loops) >= 1
    assert bool([loop for loop in loops if loop.spills]) == bool(more)
    program = [sys.executable, str(ROOT / "tests" / "ci" / "spills.py"), str(built)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == more, done.stdout + done.stderr
    assert ("stores:" in done.stdout) == bool(more)


def test_a_file_without_hot_loops_is_no_success(tmp_path: Path) -> None:
    need("objdump", "g++")
    source, built = tmp_path / "empty.cpp", tmp_path / "empty.o"
    source.write_text("int nothing() { return 0; }\n", encoding="utf-8")
    subprocess.run(["g++", "-c", str(source), "-o", str(built)], check=True)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ci" / "spills.py"), str(built)], capture_output=True, text=True
    )
    assert done.returncode == 1 and "0 hot loops" in done.stdout


LISTING = """
plant.o:     file format elf64-littleaarch64

Disassembly of section .text:

0000000000000000 <tile>:
   0:	mov	x1, #0x0
   4:	fmla	v0.4s, v1.4s, v2.s[0]
   8:	fmla	v3.4s, v1.4s, v2.s[0]
   c:	fmla	v4.4s, v1.4s, v2.s[0]
  10:	fmla	v5.4s, v1.4s, v2.s[0]
  14:	fmla	v6.4s, v1.4s, v2.s[0]
  18:	fmla	v7.4s, v1.4s, v2.s[0]
  1c:	STORE
  20:	cmp	x3, x1
  24:	b.ne	4 <tile+0x4>  // b.any
  28:	str	q0, [sp, #16]
  2c:	ret
"""


@pytest.mark.parametrize(
    ("store", "found"),
    [("str\tq7, [sp, #32]", 1), ("stp\tq6, q7, [x29, #-32]", 1), ("str\tq7, [x4]", 0), ("str\tx7, [sp, #32]", 0)],
)
def test_aarch64_is_read_too(store: str, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, LISTING.replace("STORE", store), "")

    monkeypatch.setattr(spills.subprocess, "run", shown)
    (loop,) = spills.hot_loops(Path("plant.o"))
    assert loop.multiply_adds == 6 and len(loop.spills) == found
