"""Models of sequences, from what each next observation is conditioned on: p(x_1 … x_T) = Π_t p(x_t | …).

    NaiveSequenceModel          all of x_1 … x_{t-1}; parameters and cost grow with t
    AutoregressiveModel         x_{t-τ} … x_{t-1}; anything older is lost
    MarkovModel                 x_{t-1}: the case τ = 1, for tokens also a table of counts
    LatentAutoregressiveModel   h_t = g(h_{t-1}, x_{t-1}), g a recurrent layer: the past in a fixed size

Each gives `forward(x)` (a torch.distributions object for every step), `log_prob(x)`, `generate(x, steps)` and
`forecast(x, steps)`; `fit` trains one.

Source: A. Zhang, Z. Lipton, M. Li, A. Smola, "Dive into Deep Learning" (2023), chapter 9, whose distinctions these are.
"""

from .autoregressive import AutoregressiveModel, MarkovModel
from .base import Cost, Forecast, SequenceModel
from .latent import LatentAutoregressiveModel
from .naive import NaiveSequenceModel
from .training import Fit, fit, windows

__all__ = [
    "AutoregressiveModel",
    "Cost",
    "Fit",
    "Forecast",
    "LatentAutoregressiveModel",
    "MarkovModel",
    "NaiveSequenceModel",
    "SequenceModel",
    "fit",
    "windows",
]
