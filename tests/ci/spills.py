"""Which hot loops of a compiled engine keep on the stack what they sum.

    python tests/ci/spills.py FILE [--objdump COMMAND] [--functions EXPRESSION]

FILE is a library, a program or an object file for x86-64 or aarch64. A sum that does not fit the registers costs a
store and a load each time round, and nothing else tells of it: the results are the same. Hot is an innermost loop of
at least six multiply-adds in a function whose demangled name the expression finds. Exits 1 where one stores a vector
to the stack, and where there is no hot loop at all.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LEAST = 6
"""Multiply-adds of a loop that counts as hot: fewer sums fit every processor's registers."""
FUNCTIONS = r"\b(tile|tn_tile|tile_by_lanes|dots)\b"
"""The engine's products. Gate math may keep its constants in memory, and what fills a part of a vector passes by it."""


@dataclass(frozen=True)
class Instructions:
    """How objdump writes an architecture's instructions."""

    multiply_add: re.Pattern[str]
    branch: re.Pattern[str]
    """With the address it goes to."""
    to_stack: re.Pattern[str]
    """A store of a vector register."""


X86 = Instructions(
    # SSE has no fused ones: the products alone are counted
    multiply_add=re.compile(r"^(v?fn?m(add|sub)\d*|v?mul|vdpbf16|vpdp\w+)[ps][sd]?\b"),
    branch=re.compile(r"^j[a-z]+\s+(?:0x)?([0-9a-f]+)\b"),
    to_stack=re.compile(r"^v?mov\w+\s+%[xyz]mm\d+,-?(0x[0-9a-f]+)?\(%r[sb]p[,)]"),
)
AARCH64 = Instructions(
    multiply_add=re.compile(r"^(fml[as]|bfdot|bfmmla|bfmlal[bt])\b"),
    branch=re.compile(r"^(?:b\.\w+\s+|cbn?z\s+\w+,\s*|tbn?z\s+\w+,\s*#\d+,\s*)(?:0x)?([0-9a-f]+)\b"),
    to_stack=re.compile(r"^st[rp]\s+q\d+,.*\[(sp|x29)\b"),
)


@dataclass(frozen=True)
class Loop:
    """A hot loop: its function, and which of its instructions store to the stack."""

    function: str
    multiply_adds: int
    spills: tuple[str, ...]


def functions(listing: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Each function's name and its instructions with their addresses."""
    name, body = "", list[tuple[int, str]]()
    for line in listing.splitlines():
        if begin := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            yield name, body
            name, body = begin[1], []
        elif instruction := re.match(r"\s*([0-9a-f]+):\s+(\S.*)", line):
            body.append((int(instruction[1], 16), instruction[2]))
    yield name, body


def innermost(body: list[tuple[int, str]], branch: re.Pattern[str]) -> list[list[str]]:
    """The instructions of each loop, from where a branch goes back to, up to the branch, that has none within."""
    index = {address: k for k, (address, _) in enumerate(body)}
    spans = set()
    for last, (_, text) in enumerate(body):
        if (to := branch.match(text)) and (first := index.get(int(to[1], 16), last + 1)) <= last:
            spans.add((first, last))
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[text for _, text in body[first : last + 1]] for first, last in sorted(inner)]


def hot_loops(path: Path, objdump: str = "objdump", expression: str = FUNCTIONS) -> list[Loop]:
    """The hot loops of a compiled file."""
    command = [objdump, "--disassemble", "--demangle", "--no-show-raw-insn", str(path)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kind = AARCH64 if "aarch64" in listing.partition("Disassembly")[0] else X86
    found = []
    for name, body in functions(listing):
        if not re.search(expression, name):
            continue
        for loop in innermost(body, kind.branch):
            count = sum(bool(kind.multiply_add.match(text)) for text in loop)
            if count >= LEAST:
                found.append(Loop(name, count, tuple(text for text in loop if kind.to_stack.match(text))))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--objdump", default="objdump")
    parser.add_argument("--functions", default=FUNCTIONS, metavar="EXPRESSION")
    asked = parser.parse_args()
    loops = hot_loops(asked.file, asked.objdump, asked.functions)
    bad = [loop for loop in loops if loop.spills]
    for loop in bad:
        print(f"{loop.function}\n    {loop.multiply_adds} multiply-adds, {len(loop.spills)} stores: {loop.spills[0]}")
    print(f"{asked.file}: {len(loops)} hot loops, {len(bad)} with sums on the stack")
    return 1 if bad or not loops else 0


if __name__ == "__main__":
    sys.exit(main())
