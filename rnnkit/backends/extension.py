"""The C++ extension: found, loaded and made known to torch's tracing here, and nowhere else.

Importing this never fails. Where the library is missing or does not load, `available()` is False and
`reason()` says why and what to do.
"""

from __future__ import annotations

from pathlib import Path

import torch

_HOW = "`pip install -v --no-build-isolation -e .` in a source tree builds it, or says what is missing"


def _load(folder: Path) -> str:
    """Load the library in `folder`. Returns why it is not available, empty where it is."""
    library = next(iter(sorted(folder.glob("_C*.so"))), None)
    if library is None:
        return f"the C++ extension is not built; {_HOW}"
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"the C++ extension {library.name} does not load ({error}); {_HOW}"
    return ""


_reason = _load(Path(__file__).parent.parent)


def available() -> bool:
    """Whether the extension's operators can be called."""
    return not _reason


def reason() -> str:
    """Why the extension is not available, and the way out; empty where it is."""
    return _reason
