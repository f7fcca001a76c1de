"""The naive sequence model: each p(x_t | x_1 … x_{t-1}) has parameters of its own for everything before it.

    reals     mean_t  = b_t + Σ_{s<t} A_{t,s} x_s       a scale of each step and feature
    tokens    logits_t = b_t + Σ_{s<t} A_{t,s} e(x_s)    e: a shared embedding

So the parameters and the cost of a step grow with t, and a model made for S steps can say nothing of step S + 1. That
is its point: the other models exist to avoid both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .base import Cost, SequenceModel, positive
from .observations import Tokens, kind, valid_mask


class Past(NamedTuple):
    """Everything seen so far, zeros beyond."""

    seen: Tensor  # [B, S, E]
    known: Tensor  # [B] steps of it


class NaiveSequenceModel(SequenceModel):
    """p(x_t | x_1 … x_{t-1}), linear in all of the past.

    Args:
        steps: S, the longest series it can describe.
        features: D of vectors [B, T, D]; None for scalars [B, T].
        vocabulary: V, for tokens [B, T].
        width: E, of a token's embedding.

    The weights are `weight` [S (S - 1) / 2, E, F], the pairs (t, s) in the order of t; `bias` [S, F]; `log_scale`
    [S, D] for reals, where E = F = D; `embedding` for tokens, where F = V.
    """

    def __init__(
        self, steps: int, *, features: int | None = None, vocabulary: int | None = None, width: int = 8
    ) -> None:
        super().__init__(kind(features, vocabulary))
        self.steps = positive("steps", steps)
        if isinstance(self.observations, Tokens):
            inputs, means = positive("width", width), self.observations.vocabulary
            self.embedding = nn.Embedding(means, inputs)
        else:
            inputs = means = self.observations.width
            self.log_scale = nn.Parameter(torch.zeros(steps, means))
        self.weight = nn.Parameter(torch.zeros(steps * (steps - 1) // 2, inputs, means))
        self.bias = nn.Parameter(torch.zeros(steps, means))

    def extra_repr(self) -> str:
        return f"steps={self.steps}"

    def conditionals(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        self._expect_room(x.shape[1])
        steps = x.shape[1]
        means = torch.einsum("bse,tsef->btf", self._vectors(x), self._matrix(steps)) + self.bias[:steps]
        return self._with_scale(means, torch.arange(steps, device=x.device))

    def begin(self, x: Tensor, lengths: Tensor | None) -> Past:
        self._expect_room(x.shape[1])
        rows, steps = x.shape[:2]
        vectors = self._vectors(x)
        if lengths is None:
            lengths = torch.full((rows,), steps, device=x.device)
        there = valid_mask(steps, lengths)
        seen = vectors.new_zeros((rows, self.steps, vectors.shape[2]))
        seen[:, :steps] = vectors.masked_fill(~there[..., None], 0)
        return Past(seen, lengths)

    def following(self, state: Past) -> Tensor:
        self._expect_room(int(state.known.max()) + 1 if state.known.numel() else 0)
        every = self._matrix(self.steps)
        if bool((state.known == state.known[:1]).all()) and state.known.numel():  # one row of the matrix for all
            means = torch.einsum("bse,sef->bf", state.seen, every[state.known[0]])
        else:
            means = torch.einsum("bse,bsef->bf", state.seen, every[state.known])
        return self._with_scale(means + self.bias[state.known], state.known)

    def advance(self, state: Past, x_t: Tensor) -> Past:
        new = self._vectors(x_t[:, None])
        at = torch.arange(self.steps, device=x_t.device) == state.known[:, None]
        return Past(torch.where(at[..., None], new, state.seen), state.known + 1)

    def repeated(self, state: Past, times: int) -> Past:
        return Past(*(v.repeat_interleave(times, 0) for v in state))

    def cost(self, t: int) -> Cost:
        self._expect_room(positive("t", t))
        _, inputs, means = self.weight.shape
        products = (t - 1) * inputs * means
        scales = 0 if isinstance(self.observations, Tokens) else means
        return Cost(products + means + scales, products)

    def _expect_room(self, steps: int) -> None:
        if steps > self.steps:
            raise ValueError(
                f"this naive model has parameters for {self.steps} steps, and step {steps} is asked for: make it with "
                f"steps={steps}, or take a model whose parameters do not grow (AutoregressiveModel)"
            )

    def _vectors(self, x: Tensor) -> Tensor:
        """[B, T, E]"""
        if isinstance(self.observations, Tokens):
            return self.embedding(x)
        return self.observations.vectors(x).to(self.weight.dtype)

    def _matrix(self, steps: int) -> Tensor:
        """A [t, s, E, F], zeros where s ≥ t."""
        count = steps * (steps - 1) // 2
        rows, columns = torch.tril_indices(steps, steps, -1, device=self.weight.device)
        whole = self.weight.new_zeros((steps, steps, *self.weight.shape[1:]))
        return whole.index_put((rows, columns), self.weight[:count])

    def _with_scale(self, means: Tensor, at: Tensor) -> Tensor:
        if isinstance(self.observations, Tokens):
            return means
        return torch.cat([means, self.log_scale[at].expand_as(means)], -1)
