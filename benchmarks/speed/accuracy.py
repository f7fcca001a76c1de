"""The gate before the clock: a side's numbers against float64, within twice the error of torch in the same dtype.

No row is timed whose numbers are off. What an implementation of rnnkit (or a module that somebody brings) misses is
a failure; a peer is held to a wide band, only to make sure that it does the same work.
"""

from __future__ import annotations

import torch

from .bench_cases import Job
from .implementations import Setup, Side

BAND_ULPS = 4
"""The band, in units in the last place of the tensor's largest value: one rounding of the result, one of what it
was computed from (the layer below, or the saved state), each on our side and on torch's. It matters where torch's
error happens to be near zero, as in tensors of a few elements."""
BAND = 2e-6  # of float32, whose sums over many rows and steps are rounded more often; relative to the largest element
PEER = 1e-3  # the same work, whatever a peer's own approximations: TF32 among them
PEER_ULPS = 16  # where the dtype is coarser than that


class Gate:
    """The truth of a job, and by how much each of its numbers may be off."""

    def __init__(self, job: Job, made: Setup) -> None:
        self.job, self.x = job, made.x
        self.truth = made.yardstick.double().numbers(made.x.double(), job.train)
        own = made.yardstick.numbers(made.x, job.train)
        size = [max(1.0, truth.abs().max().item()) for truth in self.truth]
        errors = [error(v, truth) for v, truth in zip(own, self.truth, strict=True)]
        ulp = torch.finfo(made.x.dtype).eps
        narrow, peer = max(BAND, BAND_ULPS * ulp), max(PEER, PEER_ULPS * ulp)
        self.allowed = [2 * off + narrow * largest for off, largest in zip(errors, size, strict=True)]
        self.wide = [peer * largest for largest in size]

    def excess(self, side: Side, peer: bool = False) -> float:
        """The largest error over what is allowed: at most 1 where the side is right; inf where there is NaN."""
        found = [torch.as_tensor(v, device=self.x.device) for v in side.numbers(self.x, self.job.train)]
        allowed = self.wide if peer else self.allowed
        worst = 0.0
        for v, truth, most in zip(found, self.truth, allowed, strict=True):
            worst = max(worst, error(v, truth) / most)
        return worst


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest absolute difference; infinite where either is not finite or the shapes differ."""
    if value.shape != truth.shape:
        return float("inf")
    if not value.numel():
        return 0.0
    worst = (value.double() - truth.double()).abs().max().item()
    return worst if worst == worst else float("inf")


def band(truth: torch.Tensor, dtype: torch.dtype) -> float:
    """What rounding alone may cost a tensor in `dtype`."""
    scale = truth.double().abs().max().item() if truth.numel() else 0.0
    return BAND_ULPS * torch.finfo(dtype).eps * scale
