"""The text that the demo learns, as numbers: read, checked, split into training and held-out part, cut into batches.

By default the text is Python's own standard library: real, on every machine, and nothing has to be downloaded.
"""

from __future__ import annotations

import collections
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BATCH = 32  # windows in a step, over all processes
WINDOW = 64  # characters that a window predicts
HELD_OUT = 200_000  # characters at the end of the text that are kept for the test: a tenth of it, at most these
SHORTEST = (BATCH * WINDOW + 1) * 10 // 9 + 1  # characters: one batch without overlap, and a tenth held out
LETTERS = 127  # that the vocabulary knows; every other one is OTHER
OTHER = "\ufffd"

# In Python 3.10 to 3.14; what a version lacks is left out. About 2 million characters.
MODULES = """
    argparse ast bdb calendar cmd codecs collections/__init__ configparser contextlib copy csv dataclasses
    difflib dis email/message enum filecmp fractions functools gettext heapq inspect json/decoder json/encoder
    logging/__init__ pickle plistlib random selectors shutil socket statistics subprocess tempfile textwrap
    threading tokenize traceback typing unittest/case uuid weakref
""".split()  # noqa: SIM905


class InputError(ValueError):
    """What the user asked for cannot be done; the message is one line for them."""


@dataclass(frozen=True)
class Corpus:
    """A text as numbers. train [N] and held_out [M] are uint8 indices into `letters`, whose first is OTHER."""

    source: str
    sha256: str
    letters: str
    train: Tensor
    held_out: Tensor

    def to(self, device: torch.device) -> Corpus:
        """The same on a device."""
        train, held_out = self.train.to(device), self.held_out.to(device)
        return Corpus(self.source, self.sha256, self.letters, train, held_out)

    def batches(self, steps: int, seed: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random windows: input and, one character later, target, each [B, WINDOW] int64.

        Every process draws the whole batch from the same seed and takes its rows, so that `world` processes learn
        what one does. B is BATCH over all of them, rounded up where `world` does not divide it.
        """
        generator = torch.Generator().manual_seed(seed)
        rows = -(-BATCH // world) * world
        within = torch.arange(WINDOW + 1)
        for _ in range(steps):
            starts = torch.randint(len(self.train) - WINDOW, (rows, 1), generator=generator)[rank::world]
            windows = self.train[(starts + within).to(self.train.device)].long()
            yield windows[:, :-1], windows[:, 1:]


def load(path: Path | None) -> Corpus:
    """The corpus of a file, or of the standard library. Raises InputError where there is no text to learn."""
    source, text = _standard_library() if path is None else (str(path), _read(path))
    if len(text) < SHORTEST:
        hint = "" if path is not None else "; name another text with --text FILE"
        raise InputError(f"{source} is too short: at least {SHORTEST} characters are needed, got {len(text)}{hint}")
    kept = min(len(text) // 10, HELD_OUT)
    common = collections.Counter(text[:-kept])
    letters = OTHER + "".join(sorted(sorted(common.keys() - {OTHER}, key=lambda c: (-common[c], c))[:LETTERS]))
    indices = encode(text, letters)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(source, digest, letters, indices[:-kept], indices[-kept:])


def encode(text: str, letters: str) -> Tensor:
    """The place of each character in `letters`, 0 where it has none: [N] uint8."""
    places = collections.defaultdict(int, {ord(letter): place for place, letter in enumerate(letters)})
    return torch.frombuffer(bytearray(text.translate(places), "latin-1"), dtype=torch.uint8)


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not raw:
        raise InputError(f"{path} is empty")
    if b"\0" in raw:
        raise InputError(f"{path} is not a text: there is a NUL at byte {raw.index(0)}")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text in UTF-8: {error.reason} at byte {error.start}") from None


def _standard_library() -> tuple[str, str]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{module}.py" for module in MODULES]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    return f"the standard library of Python {sysconfig.get_python_version()}", text
