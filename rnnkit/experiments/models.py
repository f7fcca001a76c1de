"""The four sequence models on a real series (sunspots, 1700 to 2008) and on a real text (Python's standard library), each
beside a baseline of persistence: what each next observation is worth, what it costs, and how far a forecast reaches.

Judged is the last observation of every window of held-out data, given those before it in the window: so all models see
the same past. The series is standardised by its training part. Persistence says: as the last value, with the spread of
the training part's changes; of a text, the last character again in as many cases as there, else by frequency.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import GRU
from ..demo import text
from ..diagnostics.pictures import figure
from ..sequence import (
    AutoregressiveModel,
    LatentAutoregressiveModel,
    MarkovModel,
    NaiveSequenceModel,
    SequenceModel,
    fit,
    windows,
)
from .common import DASHES, MARKS, Finding, MissingPackage, Show

YEARS, LETTERS = 24, 16  # steps of a window of the series, and of the text
HELD = 84  # years at the end that are held out
AHEAD = 22  # years of a forecast
BASELINE = "persistence"


def sunspots() -> Tensor:
    """The yearly sunspot numbers, [309]."""
    try:
        from statsmodels.datasets import sunspots as data
    except ModuleNotFoundError as error:
        raise MissingPackage("the sunspots come with statsmodels: pip install rnnkit[data]") from error
    return torch.tensor(data.load_pandas().data["SUNACTIVITY"].to_numpy(), dtype=torch.float32)


def run(quick: bool, seed: int, show: Show) -> Finding:
    torch.manual_seed(seed)
    series = sunspots()
    parts = 9
    rows, trained, scaled = of_series(series, quick, seed, lambda k, what: show(k, parts, what))
    rows += of_text(quick, seed, lambda k, what: show(4 + k, parts, what))
    costs = [
        {"data": "sunspots", "model": name, "t": t, **trained[name].cost(t)._asdict()}
        for name in trained
        for t in range(1, YEARS + 1)
    ]
    rows = [{**row, "t": YEARS if row["data"] == "sunspots" else LETTERS} for row in rows]
    keys = ("data", "model", "t", "nats", "baseline", "parameters", "multiply_adds")
    every = [{key: row.get(key, "") for key in keys} for row in [*rows, *costs]]
    show(parts, parts, "forecasts")
    ahead = {name: forecast(trained[name], scaled, seed) for name in ("order 9", "latent GRU")}
    return Finding(every, sentences(rows, trained), lambda: draw(series, rows, trained, ahead))


def of_series(series: Tensor, quick: bool, seed: int, show: Any) -> tuple[list[dict[str, Any]], dict[str, SequenceModel], Tensor]:
    learn = series[:-HELD]
    scaled = (series - learn.mean()) / learn.std()
    train, held = windows(scaled[:-HELD], YEARS, 1), windows(scaled[-HELD - YEARS + 1 :], YEARS, 1)
    changes = scaled[:-HELD].diff()
    persistence = torch.distributions.Normal(held[:, -2], changes.square().mean().sqrt()).log_prob(held[:, -1])
    trained: dict[str, SequenceModel] = {
        "naive": NaiveSequenceModel(YEARS),
        "Markov": MarkovModel(),
        "order 9": AutoregressiveModel(9),
        "latent GRU": LatentAutoregressiveModel(GRU(1, 16, batch_first=True)),
    }
    rows = []
    for k, (name, model) in enumerate(trained.items(), 1):
        cut = len(train) - 30  # the last years of the training part say when to stop
        fit(model, train[:cut], epochs=60 if quick else 400, batch_size=32, learning_rate=0.01, held_out=train[cut:],
            patience=20 if quick else 60, seed=seed, progress=False)  # fmt: skip
        rows.append({"data": "sunspots", "model": name, "nats": worth(model, held), "baseline": float(persistence.mean())})
        show(k, f"sunspots, {name}")
    return rows, trained, scaled


def of_text(quick: bool, seed: int, show: Any) -> list[dict[str, Any]]:
    corpus = text.load(None)
    size = len(corpus.letters)
    g = torch.Generator().manual_seed(seed)

    def some(of: Tensor, count: int) -> Tensor:
        begin = torch.randint(len(of) - LETTERS, (count, 1), generator=g)
        return of[begin + torch.arange(LETTERS)].long()

    train, held = some(corpus.train, 20_000 if quick else 200_000), some(corpus.held_out, 5000)
    again = float((corpus.train[1:] == corpus.train[:-1]).float().mean())
    frequency = torch.bincount(corpus.train.long(), minlength=size) / len(corpus.train)
    chance = again * (held[:, -1] == held[:, -2]) + (1 - again) * frequency[held[:, -1]]
    models: dict[str, SequenceModel] = {
        "naive": NaiveSequenceModel(LETTERS, vocabulary=size),
        "Markov": MarkovModel.from_counts(windows(corpus.train.long(), LETTERS), size),
        "order 3": AutoregressiveModel(3, vocabulary=size),
        "latent GRU": LatentAutoregressiveModel(GRU(16, 64, batch_first=True), vocabulary=size),
    }
    rows = []
    for k, (name, model) in enumerate(models.items(), 1):
        if name != "Markov":
            fit(model, train, epochs=1 if quick else 2, batch_size=64, learning_rate=0.01, seed=seed, progress=False)
        rows.append({"data": "text", "model": name, "nats": worth(model, held), "baseline": float(chance.log().mean())})
        show(k, f"text, {name}")
    return rows


def worth(model: SequenceModel, held: Tensor) -> float:
    """The mean log-likelihood of the last observation of each window, given the others."""
    with torch.no_grad():
        return float(model(held).log_prob(held)[:, -1].mean())


def forecast(model: SequenceModel, scaled: Tensor, seed: int) -> Any:
    """From the beginning of the held-out years on."""
    past = scaled[-HELD - 2 * YEARS : -HELD]
    return model.forecast(past[None], AHEAD, generator=torch.Generator().manual_seed(seed))


def sentences(rows: list[dict[str, Any]], trained: dict[str, SequenceModel]) -> list[str]:
    said = []
    for data, what in (("sunspots", "year of sunspots"), ("text", "character of text")):
        mine = sorted((row for row in rows if row["data"] == data), key=lambda row: -row["nats"])
        order = ", ".join(f"{row['model']} {row['nats']:.2f}" for row in mine)
        beaten = sum(row["nats"] > row["baseline"] for row in mine)
        said.append(
            f"Held-out log-likelihood of a {what}, in nats: {order}; persistence {mine[0]['baseline']:.2f}, which "
            f"{beaten} of {len(mine)} models beat."
        )
    naive, other = trained["naive"], trained["order 9"]
    said.append(
        f"The naive model's step takes {naive.cost(1).parameters} parameters at t = 1 and {naive.cost(YEARS).parameters} at "
        f"t = {YEARS}, that of order 9 {other.cost(1).parameters} at any t: one grows with the past, the other forgets it."
    )
    return said


def draw(series: Tensor, rows: list[dict[str, Any]], trained: dict[str, SequenceModel], ahead: dict[str, Any]) -> Any:
    fig, axes = figure(2, 2, width=4.8, height=3.2)
    first = 1700 + len(series) - HELD
    learn = series[:-HELD]
    for axis, (name, found), shade in zip(axes[:2], ahead.items(), ("0.8", "0.8"), strict=True):
        years = range(first, first + AHEAD)
        mean, low, high = (v[0] * learn.std() + learn.mean() for v in found)
        axis.fill_between(years, low, high, color=shade, label="nine draws in ten")
        axis.plot(years, mean, "--", color="black", label="mean")
        axis.plot(range(first - 30, first + AHEAD), series[-HELD - 30 : -HELD + AHEAD], color="black", label="observed")
        axis.set(title=f"forecast by {name}", xlabel="year", ylabel="sunspots")
    axes[0].legend(fontsize=8)
    worth_axis, cost_axis = axes[2:]
    names = [f"{row['model']}\n({row['data']})" for row in rows]
    gain = [row["nats"] - row["baseline"] for row in rows]
    shades = ["0.35" if row["data"] == "sunspots" else "0.75" for row in rows]
    worth_axis.barh(range(len(rows)), gain, color=shades, edgecolor="black")
    worth_axis.set_yticks(range(len(rows)), names, fontsize=7)
    worth_axis.invert_yaxis()
    worth_axis.axvline(0, color="black", linewidth=1)
    worth_axis.set_xlabel("held-out nats above persistence")
    for (name, model), dash, mark in zip(trained.items(), DASHES, MARKS, strict=False):
        counts = [model.cost(t).parameters for t in range(1, YEARS + 1)]
        cost_axis.semilogy(range(1, YEARS + 1), counts, linestyle=dash, marker=mark, markersize=3, color="black", label=name)
    cost_axis.set(xlabel="step t", ylabel="parameters of p(x_t | ·)")
    cost_axis.legend(fontsize=8)
    return fig
