"""How the CUDA kernels are compiled: where nvcc is, with which flags, for which chips.

    python csrc/cuda/nvcc.py      prints the folder of the toolkit; exit code 1 where there is none

For setup.py and benchmarks/usage/cuda_usage.py, which load this by its path: one builds what the other proves.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

USUAL = "/usr/local/cuda"
# A spill is an error. Line numbers, for compute-sanitizer and profilers, come with NVCC_APPEND_FLAGS=-lineinfo and make
# the library more than twice as large.
FLAGS = ["-O3", "-std=c++17", "-Xptxas=-warn-spills,-Werror"]


def home(*more: str | None) -> Path | None:
    """The folder of a CUDA toolkit that can compile, CUDA_HOME's first; `more`: others who may know one."""
    found = shutil.which("nvcc")
    beside = str(Path(found).resolve().parents[1]) if found else None
    for place in (os.environ.get("CUDA_HOME"), *more, beside, USUAL):
        # nvcc on the PATH may be a script that calls another: the headers tell.
        if place and Path(place, "bin/nvcc").is_file() and Path(place, "include/cuda_runtime_api.h").is_file():
            return Path(place)
    return None


MISSING = (
    "no CUDA toolkit was found: there must be bin/nvcc and include/cuda_runtime_api.h in the folder that CUDA_HOME "
    f"names, beside the nvcc on the PATH or in {USUAL}"
)


def version(place: Path) -> str:
    """Of the compiler, like 13.0."""
    said = subprocess.run([place / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None:
        raise ValueError(f"{place / 'bin/nvcc'} --version says no release: {said!r}")
    return found[1]


def smaller(release: str) -> list[str]:
    """The flag that makes a library less than half as large, of a release of nvcc that has it and whose drivers do."""
    return ["-compress-mode=size"] if int(release.partition(".")[0]) >= 13 else []


def gencode(chip: str) -> str:
    """The flag for a chip: sm_90a compiles for it, compute_100 keeps PTX that later chips compile for themselves."""
    return f"-gencode=arch=compute_{chip.rpartition('_')[2]},code={chip}"


def chosen(asked: str | None, chips: Iterable[str], capability: tuple[int, int] | None) -> list[str]:
    """What is compiled for: all chips and PTX of the last, or those asked for, or (`native`) this machine's.

    capability: of this machine's GPU. A chip serves every GPU of its generation. Raises ValueError.
    """
    chips = list(chips)
    latest = f"compute_{chips[-1].rpartition('_')[2]}"
    known = [*chips, latest]
    if not asked:
        return known
    if asked == "native":
        if capability is None:
            raise ValueError("native asks for this machine's GPU, and torch sees none here")
        mine = [chip for chip in chips if int(re.sub(r"\D", "", chip)) // 10 == capability[0]]
        return mine or [latest]
    names = asked.split(",")
    strange = [name for name in names if name not in known]
    if strange:
        raise ValueError(f"expected native or some of {','.join(known)}, got {asked!r}")
    return names


if __name__ == "__main__":
    print(home() or MISSING)
    sys.exit(home() is None)
