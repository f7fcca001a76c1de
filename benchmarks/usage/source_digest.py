"""What decides the figures of a compiled kernel, as a digest: its sources, and the flags that compile them.

A record of such figures bears it, so that a kernel that was edited since does not pass for the one that was compiled.
Comments and how lines are broken decide nothing, outside of directives.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

PIECES = re.compile(r'#(?:\\\n|[^\n])*|"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/|\s+|\w+|.', re.DOTALL)
"""Of a text in C++: directives, literals, comments, white space, words, and the other signs one by one."""
INCLUDED = re.compile(r'^#include "(.+)"$', re.MULTILINE)
JOINING = set("+-*/%&|^!=<>:.")
"""Signs that are another one together."""


def pieces(text: str) -> Iterator[str]:
    """What counts. A directive keeps its line; elsewhere white space is a blank where two pieces would else be one."""
    before, apart = "\n", False
    for piece in PIECES.findall(text):
        if piece.isspace() or piece.startswith(("//", "/*")):
            apart = True
            continue
        if piece.startswith("#"):
            piece = "\n" + " ".join(piece.replace("\\\n", " ").split()) + "\n"
        first, last = piece[0], before[-1]
        if apart and ((is_word(last) and is_word(first)) or {last, first} <= JOINING):
            yield " "
        yield piece
        before, apart = piece, False


def is_word(sign: str) -> bool:
    """Whether it may stand in a name or a number."""
    return sign == "_" or sign.isalnum()


@functools.cache
def file(path: Path) -> tuple[str, str]:
    """The text of a file, and what of it counts."""
    text = path.read_text(encoding="utf-8")
    return text, "".join(pieces(text))


def included(text: str, folder: Path) -> dict[Path, str]:
    """The files that a text in a folder includes by quoted names, and those that they do, each with what of it counts.
    A file that is not there belongs to another way to compile the text.
    """
    found: dict[Path, str] = {}
    waiting = [(text, folder)]
    while waiting:
        text, here = waiting.pop()
        for name in INCLUDED.findall(text):
            path = (here / name).resolve()
            if path not in found and path.is_file():
                inner, found[path] = file(path)
                waiting.append((inner, path.parent))
    return found


def digest(text: str, folder: Path, flags: Iterable[str]) -> str:
    """Of a source in a folder, all that it includes, and how it is compiled."""
    files = included(text, folder)
    parts = ["".join(pieces(text)), *flags, *(files[path] for path in sorted(files))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
