"""The Triton kernels in Triton's interpreter, on CPU tensors. Needs a process of its own with TRITON_INTERPRET=1, which
tests/triton/test_triton.py starts; in any other nothing is collected here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rnnkit.backends.triton import backend as triton

if not triton.interpreted():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(params=["persistent", "step"])
def regime(request: pytest.FixtureRequest) -> Iterator[str]:
    """The one regime of every scan: a size whose W_hh does not fit on chip would raise."""
    with triton.regimes.alone(request.param):
        yield request.param
