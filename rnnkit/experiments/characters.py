"""Training latent models on the characters of a text, several side by side on the same batches, so that what they cost
and what they learn can be compared.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..sequence import LatentAutoregressiveModel, windows

WINDOW, ROWS = 64, 32
RATE = 5e-3
RECENT = 50  # steps over which the loss that is shown is a mean
LENGTH = 500  # of the windows in which a held-out text is judged


class Learned(NamedTuple):
    """How it went."""

    loss: float
    """Over the last RECENT steps, nats a character."""
    ms: float
    """Median time of a training step."""


def learn(
    models: Sequence[LatentAutoregressiveModel],
    train: Tensor,
    updates: int,
    seed: int,
    shown: Callable[[int, float], None],
) -> list[Learned]:
    """`updates` steps of each model, in turns, on random windows of `train` [N].

    shown: is told the steps so far and the first model's loss.
    """
    g = torch.Generator().manual_seed(seed)
    optimizers = [torch.optim.Adam(model.parameters(), lr=RATE) for model in models]
    within = torch.arange(WINDOW)
    losses: list[list[float]] = [[] for _ in models]
    times: list[list[float]] = [[] for _ in models]
    for k in range(1, updates + 1):
        x = train[torch.randint(len(train) - WINDOW, (ROWS, 1), generator=g) + within].long()
        for n, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = -model.log_prob(x).mean() / WINDOW
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            times[n].append(time.perf_counter() - start)
            losses[n].append(float(loss.detach()))
        shown(k, statistics.fmean(losses[0][-RECENT:]))
    return [
        Learned(statistics.fmean(loss[-RECENT:]), 1000 * statistics.median(ms))
        for loss, ms in zip(losses, times, strict=True)
    ]


def bits_of(model: LatentAutoregressiveModel, text: Tensor) -> float:
    """Bits a character of a held-out text."""
    x = windows(text.long(), LENGTH)
    with torch.no_grad():
        return -float(model.log_prob(x).sum()) / x.numel() / math.log(2)
