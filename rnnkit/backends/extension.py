"""The C++ extension: found, loaded and made known to torch's tracing here, and nowhere else.

Importing this never fails. Where the library is missing or does not load, `available()` is False and
`reason()` says why and what to do.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

_HOW = "`pip install -v --no-build-isolation -e .` in a source tree builds it, or says what is missing"


def _rnn_scan_forward(
    gx: Tensor,
    w_hh: Tensor,
    h: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    h_r: Tensor | None,
    t0: int,
    relu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes of y [n, B, H] and h_n [B, H]."""
    return gx.new_empty(gx.shape), h.new_empty(h.shape)


def _rnn_scan_backward(
    gy: Tensor,
    gh_n: Tensor,
    y: Tensor,
    w_hh: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    relu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of dg [T, B, H], dh_0 and dh_r [B, H]."""
    return y.new_empty(y.shape), gh_n.new_empty(gh_n.shape), gh_n.new_empty(gh_n.shape)


def _load(folder: Path) -> str:
    """Load the library in `folder`. Returns why it is not available, empty where it is."""
    library = next(iter(sorted(folder.glob("_C*.so"))), None)
    if library is None:
        return f"the C++ extension is not built; {_HOW}"
    try:
        torch.ops.load_library(str(library))
        torch.library.register_fake("rnnkit::rnn_scan_forward", _rnn_scan_forward)
        torch.library.register_fake("rnnkit::rnn_scan_backward", _rnn_scan_backward)
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
