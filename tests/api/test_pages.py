"""What the pages for users say in Python runs, and their comments on shapes are true.

Of a page every ```python block runs in order, in one namespace and in an empty folder. A comment `name [4, 40, 128]` is
a claim about the variable of that name when its block has run. torch.compile runs without inductor's C++ here, which
takes 20 seconds a page; test_compile.py has it.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
SHAPE = re.compile(r"\b([A-Za-z_]\w*) \[(\d+(?:, \d+)*)\]")


def blocks(page: Path) -> list[str]:
    """Each with the lines before it, so that a traceback gives the page's own line."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * text[: found.start(1)].count("\n") + found[1] for found in BLOCK.finditer(text)]


def claims(block: str) -> list[tuple[str, list[int]]]:
    """The shapes that a block's comments give."""
    comments = [line.partition("#")[2] for line in block.splitlines()]
    return [(name, [int(n) for n in sizes.split(", ")]) for c in comments for name, sizes in SHAPE.findall(c)]


def run(page: Path) -> int:
    """Run a page's blocks and hold them to their shapes; returns how many shapes there were."""
    names: dict[str, Any] = {"__name__": "__main__"}
    held = 0
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)
        for name, sizes in claims(block):
            assert name in names, f"{page.name}: a comment gives the shape of {name}, which is no variable"
            assert list(names[name].shape) == sizes, f"{page.name}: {name} is {list(names[name].shape)}, not {sizes}"
            held += 1
    return held


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda p: str(p.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_page_runs_as_it_stands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()  # what other tests compiled of the same functions counts towards torch's limit
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    assert run(page) >= 2


def test_the_pages_are_there() -> None:
    guides = {"conversion", "reinforcement_learning", "speech", "time_series", "derivatives", "compile_export"}
    assert guides <= {page.stem for page in PAGES if blocks(page)} and blocks(ROOT / "README.md")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\nx = 1 / 0\n```\n", "division by zero"),
        ("```python\nx = torch.zeros(2, 3)  # x [2, 4]\n```\n", r"x is \[2, 3\], not \[2, 4\]"),
        ("```python\nx = torch.zeros(2)  # y [2]\n```\n", "y, which is no variable"),
    ],
)
def test_a_page_that_is_wrong_is_found(text: str, said: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nimport torch\n```\n\n" + text)
    with pytest.raises((AssertionError, ZeroDivisionError), match=said):
        run(page)
