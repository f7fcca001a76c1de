"""One accuracy check before timing: an implementation's numbers against float64, within twice torch's error.

No row is timed whose numbers are off. For an implementation of rnnkit (or a module that somebody brings) that is a
failure; a peer is held to a wide band, only to make sure that it does the same work.
"""

from __future__ import annotations

import torch

from .bench_cases import CUSTOM, BenchJob
from .implementations import Implementation, Setup

BAND_ULPS = 4
"""The band, in units in the last place of the tensor's largest value: one rounding of the result, one of what it
was computed from (the layer below, or the saved state), each in our result and in torch's. It matters where torch's
error happens to be near zero, as in tensors of a few elements."""
BAND = 2e-6  # of float32, whose sums over many rows and steps are rounded more often; relative to the largest element
NEAR = (-2, -1, 1, 2)
"""Roundings by which the input of a custom cell's loop is moved: some cells amplify a rounding a hundredfold at some
steps, and by which of them the loop happens to be hit says little. The largest error sets the budget."""
PEER = 1e-3  # the same work, whatever a peer's own approximations: TF32 among them
PEER_ULPS = 16  # where the dtype is coarser than that


class AccuracyCheck:
    """The truth of a job, and by how much each of its numbers may be off.

    The budget is twice torch's error, or twice the reference's where torch cannot run the job in its dtype here.
    """

    def __init__(self, job: BenchJob, made: Setup) -> None:
        self.job, self.x = job, made.x
        self.truth = made.baseline.double().numbers(made.x.double(), job.train)
        own = made.baseline_numbers(job.train)
        size = [max(1.0, truth.abs().max().item()) for truth in self.truth]
        errors = [error(v, truth) for v, truth in zip(own, self.truth, strict=True)]
        for k in NEAR if job.case.group in CUSTOM else ():
            moved = made.baseline.numbers(made.x * (1 + k * torch.finfo(made.x.dtype).eps / 2), job.train)
            errors = [max(off, error(v, truth)) for off, v, truth in zip(errors, moved, self.truth, strict=True)]
        ulp = torch.finfo(made.x.dtype).eps
        narrow, peer = max(BAND, BAND_ULPS * ulp), max(PEER, PEER_ULPS * ulp)
        self.allowed = [2 * off + narrow * largest for off, largest in zip(errors, size, strict=True)]
        self.wide = [peer * largest for largest in size]

    def error_ratio(self, implementation: Implementation, peer: bool = False) -> float:
        """The largest error over what is allowed: at most 1 where it is right; inf where there is NaN."""
        found = [torch.as_tensor(v, device=self.x.device) for v in implementation.numbers(self.x, self.job.train)]
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
