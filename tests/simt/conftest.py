"""What holds for the CUDA kernels on a CPU: float32 is float32 unless a problem asks for TF32, as torch's own default
does, which no budget for float32 allows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    switch = torch.backends.cudnn
    before = switch.allow_tf32
    switch.allow_tf32 = False
    yield
    switch.allow_tf32 = before
