"""What the documents name exists: a path of the tree in backticks, and a module that a command runs.

A path begins with a folder of the tree. `<cell>` and `*` in it stand for anything; a file that is made somewhere else,
such as `benchmarks/results/<device>-probes.csv`, needs its folder alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "DESIGN.md", "CONTRIBUTING.md")] + sorted(ROOT.glob("docs/**/*.md"))
FOLDERS = ("rnnkit", "csrc", "kernels", "benchmarks", "tests", "docs", "examples")
PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./*<>-]*)`")
MODULE = re.compile(r"python -m (rnnkit[\w.]*\w)")
INSTALLED = {"rnnkit.benchmarks": "benchmarks", "rnnkit.kernels": "kernels"}  # packages that lie elsewhere in a clone


def missing(text: str, root: Path = ROOT) -> Iterator[str]:
    """The paths and modules in a document that are not in the tree."""
    for path in PATH.findall(text):
        pattern = re.sub(r"(?:<\w+>|\*)+", "*", path).rstrip("/")
        folder = pattern.rpartition("/")[0]
        if not any(root.glob(pattern)) and not ("<" in path and "*" not in folder and (root / folder).is_dir()):
            yield path
    for module in MODULE.findall(text):
        place = module
        for package, folder in INSTALLED.items():
            place = re.sub(rf"^{re.escape(package)}(?=\.|$)", folder, place)
        file = root / place.replace(".", "/")
        if not file.with_suffix(".py").exists() and not (file / "__init__.py").exists():
            yield module


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_documents_name_exists(path: Path) -> None:
    assert list(missing(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("text", "absent"),
    [
        ("`rnnkit/ops.py`, `csrc/cells/` and `csrc/cells/<cell>.h`", []),
        ("`rnnkit/gone.py` and `csrc/gone/`", ["rnnkit/gone.py", "csrc/gone/"]),
        ("`csrc/cells/*.h`, `csrc/cells/<cell>*.h`, `csrc/cells/*.rs`", ["csrc/cells/*.rs"]),
        ("`csrc/cells/<device>-probes.csv`, `csrc/gone/<cell>.h`", ["csrc/gone/<cell>.h"]),
        ("`build/rnnkit/x`, rnnkit/gone.py", []),
        ("`python -m rnnkit.bench`; python -m rnnkit info; python -m rnnkit.benchmarks.run.", ["rnnkit.bench"]),
    ],
)
def test_what_is_missing_is_found(text: str, absent: list[str], tmp_path: Path) -> None:
    for name in ("rnnkit/__init__.py", "rnnkit/ops.py", "csrc/cells/gru.h", "benchmarks/run.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(missing(text, tmp_path)) == absent
