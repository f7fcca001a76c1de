"""What a series is made of, and the distribution of one observation: real numbers (a Gaussian) or tokens (a
categorical distribution).

B series, T steps, D features, V tokens. A model gives `outputs` numbers for an observation; here they become a
distribution, or a sample of it. Nothing here has parameters.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal


class Observations(Protocol):
    """One kind of observation."""

    outputs: int
    """Numbers that make a distribution of one observation."""

    def check(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x and lengths [B] where they hold what they should; beyond a length x becomes 0."""

    def distribution(self, raw: Tensor) -> Distribution:
        """raw [..., outputs] -> distributions with batch shape [...]."""

    def sample(self, raw: Tensor, generator: torch.Generator | None) -> Tensor:
        """One draw of each, [...] and the shape of an observation."""


class Reals:
    """Real values: x [B, T] where `features` is None, else [B, T, features]. Mean and scale, no correlation."""

    def __init__(self, features: int | None) -> None:
        if features is not None and (type(features) is not int or features < 1):
            raise ValueError(f"features must be a positive number, or None for a series of scalars, got {features!r}")
        self.features = features
        self.width = features or 1
        self.outputs = 2 * self.width

    def check(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shape = "[B, T]" if self.features is None else f"[B, T, {self.features}]"
        _expect_tensor(x)
        if not x.is_floating_point():
            raise TypeError(f"x must be real numbers {shape}, got {x.dtype}; a model of tokens has vocabulary=V")
        if x.dim() != (2 if self.features is None else 3) or (
            self.features is not None and x.shape[2] != self.features
        ):
            raise ValueError(f"x must be {shape}, got {list(x.shape)}")
        lengths, valid = _lengths_and_mask(x, lengths)
        if valid is not None:
            x = x.masked_fill(~(valid if self.features is None else valid[..., None]), 0)
        wrong = ~x.isfinite()
        if bool(wrong.any()):
            row, step, *_ = wrong.nonzero()[0].tolist()
            found = int(wrong.sum())
            raise ValueError(f"x must be finite, got {float(x[wrong][0])} at row {row}, step {step} ({found} in all)")
        return x, lengths

    def vectors(self, x: Tensor) -> Tensor:
        """[..., D] of what is [...] for scalars."""
        return x.unsqueeze(-1) if self.features is None else x

    def distribution(self, raw: Tensor) -> Distribution:
        mean, log_scale = raw.chunk(2, -1)
        if self.features is None:
            return Normal(mean.squeeze(-1), log_scale.squeeze(-1).exp())
        return Independent(Normal(mean, log_scale.exp()), 1)

    def mean(self, raw: Tensor) -> Tensor:
        mean = raw.chunk(2, -1)[0]
        return mean.squeeze(-1) if self.features is None else mean

    def sample(self, raw: Tensor, generator: torch.Generator | None) -> Tensor:
        mean, log_scale = raw.chunk(2, -1)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        drawn = mean + log_scale.exp() * noise
        return drawn.squeeze(-1) if self.features is None else drawn


class Tokens:
    """Whole numbers from 0 to vocabulary - 1: x [B, T]."""

    def __init__(self, vocabulary: int) -> None:
        if type(vocabulary) is not int or vocabulary < 1:
            raise ValueError(f"vocabulary must be a positive number of tokens, got {vocabulary!r}")
        self.vocabulary = self.outputs = vocabulary

    def check(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        _expect_tensor(x)
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"x must be whole numbers [B, T], got {x.dtype}; a model of reals has no vocabulary")
        if x.dim() != 2:
            raise ValueError(f"x must be [B, T], got {list(x.shape)}")
        lengths, valid = _lengths_and_mask(x, lengths)
        x = x.long()
        if valid is not None:
            x = x.masked_fill(~valid, 0)
        wrong = (x < 0) | (x >= self.vocabulary)
        if bool(wrong.any()):
            row, step = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"tokens must lie between 0 and {self.vocabulary - 1}, got {int(x[row, step])} at row {row}, step "
                f"{step} ({int(wrong.sum())} in all)"
            )
        return x, lengths

    def distribution(self, raw: Tensor) -> Distribution:
        return Categorical(logits=raw)

    def sample(self, raw: Tensor, generator: torch.Generator | None) -> Tensor:
        flat = raw.reshape(-1, self.vocabulary).softmax(-1)
        return torch.multinomial(flat, 1, generator=generator).view(raw.shape[:-1])


def kind(features: int | None, vocabulary: int | None) -> Reals | Tokens:
    """Tokens where a vocabulary is given."""
    if vocabulary is None:
        return Reals(features)
    if features is not None:
        raise ValueError(f"give features or vocabulary, not both: got features={features!r}, vocabulary={vocabulary!r}")
    return Tokens(vocabulary)


def _expect_tensor(x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")


def valid_mask(steps: int, lengths: Tensor) -> Tensor:
    """[B, T] bool: which steps a row has."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


def _lengths_and_mask(x: Tensor, lengths: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Lengths on x's device, and which steps they leave."""
    if lengths is None:
        return None, None
    rows, steps = x.shape[:2]
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.shape != (rows,):
        got = f"{lengths.dtype} {list(lengths.shape)}" if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ValueError(f"lengths must be whole numbers [B] = [{rows}], got {got}")
    lengths = lengths.to(x.device, torch.int64)
    if bool(((lengths < 0) | (lengths > steps)).any()):
        raise ValueError(f"lengths must lie between 0 and T = {steps}, got {lengths.tolist()}")
    return lengths, valid_mask(steps, lengths)
