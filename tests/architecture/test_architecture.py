"""The shape of the source, as DESIGN.md promises it: imports point down, files stay short and say what they are for.

Everything is read with `ast` and git, so a rule holds for files that no other test imports.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "rnnkit"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Floors from the ground up; a module imports from floors below its own, and from its own where FRIENDS says so.
FLOORS: list[tuple[str, ...]] = [
    (
        "rnnkit.cells",
        "rnnkit.masks",
        "rnnkit.libraries",
        "rnnkit.version",
        "rnnkit.backends.spec",
        "rnnkit.backends.cpu.extension",
        "rnnkit.backends.cuda.configs",
        "rnnkit.custom.errors",
    ),
    ("rnnkit.backends.triton.configs", "rnnkit.backends.processor", "rnnkit.custom.graph", "rnnkit.custom.fingerprint"),
    ("rnnkit.custom.declare", "rnnkit.custom.digest"),
    ("rnnkit.custom.inputs", "rnnkit.custom.spans"),
    ("rnnkit.custom.program", "rnnkit.custom.triton_source"),
    ("rnnkit.autocast", "rnnkit.layer.streams"),
    ("rnnkit.reference", "rnnkit.kernels"),
    ("rnnkit.backends.chunks",),
    ("rnnkit.backends.base",),
    (
        "rnnkit.backends.scan_backend",
        "rnnkit.backends.dispatch_times",
        "rnnkit.backends.user_times",
        "rnnkit.backends.gpu",
    ),
    tuple(f"rnnkit.backends.{name}" for name in ("reference", "torch", "cpu", "cuda", "triton")),
    ("rnnkit.backends",),
    ("rnnkit.layer.custom_ops", "rnnkit.layer.override", "rnnkit.layer.profiler", "rnnkit.checks", "rnnkit.layouts"),
    ("rnnkit.layer.autograd",),
    ("rnnkit.layer",),
    ("rnnkit.custom",),
    ("rnnkit.ops", "rnnkit.variants"),
    ("rnnkit.functional",),
    ("rnnkit.nn",),
    ("rnnkit.convert", "rnnkit.explain"),
]
# What makes up the package's face, and programs on top of it: they may import anything but one another's insides.
FACE = ("rnnkit", "rnnkit.__main__")
LEAVES = (
    "rnnkit.cells",
    "rnnkit.masks",
    "rnnkit.backends.spec",
    "rnnkit.backends.cpu.extension",
    "rnnkit.backends.cuda.configs",
)


def within(module: str, place: str) -> bool:
    return module == place or module.startswith(place + ".")


def floor(module: str) -> int | None:
    """The number of the floor on which a module stands; None for programs on top of the layers."""
    found = [(len(place), k) for k, places in enumerate(FLOORS) for place in places if within(module, place)]
    return max(found)[1] if found else None


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(module: str) -> Iterator[str]:
    """The modules of this package that it imports, wherever in the file, as full names."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if within(name.name, "rnnkit"))
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            else:
                base = node.module or ""
            if not within(base, "rnnkit"):
                continue
            for name in node.names:
                full = f"{base}.{name.name}"
                yield full if full in MODULES else base


def test_the_plan_names_what_there_is() -> None:
    for places in FLOORS:
        for place in places:
            assert place in MODULES or place == "rnnkit.kernels", place
    one_hop = [m for m in MODULES if m.count(".") == 1 and floor(m) is None and m not in FACE]
    # Programs on top of the layers. A new module belongs on a floor, or here.
    assert set(one_hop) <= {
        "rnnkit.demo",
        "rnnkit.diagnostics",
        "rnnkit.sequence",
        "rnnkit.experiments",
        "rnnkit.benchmarks",
        "rnnkit.cli",
        "rnnkit.tune",
    }


@pytest.mark.parametrize("module", [m for m in MODULES if floor(m) is not None])
def test_imports_point_down(module: str) -> None:
    here = floor(module)
    assert here is not None
    for other in imports(module):
        there = floor(other)
        family = module.rpartition(".")[0] if MODULES[module].name != "__init__.py" else module
        same_room = here == there and (within(other, family) or within(module, other))
        assert there is not None and (there < here or same_room), f"{module} imports {other}, which stands above it"


@pytest.mark.parametrize("module", [m for m in MODULES if m in LEAVES])
def test_leaves_import_nothing_of_ours(module: str) -> None:
    assert list(imports(module)) == []


def test_backends_do_not_know_one_another() -> None:
    every = {f"rnnkit.backends.{name}" for name in ("reference", "torch", "cpu", "cuda", "triton")}
    rooms = {m for m in MODULES if within(m, "rnnkit.backends") and m.count(".") == 2}
    assert rooms - every == {
        f"rnnkit.backends.{name}"
        for name in (
            "base",
            "chunks",
            "dispatch_times",
            "gpu",
            "processor",
            "scan_backend",
            "select",
            "spec",
            "user_times",
        )
    }
    shared = {"rnnkit.backends.cpu.extension"}  # the library has the CUDA kernels too
    for module in (m for m in MODULES if any(within(m, backend) for backend in every)):
        own = next(backend for backend in every if within(module, backend))
        others = {m for m in imports(module) if any(within(m, backend) for backend in every - {own})}
        assert others <= shared, module
    cells = [m for m in MODULES if re.fullmatch(r"rnnkit\.reference\.(rnn|lstm|gru)", m)]
    assert len(cells) == 3
    for module in cells:
        assert not (set(imports(module)) & set(cells)), module


def test_layers_and_cells_do_not_know_one_another() -> None:
    kinds = {f"rnnkit.nn.{name}" for name in ("rnn", "lstm", "gru")}
    for module in kinds:
        assert not (set(imports(module)) & kinds)


def test_optional_packages_are_imported_where_they_are_used() -> None:
    """`import rnnkit` must work with torch alone."""
    optional = {"triton", "matplotlib", "onnx", "onnxscript", "onnxruntime", "statsmodels", "numpy", "pytest"}
    for module, path in MODULES.items():
        if within(module, "rnnkit.kernels") or within(module, "rnnkit.benchmarks"):
            continue
        for node in tree(path).body:
            names = [n.name for n in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & optional, module


def tracked(*patterns: str) -> list[Path]:
    """The files that git knows or would take; everything under the root where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        found = [path for pattern in patterns for path in ROOT.rglob(pattern)]
    else:
        found = [ROOT / name for name in done.stdout.splitlines()]
    return [path for path in found if path.is_file()]


SOURCES = tracked("*.py", "*.cpp", "*.cu", "*.h", "*.cuh")
PYTHON = [path for path in SOURCES if path.suffix == ".py"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    words = ast.get_docstring(tree(path))
    first = path.read_text(encoding="utf-8").lstrip()
    said = words or first.startswith("# ")
    assert said, "open the file with a docstring (or, in a script, a comment) that says why it exists"


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_no_exception_is_swallowed(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
            assert not all(isinstance(line, ast.Pass) for line in node.body), f"line {node.lineno}: except: pass"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            assert "Exception" not in [ast.unparse(a) for a in node.args], f"line {node.lineno}: everything suppressed"


@pytest.mark.parametrize("module", MODULES)
def test_asserts_only_narrow_types(module: str) -> None:
    """`assert x is not None` tells the type checker what the lines above made sure of; no user can meet it."""
    for node in ast.walk(tree(MODULES[module])):
        if isinstance(node, ast.Assert):
            tests = node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]
            for test in tests:
                narrow = re.fullmatch(r"[\w.]+ is not None|isinstance\([\w.]+, [\w. |]+\)", ast.unparse(test))
                assert narrow, f"{module}, line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_has_a_docstring(module: str) -> None:
    def check(body: list[ast.stmt], inside: str, described: bool) -> None:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name[0] == "_":
                continue
            if any(ast.unparse(d).endswith("overload") for d in node.decorator_list):
                continue
            here = f"{inside}.{node.name}"
            if isinstance(node, ast.ClassDef):
                assert ast.get_docstring(node) or node.bases, here
                check(node.body, here, True)
            elif module in TYPED:
                assert ast.get_docstring(node), here

    check(tree(MODULES[module]).body, module, False)


# Where users and writers of backends call in; in the files of formulas the module's docstring holds the mathematics.
TYPED = ("rnnkit.functional", "rnnkit.ops", "rnnkit.convert", "rnnkit.explain", "rnnkit.layer.autograd",
         "rnnkit.layer.custom_ops", "rnnkit.layer.override", "rnnkit.nn.lstm",
         "rnnkit.nn.gru", "rnnkit.nn.rnn")  # fmt: skip


def test_public_names_explain_themselves() -> None:
    import rnnkit

    for public in rnnkit.__all__:
        words = getattr(rnnkit, public).__doc__
        assert words and len(words.split()) > 5, public
    for function in ("rnn", "lstm", "gru", "rnn_cell", "lstm_cell", "gru_cell"):
        assert getattr(rnnkit.functional, function).__doc__
    for layer in ("RNN", "LSTM", "GRU"):
        words = getattr(rnnkit, layer).__doc__
        assert all(part in words for part in ("Args:", "Inputs:", "Outputs:", "Errors:", "Source:")), layer
        assert getattr(rnnkit, layer).__qualname__ == layer


def test_no_path_of_one_machine_is_tracked() -> None:
    # Put together here, so that this file does not contain what it looks for.
    private = re.compile("/(" + "|".join(("tmp", "work", "root", "home/[a-z]+", "Users/[a-z]+")) + ")/")
    found = []
    for path in tracked("*"):
        if path.suffix in {".png", ".so", ".whl", ".gz", ".pt", ".bin"}:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{name(path)}: {line.strip()}" for line in text.splitlines() if private.search(line)]
    assert not found
