"""Backend `cuda` on CPU tensors, its kernels executed from their sources. Needs make and a C++ compiler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from simt import run as simt

from rnnkit.backends.cuda import backend as cuda


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """float32 is float32 unless a problem asks for TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with cuda.simulation(simt.run):
        yield
    torch.backends.cudnn.allow_tf32 = before
