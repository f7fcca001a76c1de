"""The documents hang together: every link leads somewhere, every variable of the environment is told of, and so is
every test that is left to `make test-all`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^ *(```+|~~~+).*?^ *\1", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)|\b(?:src|srcset|href)=\"([^\"\s]+)\"")
HEADING = re.compile(r"^#{1,6} +(.*)$", re.M)
# Where the environment is read: Python, C++, the Makefile and the shell.
READ = re.compile(
    r"(?:environ(?:\.get\(|\.setdefault\(|\[)|getenv\(|choice\(|Regimes\()\s*\"(RNNKIT_\w+)\"|\$\{?\(?(RNNKIT_\w+)"
)
READERS = ("rnnkit/**/*.py", "kernels/*.py", "benchmarks/**/*.py", "csrc/**/*.*", "setup.py", "Makefile")


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What a link may name in a page, as GitHub makes it of headings."""
    found: set[str] = set()
    for heading in HEADING.findall(prose(page)):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-{sum(name.startswith(slug) for name in found)}")
    return found


def broken(page: Path) -> Iterator[str]:
    """The links of a page that lead nowhere in this tree; other people's pages are not asked."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    for link in (one or other for one, other in LINK.findall(text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page if not name else page.parent / name
        if not target.exists():
            yield f"{link}: there is no {target}"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: {target} has no heading for #{anchor}"


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert not list(broken(page))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[a](b.md) [c](b.md#one-two) [d](#here) [e](https://example.org/x.md)\n# Here\n", 0),
        ("[a](gone.md)", 1),
        ("[a](b.md#three)", 1),
        ("[a](#there)", 1),
        ('<img src="gone.svg"> <source srcset="b.md">', 1),
        ("`[a](gone.md)`\n\n```\n[b](gone.md)\n```\n", 0),
    ],
)
def test_a_broken_link_is_found(text: str, wrong: int, tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# One, two!\n\n```\n# three\n```\n")
    (tmp_path / "a.md").write_text(text)
    assert len(list(broken(tmp_path / "a.md"))) == wrong


def test_every_variable_of_the_environment_is_told_of() -> None:
    sources = [path for pattern in READERS for path in ROOT.glob(pattern) if path.suffix not in (".so", ".csv")]
    read = {one or other for p in sources for one, other in READ.findall(p.read_text(encoding="utf-8"))}
    assert {"RNNKIT_CPU_ISA", "RNNKIT_CUDA", "RNNKIT_CUDA_ARCH", "RNNKIT_CUDA_REGIME", "RNNKIT_EXTENSION"} <= read
    told = set(re.findall(r"`(RNNKIT_\w+)`", (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")))
    assert told == read


def test_what_is_marked_long_is_told_of() -> None:
    page = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    _, section = page.split("## What `make test` leaves to `make test-all`\n")
    told = set(re.findall(r"^- `(tests/[\w/]+\.py)`:", section.partition("\n## ")[0], re.M))
    marked = re.compile(r"^@pytest\.mark\.long$|^@pytest\.mark\.parametrize\(.*\bsome\(", re.M)
    files = [path for path in ROOT.glob("tests/**/test_*.py") if marked.search(path.read_text(encoding="utf-8"))]
    assert told and told == {path.relative_to(ROOT).as_posix() for path in files}
