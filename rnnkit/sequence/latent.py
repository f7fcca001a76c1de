"""The latent autoregressive model: h_t = g(h_{t-1}, x_{t-1}) and p(x_t | h_t), g any recurrent layer of this package.

All of the past, in a summary of fixed size: parameters and cost do not depend on t, and nothing is lost by rule. The
layer reads x shifted by one step, a learned value before the first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn import GRU, LSTM, RNN
from .base import Cost, SequenceModel, positive
from .observations import Tokens, kind

Layer = RNN | LSTM | GRU


class Summary(NamedTuple):
    """What the layer carries on."""

    output: Tensor  # [B, N]: h_t of the last layer, from which x_t is predicted
    hx: Any  # the layer's states, each [layers, B, ...]


class LatentAutoregressiveModel(SequenceModel):
    """p(x_t | h_t) with h_t = g(h_{t-1}, x_{t-1}).

    Args:
        rnn: g, an rnnkit.RNN, LSTM or GRU of one direction, any number of layers. Its input_size is D for reals (1 for
            scalars); for tokens it is the width of their embedding.
        features: D of vectors [B, T, D]; None for scalars [B, T].
        vocabulary: V, for tokens [B, T].

    Mean and scale, or logits, are linear in h_t.
    """

    def __init__(self, rnn: Layer, *, features: int | None = None, vocabulary: int | None = None) -> None:
        super().__init__(kind(features, vocabulary))
        if not isinstance(rnn, (RNN, LSTM, GRU)):
            hint = "; rnnkit.convert(layer) makes torch.nn's layers rnnkit's" if isinstance(rnn, nn.RNNBase) else ""
            raise TypeError(f"rnn must be an rnnkit.RNN, LSTM or GRU, got {type(rnn).__name__}{hint}")
        if rnn.bidirectional:
            raise ValueError("rnn must not be bidirectional: it would see the observations that it is to predict")
        self.rnn = rnn
        if isinstance(self.observations, Tokens):
            self.embedding = nn.Embedding(self.observations.vocabulary, rnn.input_size)
        elif rnn.input_size != self.observations.width:
            raise ValueError(
                f"rnn must read {self.observations.width} features, one observation, got input_size={rnn.input_size}"
            )
        self.start = nn.Parameter(torch.zeros(rnn.input_size))
        self.head = nn.Linear(rnn.proj_size or rnn.hidden_size, self.observations.outputs)

    def conditionals(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return self.head(self._run(self._after_start(x[:, :-1]), lengths)[0])

    def begin(self, x: Tensor, lengths: Tensor | None) -> Summary:
        y, hx = self._run(self._after_start(x), None if lengths is None else lengths + 1)
        if lengths is None:
            return Summary(y[:, -1], hx)
        return Summary(y[torch.arange(x.shape[0], device=x.device), lengths], hx)

    def following(self, state: Summary) -> Tensor:
        return self.head(state.output)

    def advance(self, state: Summary, x_t: Tensor) -> Summary:
        y, hx = self._run(self._vectors(x_t[:, None]), None, state.hx)
        return Summary(y[:, -1], hx)

    def repeated(self, state: Summary, times: int) -> Summary:
        if isinstance(state.hx, tuple):
            hx: Any = tuple(v.repeat_interleave(times, 1) for v in state.hx)
        else:
            hx = state.hx.repeat_interleave(times, 1)
        return Summary(state.output.repeat_interleave(times, 0), hx)

    def cost(self, t: int) -> Cost:
        positive("t", t)
        parameters = sum(p.numel() for p in self.parameters())
        matrices = [p for name, p in self.rnn.named_parameters() if name.startswith("weight")]
        return Cost(parameters, sum(p.numel() for p in [*matrices, self.head.weight]))

    def _run(self, inputs: Tensor, lengths: Tensor | None, hx: Any = None) -> tuple[Tensor, Any]:
        """The layer on inputs [B, T, I]: y [B, T, N] and its states."""
        first = self.rnn.batch_first
        y, hx = self.rnn(inputs if first else inputs.transpose(0, 1), hx, lengths=lengths)
        return (y if first else y.transpose(0, 1)), hx

    def _vectors(self, x: Tensor) -> Tensor:
        """[B, T, I]"""
        if isinstance(self.observations, Tokens):
            return self.embedding(x)
        return self.observations.vectors(x).to(self.start.dtype)

    def _after_start(self, x: Tensor) -> Tensor:
        """[B, 1 + T, I]"""
        return torch.cat([self.start.expand(x.shape[0], 1, -1), self._vectors(x)], 1)
