"""The character model of the demo. Which recurrent layer it is built around is all that differs between two runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .text import encode

LETTER_SIZE = 64  # of the embedding
HIDDEN = 128
LAYERS = 2
TEMPERATURE = 0.6


class CharModel(nn.Module):
    """Letters in, scores of the next letter out.

    Args:
        layer: torch.nn's or rnnkit's RNN, LSTM or GRU, called with the arguments that both know.
        letters: size of the vocabulary, V.
    """

    def __init__(self, layer: Callable[..., nn.Module], letters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, LETTER_SIZE)
        # No dropout: cuDNN draws the masks between its layers from a state of its own, so they would differ.
        self.recurrent = layer(LETTER_SIZE, HIDDEN, num_layers=LAYERS, batch_first=True)
        self.head = nn.Linear(HIDDEN, letters)

    def forward(self, letters: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """letters [B, T] int64 and the layer's state -> scores [B, T, V] and the state after them."""
        output, state = self.recurrent(self.embedding(letters), state)
        return self.head(output), state


@torch.no_grad()
def generate(model: CharModel, letters: str, prompt: str, length: int, seed: int) -> str:
    """`prompt` and `length` letters that the model adds to it, drawn at TEMPERATURE."""
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    seen = encode(prompt, letters).long()
    text, state = prompt, None
    for _ in range(length):
        scores, state = model(seen[None].to(device), state)
        last = scores[0, -1].float().cpu() / TEMPERATURE
        last[0] = -torch.inf  # OTHER is no letter
        seen = torch.multinomial(last.softmax(0), 1, generator=generator)
        text += letters[int(seen)]
    return text
