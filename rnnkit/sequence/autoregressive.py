"""Models that look at a fixed number of past observations: autoregressive of order τ, and Markov, which is order 1.

    reals     mean_t  = b + Σ_k A_k x_{t-k}        a scale of each feature, the same at every step
    tokens    logits_t = b + Σ_k table_k[x_{t-k}]

summed over k = 1 … τ. What lies before the start are τ learned values for reals, one more token for tokens. With
`hidden` units the sum goes through a tanh and a second product. Parameters and cost are those of τ, whatever t is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Cost, SequenceModel, positive
from .observations import Tokens, kind, valid_mask


class AutoregressiveModel(SequenceModel):
    """p(x_t | x_{t-order} … x_{t-1}); anything older is lost.

    No series is too short, not even one of fewer than τ points: what the start lacks is learned (`start` for reals, a
    row of the table for tokens). Only `windows` needs a least number of them.

    Args:
        order: τ, 1 or more.
        features: D of vectors [B, T, D]; None for scalars [B, T].
        vocabulary: V, for tokens [B, T].
        hidden: units of a tanh layer between; None: linear.

    The weights are `weight` [τ, D, F] or [τ, V + 1, F], the oldest observation first, F being `hidden` or what a
    distribution's mean or logits need; `bias` [F]; `start` [τ, D] and `log_scale` [D] for reals.
    """

    def __init__(
        self, order: int, *, features: int | None = None, vocabulary: int | None = None, hidden: int | None = None
    ) -> None:
        super().__init__(kind(features, vocabulary))
        self.order = positive("order", order)
        self.hidden = None if hidden is None else positive("hidden", hidden)
        if isinstance(self.observations, Tokens):
            inputs, means = self.observations.vocabulary + 1, self.observations.vocabulary
        else:
            inputs = means = self.observations.width
            self.start = nn.Parameter(torch.zeros(order, inputs))
            self.log_scale = nn.Parameter(torch.zeros(means))
        self.weight = nn.Parameter(torch.zeros(order, inputs, hidden or means))
        self.bias = nn.Parameter(torch.zeros(hidden or means))
        self.out = None if hidden is None else nn.Linear(hidden, means)
        if hidden is not None:  # zeros would give every unit the same gradient
            nn.init.normal_(
                self.weight, std=(order if isinstance(self.observations, Tokens) else order * inputs) ** -0.5
            )

    def extra_repr(self) -> str:
        return f"order={self.order}"

    def conditionals(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return self._raw(self._after_start(x).unfold(1, self.order, 1)[:, : x.shape[1]])

    def begin(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """The last τ observations, [B, D, τ] or [B, τ]."""
        padded = self._after_start(x)
        if lengths is None:
            windows = padded.unfold(1, self.order, 1)
            return windows[:, x.shape[1]]
        at = lengths[:, None] + torch.arange(self.order, device=x.device)
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        found = padded[rows, at]
        return found if isinstance(self.observations, Tokens) else found.transpose(1, 2)

    def following(self, state: Tensor) -> Tensor:
        return self._raw(state)

    def advance(self, state: Tensor, x_t: Tensor) -> Tensor:
        new = x_t if isinstance(self.observations, Tokens) else self.observations.vectors(x_t)
        return torch.cat([state[..., 1:], new[..., None]], -1)

    def repeated(self, state: Tensor, times: int) -> Tensor:
        return state.repeat_interleave(times, 0)

    def cost(self, t: int) -> Cost:
        positive("t", t)
        shared = sum(p.numel() for p in self.parameters())
        rows = 1 if isinstance(self.observations, Tokens) else self.weight.shape[1]  # of the table, or of A
        adds = self.order * rows * self.weight.shape[2]
        return Cost(shared, adds + (0 if self.out is None else self.out.weight.numel()))

    def _after_start(self, x: Tensor) -> Tensor:
        """[B, τ + T, D], or [B, τ + T] of tokens: what lies before the start, then x."""
        if isinstance(self.observations, Tokens):
            return F.pad(x, (self.order, 0), value=self.observations.vocabulary)
        start = self.start.expand(x.shape[0], -1, -1)
        return torch.cat([start, self.observations.vectors(x).to(start.dtype)], 1)

    def _raw(self, window: Tensor) -> Tensor:
        """window [..., D, τ] or [..., τ] -> [..., outputs]."""
        if isinstance(self.observations, Tokens):
            count = self.weight.shape[1]
            place = torch.arange(self.order, device=window.device) * count
            summed = F.embedding(window + place, self.weight.flatten(0, 1)).sum(-2)
        else:
            summed = torch.einsum("...dk,kdf->...f", window, self.weight)
        found = summed + self.bias
        if self.out is not None:
            found = self.out(torch.tanh(found))
        return found if isinstance(self.observations, Tokens) else with_scale(found, self.log_scale)


class MarkovModel(AutoregressiveModel):
    """p(x_t | x_{t-1}): exactly the autoregressive model of order 1. Arguments as there, without `order`.

    For tokens it is a table of transitions; `from_counts` fills it from data at once.
    """

    def __init__(
        self, *, features: int | None = None, vocabulary: int | None = None, hidden: int | None = None
    ) -> None:
        super().__init__(1, features=features, vocabulary=vocabulary, hidden=hidden)

    @classmethod
    def from_counts(
        cls, x: Tensor, vocabulary: int, *, lengths: Tensor | None = None, smoothing: float = 1.0
    ) -> MarkovModel:
        """The table of transition counts as a model, in closed form: no training.

            p(k | j) = (count of k after j + smoothing) / (count of anything after j + V smoothing)

        and likewise for the first token of a row. With smoothing 0 it is the maximum of the likelihood.

        Args:
            x: tokens [B, T].
            vocabulary: V, one more than the largest token.
            lengths: [B].
            smoothing: 0 or more, what is added to each count (Laplace: 1).
        """
        model = cls(vocabulary=vocabulary)
        if not smoothing >= 0:
            raise ValueError(f"smoothing must be 0 or more, got {smoothing!r}")
        x, lengths = model._given(x, lengths)
        before = model._after_start(x)[:, :-1]
        seen = torch.ones_like(x, dtype=torch.bool)
        if lengths is not None:
            seen = valid_mask(x.shape[1], lengths)
        pairs = (before * vocabulary + x)[seen]
        counts = torch.bincount(pairs, minlength=(vocabulary + 1) * vocabulary).view(vocabulary + 1, vocabulary)
        weight = counts.to(torch.get_default_dtype()) + smoothing
        weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, torch.ones_like(weight))  # never seen: any
        with torch.no_grad():
            model.weight.copy_((weight / weight.sum(1, keepdim=True)).log()[None].clamp_min(LEAST))
        return model.to(x.device)


LEAST = -1e4
"""The logarithm that stands for a probability of 0: a logit of -inf gives NaN beside another."""


def with_scale(mean: Tensor, log_scale: Tensor) -> Tensor:
    """[..., 2 D] of mean [..., D] and a scale that is the same everywhere."""
    return torch.cat([mean, log_scale.expand_as(mean)], -1)
