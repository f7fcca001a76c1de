"""Sequences, from a naive model to gated cells, as a program to read from top to bottom and to run: half a minute.

Each step prints what it found. `python examples/story.py --out DIR` also saves two pictures (needs matplotlib).
"""

# %% Sequential data
# Observations in an order, as many as there happen to be. Here: a noisy oscillation whose next value depends on the two
# before it, x_t = 1.6 x_{t-1} - 0.9 x_{t-2} + noise; 60 series to learn from and 20 to be judged by.

import argparse
from pathlib import Path

import torch

import rnnkit
from rnnkit.diagnostics import adding_problem, gates, gradient_flow, initialise
from rnnkit.sequence import AutoregressiveModel, LatentAutoregressiveModel, MarkovModel, NaiveSequenceModel, fit

options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
options.add_argument("--out", type=Path, help="a folder for pictures")
out = options.parse_args().out
pictures = [out / "gradient.png", out / "gates.png"] if out is not None else []
try:  # before half a minute has gone by
    if pictures:
        import matplotlib  # noqa: F401

        out.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        picture.open("ab").close()
except ModuleNotFoundError:
    options.exit(2, "pictures need matplotlib: pip install rnnkit[plots]\n")
except OSError as error:
    options.exit(2, f"cannot write to {error.filename}: {error.strerror}\n")
torch.manual_seed(0)

STEPS = 40
noise = torch.randn(80, STEPS + 50)
values = [noise[:, 0], noise[:, 1]]
for t in range(2, STEPS + 50):
    values.append(1.6 * values[-1] - 0.9 * values[-2] + 0.5 * noise[:, t])
series = torch.stack(values[50:], 1)
learn, judge = series[:60], series[60:]


def score(model: rnnkit.sequence.SequenceModel) -> float:
    """Negative log-likelihood of one held-out observation, in nats."""
    with torch.no_grad():
        return -float(model.log_prob(judge).mean()) / STEPS


# %% The joint density is a product of conditionals
# p(x_1 … x_T) = Π_t p(x_t | x_1 … x_{t-1}). Models differ in how much of the past they look at, and at what price.
#
# The naive sequence model has parameters of its own for each step and everything before it. It can say what it likes
# about step 40, learns each of its numbers from 60 examples, and has nothing to say about step 41.

naive = NaiveSequenceModel(STEPS)
fit(naive, learn, epochs=60, batch_size=60, learning_rate=0.03, progress=False)

# %% Autoregressive: the last τ observations, the same rule at every step. Markov: τ = 1.

markov, second = MarkovModel(), AutoregressiveModel(2)
for model in (markov, second):
    fit(model, learn, epochs=60, batch_size=60, learning_rate=0.1, progress=False)

# %% Latent autoregressive: h_t = g(h_{t-1}, x_{t-1}) sums the past up in a fixed size, and g is a recurrent layer.

# Its scale may differ from step to step, where the linear models have one that must cover the first steps as well.

latent = LatentAutoregressiveModel(rnnkit.GRU(1, 16, batch_first=True))
fit(latent, learn, epochs=60, batch_size=20, learning_rate=0.02, progress=False)

print("model            held-out nats   parameters of step 2 and step 40")
for name, model in (("naive", naive), ("Markov", markov), ("order 2", second), ("latent GRU", latent)):
    print(f"{name:<16} {score(model):13.3f}   {model.cost(2).parameters:6} {model.cost(40).parameters:6}")
band = second.forecast(judge[:1], 10, generator=torch.Generator().manual_seed(0))
print("ten steps ahead, the band grows from", f"{float(band.high[0, 0] - band.low[0, 0]):.2f}",
      "to", f"{float(band.high[0, -1] - band.low[0, -1]):.2f}")  # fmt: skip

# %% The vanilla RNN forgets: its gradient falls, or grows, exponentially with the distance
# At each step back in time the gradient is multiplied by W_hhᵀ and the slope of the activation, here relu's: 0 or 1.

x = torch.randn(100, 4, 8)
for radius in (0.5, 1.0, 2.0):
    rnn = initialise.spectral_radius_(rnnkit.RNN(8, 32, nonlinearity="relu"), radius)
    print(f"relu RNN, spectral radius {radius}: the gradient changes × {gradient_flow(rnn, x).decay['l0']:.3f} a step")

# %% LSTM: a cell state beside the product
# c_t = f ⊙ c_{t-1} + i ⊙ g. Where the forget gate f is near 1 the gradient passes as it is; the input gate i decides
# what is written, the output gate o what is shown.

lstm = initialise.forget_bias_(rnnkit.LSTM(8, 32), 5.0)
flow = gradient_flow(lstm, x)
print(f"LSTM, forget bias 5: × {flow.decay['l0']:.3f} a step")

# %% GRU: one state, two gates
# h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}: the update gate z weighs the past, 1 - z the candidate n, and the weights sum to one;
# the reset gate r decides how much of the past the candidate sees.

gru = rnnkit.GRU(8, 32)
inside = gates(gru, x)["l0"]
before = torch.cat([torch.zeros(1, 4, 32), inside["h"][:-1]])
mixed = (1 - inside["z"]) * inside["n"] + inside["z"] * before
off = float((mixed - inside["h"]).abs().max())
print(f"GRU: h_t = z past + (1 - z) candidate, weights that sum to one: off by {off:.0e}")

# %% What it is good for: remembering
# The adding problem: two of 30 numbers are marked, and their sum is asked for. Whoever remembers nothing says 1. The
# vanilla RNN's weak long memory shows: it is still near that when a GRU of the same width is done.


class Adder(torch.nn.Module):
    """A recurrent layer, and an answer from its last state."""

    def __init__(self, rnn: torch.nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = torch.nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[1][-1])[:, 0]


for cell in (rnnkit.RNN, rnnkit.GRU):
    adder = Adder(cell(2, 32, batch_first=True))
    optimizer = torch.optim.Adam(adder.parameters(), lr=1e-2)
    for _step in range(400):
        task = adding_problem(64, 30)
        loss = (adder(task.x) - task.target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adder.parameters(), 1.0)
        optimizer.step()
    print(f"adding problem, {cell.__name__}: after 400 steps an error of {float(loss.detach()):.4f}")
print(f"adding problem, one that remembers nothing: {task.baseline():.4f}")

if pictures:
    flow.plot().savefig(pictures[0], dpi=120)
    gates(adder, adding_problem(1, 30).x).plot("rnn.l0").savefig(pictures[1], dpi=120)
    print(f"pictures: {pictures[0]}, {pictures[1]}")
