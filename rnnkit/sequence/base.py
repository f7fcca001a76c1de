"""What the four sequence models share: p(x_1 … x_T) = Π_t p(x_t | what the model conditions on).

A model says how x becomes the numbers of each conditional at once (`conditionals`), and the same step by step
(`begin`, `following`, `advance`); from that follow `forward`, `log_prob`, `generate` and `forecast`. B series, T
steps, D features; what x_t looks like, observations.py says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .observations import Reals, Tokens, valid_mask


class Cost(NamedTuple):
    """What one conditional p(x_t | ·) takes."""

    parameters: int
    multiply_adds: int


class Forecast(NamedTuple):
    """Mean and band of the steps to come, each [B, steps], or [B, steps, D] for vectors."""

    mean: Tensor
    low: Tensor
    high: Tensor


class SequenceModel(nn.Module, ABC):
    """A model of series, one after another independent of each other. Abstract."""

    def __init__(self, observations: Reals | Tokens) -> None:
        super().__init__()
        self.observations = observations

    @abstractmethod
    def conditionals(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, T, outputs]: the numbers of p(x_t | x before t) for every t. x holds 0 beyond a length."""

    @abstractmethod
    def begin(self, x: Tensor, lengths: Tensor | None) -> Any:
        """What the model knows after x, row b after its first lengths[b] steps; T may be 0."""

    @abstractmethod
    def following(self, state: Any) -> Tensor:
        """[B, outputs]: the numbers of the next observation's distribution."""

    @abstractmethod
    def advance(self, state: Any, x_t: Tensor) -> Any:
        """What it knows after one more observation, [B] or [B, D]."""

    @abstractmethod
    def repeated(self, state: Any, times: int) -> Any:
        """The same for each row `times` times, side by side."""

    @abstractmethod
    def cost(self, t: int) -> Cost:
        """What p(x_t | ·) takes, t counted from 1."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Distribution:
        """The distribution of every observation given those before it.

        Args:
            x: [B, T] scalars or tokens, [B, T, D] vectors.
            lengths: [B] whole numbers in [0, T]; what lies beyond is not looked at.

        Returns:
            a torch.distributions object with batch shape [B, T]; beyond a length it means nothing.

        Raises:
            ValueError: sizes, NaN or inf (says where), tokens outside the vocabulary.
            TypeError: dtypes.
        """
        x, lengths = self._given(x, lengths)
        return self.observations.distribution(self.conditionals(x, lengths))

    def log_prob(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """[B]: the logarithm of the joint density of a row, the sum over its steps. Arguments as for `forward`."""
        x, lengths = self._given(x, lengths)
        every = self.observations.distribution(self.conditionals(x, lengths)).log_prob(x)
        if lengths is not None:
            every = every.masked_fill(~valid_mask(x.shape[1], lengths), 0)
        return every.sum(1)

    @torch.no_grad()
    def generate(
        self, x: Tensor, steps: int, *, lengths: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw what follows x, each observation given those before it, drawn ones included.

        Args:
            x: as for `forward`; T may be 0: then series are drawn from their beginning.
            steps: how many observations to draw, 0 or more.
            lengths: [B]: row b goes on after its first lengths[b] steps.
            generator: of the random numbers, on x's device; torch's own where None.

        Returns:
            [B, steps] or [B, steps, D], of the model's dtype, or int64 for tokens; B and steps may be 0.
        """
        state = self.begin(*self._given(x, lengths, empty=True))
        drawn, _ = self._drawn(state, x, _steps(steps), generator)
        return drawn

    @torch.no_grad()
    def forecast(
        self,
        x: Tensor,
        steps: int,
        *,
        level: float = 0.9,
        samples: int = 500,
        lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Forecast:
        """Mean and band of the next `steps` observations, from `samples` drawn continuations.

        The mean is that of the conditional means along the draws, which varies less than that of the draws; the band
        holds the share `level` of the draws, half of the rest on either side. Arguments as for `generate`.

        Raises:
            TypeError: a model of tokens, whose numbers have no mean.
        """
        if not isinstance(self.observations, Reals):
            raise TypeError("tokens have no mean: forecast is for real values, generate draws tokens")
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {level!r}")
        if type(samples) is not int or samples < 1:
            raise ValueError(f"samples must be a positive number, got {samples!r}")
        x, lengths = self._given(x, lengths, empty=True)
        state = self.repeated(self.begin(x, lengths), samples)
        drawn, means = self._drawn(state, x, _steps(steps), generator)
        if drawn.numel() == 0:
            return Forecast(*(self._nothing(x, steps) for _ in range(3)))
        drawn, means = (v.view(x.shape[0], samples, *v.shape[1:]) for v in (drawn, means))
        below = (1 - level) / 2
        low, high = drawn.quantile(torch.tensor([below, 1 - below], dtype=drawn.dtype, device=drawn.device), dim=1)
        return Forecast(means.mean(1), low, high)

    def _drawn(self, state: Any, like: Tensor, steps: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draws, and for reals the means they were drawn around."""
        drawn, means = [], []
        for _ in range(steps):
            raw = self.following(state)
            drawn.append(self.observations.sample(raw, generator))
            if isinstance(self.observations, Reals):
                means.append(self.observations.mean(raw))
            state = self.advance(state, drawn[-1])
        if not drawn:
            return self._nothing(like, 0), self._nothing(like, 0)
        return torch.stack(drawn, 1), torch.stack(means or drawn, 1)

    def _nothing(self, like: Tensor, steps: int) -> Tensor:
        """[B, steps] or [B, steps, D] where B or steps is 0, of the dtype that draws have."""
        dtype = next(self.parameters()).dtype if isinstance(self.observations, Reals) else torch.int64
        return like.new_empty((like.shape[0], steps, *like.shape[2:]), dtype=dtype)

    def _given(self, x: Tensor, lengths: Tensor | None, *, empty: bool = False) -> tuple[Tensor, Tensor | None]:
        x, lengths = self.observations.check(x, lengths)
        if x.shape[1] == 0 and not empty:
            raise ValueError("x has no steps: a series needs at least 1 point")
        return x, lengths


def _steps(steps: int) -> int:
    if type(steps) is not int or steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps!r}")
    return steps


def positive(name: str, value: int) -> int:
    """`value` where it is a number of things, 1 or more."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value!r}")
    return value
