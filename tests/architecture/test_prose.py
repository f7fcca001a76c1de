"""Documents stay readable: paragraphs are short, and DESIGN.md is read in ten minutes.

A paragraph is what a blank line, a heading or the next item of a list ends. Of a table each cell is one. Code counts
for nothing, and of a link its text alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
LONGEST = 600  # characters of a paragraph
DESIGN_WORDS = 1500

ITEM = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+")
FENCE = re.compile(r"\s*(```+|~~~+)")
CODE = re.compile(r"(?: {4}|\t)")


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """The number of its first line and the visible text of each paragraph of a Markdown document."""
    text = re.sub(r"<!--.*?-->", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.DOTALL)
    start, lines = 0, list[str]()
    fence = ""
    listed = False  # inside of a list, whose later paragraphs are indented as code is elsewhere
    for number, line in enumerate([*text.splitlines(), ""], 1):
        mark = FENCE.match(line)
        if fence:
            fence = "" if mark and mark[1].startswith(fence) else fence
            continue
        item = ITEM.match(line)
        code = not lines and not listed and CODE.match(line)
        ends = not line.strip() or mark or code or item or line.lstrip().startswith(("#", "|"))
        if ends and lines:
            yield start, visible(" ".join(lines))
            lines = []
        if mark:
            fence = mark[1]
        elif line.lstrip().startswith("|"):
            yield from ((number, visible(cell)) for cell in line.strip().strip("|").split("|"))
        elif item or not ends:
            listed = bool(item) or (listed and line.startswith(" "))
            start = start if lines else number
            lines.append(line[item.end() :] if item else line.strip(" >"))


def visible(text: str) -> str:
    """What a reader sees of it: of a link its text alone."""
    return re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text).strip()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paragraphs_are_short(path: Path) -> None:
    long = [
        f"line {number}, {len(text)} characters: {text[:60]}…"
        for number, text in paragraphs(path.read_text(encoding="utf-8"))
        if len(text) > LONGEST
    ]
    assert not long, f"{path.name}, paragraphs of more than {LONGEST} characters:\n" + "\n".join(long)


def test_design_is_read_in_ten_minutes() -> None:
    words = len((ROOT / "DESIGN.md").read_text(encoding="utf-8").split())
    assert words <= DESIGN_WORDS, f"DESIGN.md has {words} words, at most {DESIGN_WORDS}: what is more belongs to docs/"


LONG = "word " * 121


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        (LONG, [604]),
        (f"{LONG}\n{LONG}", [1209]),
        (f"{LONG}\n\n{LONG}", [604, 604]),
        (f"# A heading\n{LONG}\n## Another", [604]),
        (f"- {LONG}\n- one\n  that goes on\n\n1. {LONG}", [604, 16, 604]),
        (f"| a | {LONG} |", [1, 604]),
        (f"```python\n{LONG}\n```\nafter", [5]),
        (f"    {LONG}", []),
        (f"- item\n\n    {LONG}", [4, 604]),
        (f"<!-- {LONG} -->\nseen", [4]),
        (f"[seen](https://example.org/{'x' * 700}) ![too](y.svg)", [8]),
    ],
)
def test_what_a_paragraph_is(text: str, lengths: list[int]) -> None:
    assert [len(paragraph) for _, paragraph in paragraphs(text)] == lengths
