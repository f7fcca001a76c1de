"""What the documents name exists: a path of the tree in backticks, and a module that a command runs.

A path begins with a folder of the tree. `<cell>` and `*` in it stand for anything; a file that is made somewhere else,
such as `benchmarks/results/<device>-probes.csv`, needs its folder alone. Of a docstring each name in backticks is asked
for, by its words: some code has it.
"""

from __future__ import annotations

import ast
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


NAME = re.compile(r"`(_?[A-Za-z]\w*(?:\.\w+)*)`")
FOREIGN = {
    "JITFunction",
    "aot_eager",
    "encoder",
    "episode_starts",
    "is_init",
    "l0",
    "l0_reverse",
    "record_stream",
    "sixth",
}


def stale_names(code: dict[str, str], elsewhere: set[str]) -> Iterator[str]:
    """What docstrings name and neither code nor `elsewhere` has. code: a file's text by its name."""
    trees = {name: ast.parse(text) for name, text in code.items()}
    known, told = set(elsewhere), list[tuple[str, str]]()
    for file, tree in trees.items():
        for node in ast.walk(tree):
            for field in ("id", "attr", "arg", "name", "asname", "module"):
                value = getattr(node, field, None)
                known.update(value.split(".") if isinstance(value, str) else ())
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                told += [(file, name) for name in NAME.findall(ast.get_docstring(node) or "")]
    yield from (f"{file}: {name}" for file, name in told if not known.issuperset(name.split(".")))


def test_what_docstrings_name_exists() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    others = [*(path for path in ROOT.glob("csrc/**/*.*") if path.suffix in (".h", ".cpp", ".cu")), ROOT / "Makefile"]
    words = {word for path in others for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    words |= {part for path in files for part in path.relative_to(ROOT).with_suffix("").parts}
    assert list(stale_names({str(p): p.read_text(encoding="utf-8") for p in files}, words | FOREIGN)) == []


def test_a_stale_name_is_found() -> None:
    code = {"a": '"""`Kept.size`, `gone`, `Kept.gone` and `x = 1`."""\nclass Kept:\n    size = 1\n'}
    assert list(stale_names(code, set())) == ["a: gone", "a: Kept.gone"]


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
