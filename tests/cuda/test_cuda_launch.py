"""What a launch of a CUDA kernel asks of CUDA, and what is said of one that fails. Without a GPU: kernels are compiled
by nvcc and launched where there is no device, or where CUDA's own functions are replaced by those of launches.cu.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rnnkit.backends.cuda import configs as cuda_configs

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
CTA, STEP = "cta_rnn_bf16_64", "step_lstm_bf16_8"
WRAPPED = ("cudaLaunchKernelExC", "cudaFuncSetAttribute", "cudaGetDevice", "cudaPeekAtLastError", "cudaGetLastError")

spec = importlib.util.spec_from_file_location("nvcc", SOURCES / "nvcc.py")
assert spec is not None and spec.loader is not None
nvcc = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nvcc)
HOME = nvcc.home()
pytestmark = pytest.mark.skipif(HOME is None, reason=nvcc.MISSING)

Program = Callable[..., list[str]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """launches.cu with a row of each regime; a call runs a part of it, and gives the lines that it prints."""
    folder = tmp_path_factory.mktemp("launches")
    rows = {row.name: row for row in cuda_configs.ROWS}
    for name in (CTA, STEP):
        (folder / f"{name}.cu").write_text(cuda_configs.source(rows[name]))
    command = [HOME / "bin" / "nvcc", "-std=c++17", nvcc.gencode("sm_80"), f"-I{SOURCES}", "-t", "2"]
    command += [f"-Xlinker=--wrap={name}" for name in WRAPPED]
    command += [ROOT / "tests" / "cuda" / "launches.cu", *(folder / f"{name}.cu" for name in (CTA, STEP))]
    done = subprocess.run([*command, "-o", folder / "launches"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def run(*arguments: str, **variables: str) -> list[str]:
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "CUDA_LAUNCH_BLOCKING": "0", **variables}
        done = subprocess.run([folder / "launches", *arguments], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_a_failed_launch_says_all_of_it(program: Program) -> None:
    """Where there is no device: CUDA says so before every launch."""
    said = program("refused", CTA, STEP)
    reason = said[0].rpartition(": ")[2]
    assert reason in (
        "CUDA driver version is insufficient for CUDA runtime version (cudaErrorInsufficientDriver)",
        "no CUDA-capable device is detected (cudaErrorNoDevice)",
    )
    cta, step = "on 1 x 1 blocks of 128 threads with 3072 bytes", "on 1 x 1 blocks of 256 threads with 0 bytes"
    assert said == [
        f"rnnkit: CUDA kernel {name} ({where}) {how} of shared memory: CUDA had failed before this launch: {reason}"
        for name, where, how in (
            (CTA, "forward, cta_forward", cta),
            (CTA, "backward, cta_backward", cta),
            (STEP, "forward, each<Begin>", step),
            (STEP, "backward, each<Begin>", step),
        )
    ]


def test_which_of_many_launches_failed(program: Program) -> None:
    """Two steps of an LSTM with a projection."""
    said = program("walk", STEP)
    wrong = "of shared memory: invalid configuration argument (cudaErrorInvalidConfiguration)"
    assert all(line.startswith(f"rnnkit: CUDA kernel {STEP} (") and line.endswith(wrong) for line in said)
    forward = ["each<Begin>", *(f"step<{what}>, step {k}" for k in (0, 1) for what in ("Gates", "Project"))]
    backward = ["each<Begin>", *(f"step<{what}>, step {k}" for k in (0, 1) for what in ("Arrive", "Gates"))]
    assert [line.partition("(")[2].partition(")")[0] for line in said] == [
        *(f"forward, {what}" for what in (*forward, "each<End>")),
        *(f"backward, {what}" for what in (*backward, "step<End>", "each<EndOfC>")),
    ]
    grids = [line.partition(" on ")[2].partition(" of shared")[0] for line in said[1:3]]
    assert grids == [
        f"1 x {tiles} blocks of 256 threads with {blocks * 4096} bytes" for tiles, blocks in ((3, 4), (2, 1))
    ]


@pytest.mark.parametrize("waits", [False, True])
def test_an_earlier_error_is_not_laid_to_a_launch(program: Program, waits: bool) -> None:
    """Neither one that stood there, nor one that only a kernel can make which ran, unless launches wait for theirs."""
    named = "rnnkit: CUDA kernel row on 5 x 2 blocks of 32 threads with 0 bytes of shared memory"
    earlier = f"{named}: CUDA had failed before this launch"
    advice = "with CUDA_LAUNCH_BLOCKING=1 it is raised where it happens"
    failure = "unspecified launch failure (cudaErrorLaunchFailure)"
    assert program("earlier", CUDA_LAUNCH_BLOCKING=str(int(waits))) == [
        f"{earlier}: an illegal memory access was encountered (cudaErrorIllegalAddress); {advice}",
        f"{earlier}: unknown error (cudaErrorUnknown)",
        f"{named}: {failure}" if waits else f"{earlier}: {failure}; {advice}",
        f"{named}: invalid configuration argument (cudaErrorInvalidConfiguration)",
        "ran",
    ]


def test_what_failed_is_not_there_before_the_next(program: Program) -> None:
    """Not where it was said, and CUDA goes on after it."""
    said = "32 threads with 0 bytes of shared memory: invalid configuration argument (cudaErrorInvalidConfiguration)"
    assert program("again") == [f"rnnkit: CUDA kernel row on 5 x 2 blocks of {said}"] * 2


def test_shared_memory_is_asked_for_once(program: Program) -> None:
    """By each kernel on each device, of eight threads; again for more; and again where it was refused."""
    said = program("shared")
    refused = (
        "rnnkit: CUDA kernel row on 5 x 2 blocks of 32 threads with 232449 bytes of shared memory: invalid argument"
    )
    assert said == ["4 of 12000", "5", *[f"{refused} (cudaErrorInvalidValue)"] * 2, "7 of 12003"]
