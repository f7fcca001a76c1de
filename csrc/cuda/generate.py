"""Writes the .cu files that compile the CUDA kernels: one for each row of rnnkit/backends/cuda/configs.py.

    python csrc/cuda/generate.py FOLDER

A file is written only where its text changed, so what was compiled from it stays; a file that no row has goes. Imports
nothing of the package: setup.py loads this by its path before there is one.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TABLE = Path(__file__).resolve().parents[2] / "rnnkit" / "backends" / "cuda" / "configs.py"


def table() -> ModuleType:
    """The table, on its own."""
    spec = importlib.util.spec_from_file_location("rnnkit_cuda_table", TABLE)
    if spec is None or spec.loader is None:
        raise ImportError(f"{TABLE} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write(folder: Path) -> list[Path]:
    """The files of all rows, in the order of the table."""
    rows = table()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for row in rows.ROWS:
        path = folder / f"{row.name}.cu"
        text = rows.source(row)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
        paths.append(path)
    for path in set(folder.glob("*.cu")) - set(paths):
        path.unlink()
    return paths


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: {sys.argv[0]} FOLDER")
    write(Path(sys.argv[1]))
