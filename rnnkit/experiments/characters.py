"""Training a latent model on the characters of a text, for the experiments that compare cells."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..sequence import LatentAutoregressiveModel, windows

WINDOW, ROWS = 64, 32
RATE = 5e-3
PARTS = 10  # times that progress is shown


class Learned(NamedTuple):
    """How it went."""

    loss: float
    """Of the last tenth, nats a character."""
    ms: float
    """Median time of a step of training."""


def learn(
    model: LatentAutoregressiveModel, train: Tensor, updates: int, seed: int, shown: Callable[[int, float], None]
) -> Learned:
    """`updates` steps on random windows of `train` [N]. shown(updates so far, loss) is called now and then."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    within = torch.arange(WINDOW)
    losses: list[float] = []
    times: list[float] = []
    for k in range(1, updates + 1):
        x = train[torch.randint(len(train) - WINDOW, (ROWS, 1), generator=g) + within].long()
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = -model.log_prob(x).mean() / WINDOW
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        times.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
        if k % max(1, updates // PARTS) == 0 or k == updates:
            last = losses[-max(1, updates // PARTS) :]
            shown(k, sum(last) / len(last))
    return Learned(sum(last) / len(last), 1000 * sorted(times)[len(times) // 2])


def bits_of(model: LatentAutoregressiveModel, text: Tensor, length: int = 500) -> float:
    """Bits a character of a held-out text, in windows of `length`."""
    x = windows(text.long(), length)
    with torch.no_grad():
        return -float(model.log_prob(x).sum()) / x.numel() / math.log(2)
