"""The built wheel beside other versions of Python and torch, each pair in an environment of its own.

One wheel serves CPython >= 3.10 (limited API) and torch >= 2.11 (stable ABI). Here it is installed, not built, beside
each pair whose interpreter is found; a pair without one is named and left out. Asked of each: `info`, numbers equal to
torch.nn's with gradients, lengths, resets, and torch.compile. A torch with CUDA takes some 5 GB for each pair.

    python tests/ci/compat.py WHEEL [PYTHON:TORCH ...]      such as 3.12:2.11.0; exits 1 where a pair fails or none ran
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PAIRS = ("3.12:2.11.0", "3.10:2.13.0", "3.13:2.13.0")
PROGRAM = Path(__file__).with_name("compat_program.py")


def interpreter(version: str) -> str | None:
    """A Python of this version that runs: on the PATH, or among those of pyenv, whose shims may refuse to run."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    installed = sorted(map(str, pyenv.glob(f"{version}.*/bin/python{version}")))
    for python in filter(None, [shutil.which(f"python{version}"), *installed]):
        if subprocess.run([python, "-c", "import venv"], capture_output=True).returncode == 0:
            return python
    return None


def tried(wheel: Path, python: str, torch: str) -> bool:
    """Whether the wheel works beside this pair. What fails prints its own reasons."""
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / "env" / "bin" / "python"
        pip = [inside, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        commands = (
            [python, "-m", "venv", Path(folder) / "env"],
            [*pip, f"torch=={torch}", "numpy", "setuptools"],
            [*pip, "--no-deps", wheel],
            [inside, PROGRAM],
        )
        # Away from the clone, whose rnnkit would be found first.
        return all(subprocess.run(command, cwd=folder).returncode == 0 for command in commands)


def main(wheel: str, *pairs: str) -> int:
    results = []
    for pair in pairs or PAIRS:
        version, torch = pair.split(":")
        python = interpreter(version)
        if python is None:
            print(f"compat: left out, there is no python{version} here (torch {torch})", flush=True)
            continue
        print(f"compat: Python {version}, torch {torch}", flush=True)
        results.append(tried(Path(wheel).resolve(), python, torch))
        print(f"compat: Python {version}, torch {torch}: {'works' if results[-1] else 'FAILED'}", flush=True)
    if not results:
        print("compat: no pair ran", flush=True)
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
