"""The gate before the clock: a side's numbers against float64, within twice the error of torch in float32.

No row is timed whose numbers are off. What an implementation of rnnkit (or a module that somebody brings) misses is
a failure; a peer is held to a wide band, only to make sure that it does the same work.
"""

from __future__ import annotations

import torch

from .cases import Job
from .sides import Setup, Side

BAND = 2e-6  # a few float32 roundings, relative to the largest element
PEER = 1e-3  # the same work, whatever a peer's own approximations


class Gate:
    """The truth of a job, and by how much each of its numbers may be off."""

    def __init__(self, job: Job, made: Setup) -> None:
        self.job, self.x = job, made.x
        self.truth = made.yardstick.double().numbers(made.x.double(), job.train)
        own = made.yardstick.numbers(made.x, job.train)
        size = [max(1.0, truth.abs().max().item()) for truth in self.truth]
        errors = [_error(v, truth) for v, truth in zip(own, self.truth, strict=True)]
        self.allowed = [2 * error + BAND * largest for error, largest in zip(errors, size, strict=True)]
        self.wide = [PEER * largest for largest in size]

    def excess(self, side: Side, peer: bool = False) -> float:
        """The largest error over what is allowed: at most 1 where the side is right; inf where there is NaN."""
        found = [torch.as_tensor(v, device=self.x.device) for v in side.numbers(self.x, self.job.train)]
        allowed = self.wide if peer else self.allowed
        worst = 0.0
        for v, truth, most in zip(found, self.truth, allowed, strict=True):
            over = _error(v, truth) / most if v.shape == truth.shape else float("inf")
            worst = max(worst, over if over == over else float("inf"))
        return worst


def _error(v: torch.Tensor, truth: torch.Tensor) -> float:
    return (v.double() - truth).abs().max().item()
