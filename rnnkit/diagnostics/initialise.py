"""Ways to start a recurrent layer, each in place, for every layer and direction, with its source."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def forget_bias_(module: nn.Module, value: float = 1.0) -> nn.Module:
    """LSTM: the bias of the forget gate is `value` (b_ih) + 0 (b_hh), so that the cell keeps what it has at first.

    Source: R. Jozefowicz, W. Zaremba, I. Sutskever, "An empirical exploration of recurrent network architectures",
    ICML 2015.
    """
    for b_ih, b_hh, hidden in _biases(module, nn.LSTM, "forget_bias_"):
        with torch.no_grad():
            b_ih[hidden : 2 * hidden] = value
            b_hh[hidden : 2 * hidden] = 0
    return module


def chrono_(module: nn.Module, longest: int, *, generator: torch.Generator | None = None) -> nn.Module:
    """LSTM or GRU: each unit forgets on a time scale of its own, drawn between 2 steps and `longest`.

    b_f = log u, b_i = -b_f with u uniform from 1 to longest - 1; for a GRU b_z = log u, its z being the weight of the
    past.

    Args:
        longest: steps over which dependencies are expected, 3 or more.

    Source: C. Tallec, Y. Ollivier, "Can recurrent neural networks warp time?", ICLR 2018.
    """
    if type(longest) is not int or longest < 3:
        raise ValueError(f"longest must be 3 steps or more, got {longest!r}")
    for b_ih, b_hh, hidden in _biases(module, (nn.LSTM, nn.GRU), "chrono_"):
        drawn = 1 + (longest - 2) * torch.rand(hidden, generator=generator)
        past = drawn.log().to(b_ih)
        with torch.no_grad():
            b_hh[: 2 * hidden] = 0
            b_ih[hidden : 2 * hidden] = past
            b_ih[:hidden] = -past if len(b_ih) == 4 * hidden else 0
    return module


def orthogonal_(module: nn.Module, gain: float = 1.0, *, generator: torch.Generator | None = None) -> nn.Module:
    """Each gate's block of W_hh is orthogonal, times `gain`: at gain 1 a linear step keeps every length.

    Source: A. Saxe, J. McClelland, S. Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep linear
    neural networks", ICLR 2014.
    """
    for weight in _recurrent(module, "orthogonal_"):
        for block in weight.split(module.hidden_size):
            nn.init.orthogonal_(block, gain, generator=generator)
    return module


def identity_(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """RNN: W_hh = scale · I, biases 0; with relu this is the IRNN.

    Source: Q. Le, N. Jaitly, G. Hinton, "A simple way to initialize recurrent networks of rectified linear
    units" (2015).
    """
    if not isinstance(module, nn.RNNBase) or module.mode not in ("RNN_TANH", "RNN_RELU"):
        raise TypeError(f"identity_ takes a vanilla RNN, got {type(module).__name__}")
    for name, p in module.named_parameters():
        with torch.no_grad():
            if name.startswith("weight_hh"):
                p.copy_(scale * torch.eye(p.shape[0], dtype=p.dtype, device=p.device))
            elif name.startswith("bias"):
                p.zero_()
    return module


def spectral_radius_(module: nn.Module, radius: float) -> nn.Module:
    """Each gate's block of W_hh is scaled so that its largest eigenvalue has this modulus.

    Source: H. Jaeger, "The 'echo state' approach to analysing and training recurrent neural networks", GMD Report 148,
    2001, scales an RNN's weights so; block by block for gated cells is ours.
    """
    if not radius >= 0 or math.isinf(radius):
        raise ValueError(f"radius must be 0 or more, got {radius!r}")
    for weight in _recurrent(module, "spectral_radius_"):
        if module.proj_size:
            raise ValueError("a layer with a projection has no square blocks, so no eigenvalues")
        with torch.no_grad():
            for block in weight.split(weight.shape[1]):
                block.mul_(radius / torch.linalg.eigvals(block.double()).abs().max().clamp_min(1e-30).to(block))
    return module


def _recurrent(module: nn.Module, what: str) -> Iterator[Tensor]:
    if not isinstance(module, nn.RNNBase):
        raise TypeError(f"{what} takes a recurrent layer, got {type(module).__name__}")
    for name, p in module.named_parameters():
        if name.startswith("weight_hh"):
            yield p.detach()


def _biases(module: nn.Module, kinds: type | tuple[type, ...], what: str) -> Iterator[tuple[Tensor, Tensor, int]]:
    """b_ih, b_hh and H of each layer and direction."""
    wanted = {nn.LSTM: "LSTM", nn.GRU: "GRU"}
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    modes = [wanted[kind] for kind in kinds]
    if not isinstance(module, nn.RNNBase) or module.mode not in modes:
        raise TypeError(f"{what} takes {' or '.join(modes)} layers, got {type(module).__name__}")
    if not module.bias:
        raise ValueError(f"{what} sets biases, and this layer has none (bias=False)")
    every = dict(module.named_parameters())
    for name, b_ih in every.items():
        if name.startswith("bias_ih"):
            yield b_ih.detach(), every[name.replace("bias_ih", "bias_hh")].detach(), module.hidden_size
