"""`fit`: a small training loop with a progress bar, early stopping, gradient clipping and checkpoints that resume bit
for bit. Nothing in it that a loop of one's own could not replace: it maximises `model.log_prob` over batches.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from ..cli.progress import Progress
from . import checkpoint as checkpoints
from .base import SequenceModel, positive


class Fit(NamedTuple):
    """How a training went. Losses are the negative log-likelihood of one observation, in nats."""

    losses: list[float]
    """Of each epoch, over its batches."""
    held_out: list[float]
    """After each epoch, on the held-out series; empty without."""
    best: int
    """The epoch, counted from 0, whose parameters the model has now. The last, or the best on the held-out series."""
    stopped: bool
    """Whether `patience` ended it."""


def fit(
    model: SequenceModel,
    x: Tensor,
    lengths: Tensor | None = None,
    *,
    epochs: int = 100,
    batch_size: int = 32,
    learning_rate: float = 1e-2,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    clip: float | None = 1.0,
    held_out: Tensor | tuple[Tensor, Tensor] | None = None,
    patience: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Fit:
    """Train `model` on series, in place. Each module ends in the mode, training or not, that it had before.

    Args:
        x, lengths: as for `model.log_prob`; B series. `windows` cuts a long one.
        epochs: passes over all series.
        batch_size: series in a step, in an order drawn from `seed` in each epoch.
        learning_rate: of Adam.
        optimizer: takes the parameters, instead of Adam.
        clip: the largest norm of the gradient of all parameters; None: any.
        held_out: series, or (series, lengths), that are measured after each epoch: the model ends with the parameters
            that were best on them.
        patience: epochs without a better held-out loss after which training ends; needs held_out.
        checkpoint: a file, written after each epoch.
        resume: go on from the checkpoint where it exists; the result is, bit for bit, what a training without the
            break gives. Everything but epochs and patience must be as it was; where neither leaves anything to do, the
            training is given back as it is. Parameters on another device resume there.
        seed: of the order in which series are drawn.
        progress: a bar on standard error.

    Returns:
        the losses and how it ended.

    Raises:
        ValueError: bad numbers, series that `log_prob` refuses, a checkpoint of another training (says what differs),
            a file that is no checkpoint.
        OSError: a checkpoint that cannot be written, before anything is trained.
        FloatingPointError: a loss that is not finite; the model keeps the parameters from before that step.
    """
    if not isinstance(model, SequenceModel):
        raise TypeError(f"model must be one of rnnkit.sequence's, got {type(model).__name__}")
    if patience is not None and held_out is None:
        raise ValueError("patience needs held_out series: without them there is nothing to wait for")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0, or None, got {clip!r}")
    if resume and checkpoint is None:
        raise ValueError("resume=True needs checkpoint=FILE, from which to go on")
    positive("epochs", epochs)
    positive("batch_size", batch_size)
    if patience is not None:
        positive("patience", patience)
    data = _data(model, x, lengths)
    held = None if held_out is None else _data(model, *_pair(held_out))
    made = Adam(model.parameters(), lr=learning_rate) if optimizer is None else optimizer(model.parameters())
    file = None if checkpoint is None else Path(checkpoint)
    if file is not None:
        checkpoints.expect_writable(file)
    run = _Training(model, data, held, made, batch_size, clip, seed, file)
    if resume and file is not None and file.exists():
        run.resume(file)
    shown = Progress("fit", epochs, sys.stderr, "epoch") if progress else None
    return run.run(epochs, patience, shown)


def windows(series: Tensor, length: int, stride: int | None = None) -> Tensor:
    """A series [T] or [T, D] as windows [B, length] or [B, length, D], each `stride` (by default `length`) further on;
    what is left at the end has no window.

    Raises:
        ValueError: a series shorter than one window; says how many points are needed.
        TypeError: not a Tensor.
    """
    if not isinstance(series, Tensor):
        raise TypeError(f"series must be a Tensor, got {type(series).__name__}; torch.tensor(series) makes it one")
    positive("length", length)
    stride = length if stride is None else positive("stride", stride)
    if series.dim() not in (1, 2):
        raise ValueError(f"series must be [T] or [T, D], got {list(series.shape)}")
    if series.shape[0] < length:
        raise ValueError(f"a window of {length} needs at least {length} points, the series has {series.shape[0]}")
    cut = series.unfold(0, length, stride)
    return cut if series.dim() == 1 else cut.transpose(1, 2)


class _Data(NamedTuple):
    """Series as `log_prob` takes them."""

    x: Tensor
    lengths: Tensor | None

    def observations(self) -> int:
        return self.x.shape[0] * self.x.shape[1] if self.lengths is None else int(self.lengths.sum())

    def rows(self, chosen: Tensor) -> _Data:
        return _Data(self.x[chosen], None if self.lengths is None else self.lengths[chosen])


def _data(model: SequenceModel, x: Tensor, lengths: Tensor | None) -> _Data:
    """Checked, and with something in it."""
    data = _Data(*model._given(x, lengths))
    if data.x.shape[0] == 0:
        raise ValueError("x has no rows: there is nothing to learn from")
    if data.observations() == 0:
        raise ValueError("every length is 0: there is nothing to learn from")
    return data


def _pair(held_out: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    if not isinstance(held_out, tuple):
        return held_out, None
    if len(held_out) != 2:
        raise ValueError(f"held_out must be series, or (series, lengths), got a tuple of {len(held_out)}")
    return held_out


class _Training:
    """What changes while a model is trained, all of which a checkpoint holds."""

    def __init__(
        self,
        model: SequenceModel,
        data: _Data,
        held: _Data | None,
        optimizer: Optimizer,
        batch: int,
        clip: float | None,
        seed: int,
        file: Path | None,
    ) -> None:
        self.model, self.data, self.held, self.optimizer = model, data, held, optimizer
        self.batch, self.clip, self.file = batch, clip, file
        self.order = torch.Generator().manual_seed(seed)
        self.facts = {} if file is None else self._facts(seed)
        self.losses: list[float] = []
        self.measured: list[float] = []
        self.best = -1
        self.kept: dict[str, Tensor] | None = None

    def run(self, epochs: int, patience: int | None, shown: Progress | None) -> Fit:
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            while len(self.losses) < epochs and not self.stopped(patience):
                self.losses.append(self.epoch())
                if self.held is not None:
                    self.measured.append(self.measure(self.held))
                    if self.best < 0 or self.measured[-1] < self.measured[self.best]:
                        self.best = len(self.losses) - 1
                        self.kept = {name: v.detach().clone() for name, v in self.model.state_dict().items()}
                if self.file is not None:
                    self.save(self.file)
                if shown is not None:
                    held = f"  held out {self.measured[-1]:.4f}" if self.measured else ""
                    shown.show(len(self.losses), f"loss {self.losses[-1]:.4f}{held}")
        finally:
            if shown is not None:
                shown.close()
            for module, mode in modes:
                module.training = mode
            if self.kept is not None:
                self.model.load_state_dict(self.kept)
        best = self.best if self.held else len(self.losses) - 1
        return Fit(self.losses, self.measured, best, self.stopped(patience))

    def stopped(self, patience: int | None) -> bool:
        """Whether the last epoch was one too many; asked before each, so that a resumed training stops where it did."""
        return patience is not None and bool(self.losses) and len(self.losses) - 1 - self.best >= patience

    def epoch(self) -> float:
        self.model.train()
        total, count = 0.0, 0
        for chosen in torch.randperm(self.data.x.shape[0], generator=self.order).split(self.batch):
            part = self.data.rows(chosen.to(self.data.x.device))
            seen = part.observations()
            if seen == 0:
                continue
            self.optimizer.zero_grad()
            loss = -self.model.log_prob(*part).sum()
            if not bool(loss.isfinite()):
                raise FloatingPointError(
                    f"the loss is {float(loss.detach())} in epoch {len(self.losses)}: a smaller learning rate, or "
                    "standardised data, may help"
                )
            (loss / seen).backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            total, count = total + float(loss.detach()), count + seen
        return total / count

    def measure(self, data: _Data) -> float:
        self.model.eval()
        with torch.no_grad():
            return -float(self.model.log_prob(*data).sum()) / data.observations()

    def save(self, file: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "kept": self.kept,
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "random": torch.get_rng_state(),  # of dropout
            "losses": self.losses,
            "held_out": self.measured,
            "best": self.best,
        }
        checkpoints.save(file, self.facts, state)

    def resume(self, file: Path) -> None:
        found = checkpoints.load(file, self.facts, self.data.x.device)
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.order.set_state(found["order"].cpu())
        torch.set_rng_state(found["random"].cpu())
        self.losses, self.measured, self.best, self.kept = (found[k] for k in ("losses", "held_out", "best", "kept"))

    def _facts(self, seed: int) -> dict[str, str]:
        """What a training is. Not epochs and patience: one may go on for longer."""
        return {
            "x": checkpoints.series(*self.data),
            "held_out": "none" if self.held is None else checkpoints.series(*self.held),
            "batch_size": str(self.batch),
            "seed": str(seed),
            "clip": str(None if self.clip is None else float(self.clip)),
            **checkpoints.algorithm(self.optimizer),
            **checkpoints.parameters(self.model),
        }
