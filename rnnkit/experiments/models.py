"""The four sequence models on a real series (sunspots, 1700 to 2008) and on a real text (Python's standard library),
each beside a baseline of persistence: what each next observation is worth, what it costs, how far a forecast reaches.

Judged is the last observation of every window of held-out data, given those before it in the window: so all models see
the same past. The series is standardised by the years before the held-out ones. Persistence says of a year: as the last
one, with the spread of the changes before the held-out years; of a character: the last one again as often as there,
else any by its frequency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

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
from .common import STYLES, Finding, Show, listed

FIRST = 1700  # year of the series
YEARS, LETTERS = 24, 16  # steps of a window of the series, and of the text
HELD = 84  # years at the end that are held out
CHECKED = 30  # years before them, which say when to stop
AHEAD = 22  # years of a forecast: two cycles of the sun
LEVEL = 0.9  # of the draws, in a forecast's band
JUDGED = 5000  # windows of held-out text
BASELINE = "persistence"
NAMES = ("naive", "Markov", "autoregressive", "latent GRU")
ORDERS = {"sunspots": 9, "text": 3}
STEPS = {"sunspots": YEARS, "text": LETTERS}
"""The data sets that there are, and the steps of a window of each."""


class Size(NamedTuple):
    """Passes over the series at most, windows of text, passes over them, width of the text's GRU."""

    epochs: int
    texts: int
    passes: int
    hidden: int


QUICK, FULL = Size(100, 30_000, 1, 64), Size(400, 300_000, 2, 128)


class Learned(NamedTuple):
    """The models of one data set, by name, and what each observation is worth."""

    models: dict[str, SequenceModel]
    nats: dict[str, float]
    """Held-out log-likelihood of an observation, of BASELINE too."""


def sunspots() -> Tensor:
    """The yearly sunspot numbers [309]; raises ModuleNotFoundError without statsmodels."""
    try:
        from statsmodels.datasets import sunspots as data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the sunspots come with statsmodels: pip install rnnkit[data]") from error
    return torch.tensor(data.load_pandas().data["SUNACTIVITY"].to_numpy(), dtype=torch.float32)


def run(size: Size, seed: int, show: Show, data: Sequence[str] = tuple(STEPS)) -> Finding:
    """Train on each of `data`, judge, forecast the sunspots."""
    torch.manual_seed(seed)
    learned: dict[str, Learned] = {}
    ahead: dict[str, Any] = {}
    series = torch.empty(0)

    def shown(name: str) -> Callable[[int], None]:
        before = len(learned) * len(NAMES)
        return lambda k: show(before + k + 1, len(data) * len(NAMES), f"{name}: {NAMES[k]}")

    if "sunspots" in data:
        series = sunspots()
        known = series[:-HELD]
        scaled = (series - known.mean()) / known.std()
        learned["sunspots"] = of_series(scaled, size, seed, shown("sunspots"))
        g = torch.Generator().manual_seed(seed)
        for name, model in learned["sunspots"].models.items():
            if name != "naive":  # has no parameters for a step beyond YEARS
                band = model.forecast(scaled[:-HELD][None], AHEAD, level=LEVEL, generator=g)
                ahead[name] = [v[0] * known.std() + known.mean() for v in band]
    if "text" in data:
        learned["text"] = of_text(size, seed, shown("text"))
    return Finding(
        rows_of(learned, ahead, series), sentences(learned, ahead, series), lambda: draw(learned, ahead, series)
    )


def of_series(scaled: Tensor, size: Size, seed: int, shown: Callable[[int], None]) -> Learned:
    """Training windows, then CHECKED years, then HELD; no year in two of them but as the past of one."""
    train, check = (
        windows(scaled[: -HELD - CHECKED], YEARS, 1),
        windows(scaled[-HELD - CHECKED - YEARS : -HELD], YEARS, 1),
    )
    held = windows(scaled[-HELD - YEARS + 1 :], YEARS, 1)
    models: dict[str, SequenceModel] = {
        "naive": NaiveSequenceModel(YEARS),
        "Markov": MarkovModel(),
        "autoregressive": AutoregressiveModel(ORDERS["sunspots"]),
        "latent GRU": LatentAutoregressiveModel(GRU(1, 16, batch_first=True)),
    }
    for k, model in enumerate(models.values()):
        fit(model, train, epochs=size.epochs, held_out=check, patience=size.epochs // 4, seed=seed, progress=False)
        shown(k)
    changes = scaled[:-HELD].diff()
    persistence = Normal(held[:, -2], changes.square().mean().sqrt()).log_prob(held[:, -1])
    return Learned(models, worth(models, held) | {BASELINE: float(persistence.mean())})


def of_text(size: Size, seed: int, shown: Callable[[int], None]) -> Learned:
    """The Markov model by counting; the others on random windows."""
    corpus = text.load(None)
    size_of = len(corpus.letters)
    g = torch.Generator().manual_seed(seed)

    def some(of: Tensor, count: int) -> Tensor:
        return of[torch.randint(len(of) - LETTERS, (count, 1), generator=g) + torch.arange(LETTERS)].long()

    train, held = some(corpus.train, size.texts), some(corpus.held_out, JUDGED)
    models: dict[str, SequenceModel] = {
        "naive": NaiveSequenceModel(LETTERS, vocabulary=size_of),
        "Markov": MarkovModel.from_counts(corpus.train[None], size_of),
        "autoregressive": AutoregressiveModel(ORDERS["text"], vocabulary=size_of),
        "latent GRU": LatentAutoregressiveModel(GRU(32, size.hidden, batch_first=True), vocabulary=size_of),
    }
    for k, (name, model) in enumerate(models.items()):
        if name != "Markov":
            fit(model, train, epochs=size.passes, batch_size=64, seed=seed, progress=False)
        shown(k)
    again = float((corpus.train[1:] == corpus.train[:-1]).float().mean())
    frequency = torch.bincount(corpus.train.long(), minlength=size_of) / len(corpus.train)
    chance = again * (held[:, -1] == held[:, -2]) + (1 - again) * frequency[held[:, -1]]
    return Learned(models, worth(models, held) | {BASELINE: float(chance.log().mean())})


def worth(models: dict[str, SequenceModel], held: Tensor) -> dict[str, float]:
    """The mean log-likelihood of the last observation of each window, given the others."""
    with torch.no_grad():
        return {name: float(model(held).log_prob(held)[:, -1].mean()) for name, model in models.items()}


def rows_of(learned: dict[str, Learned], ahead: dict[str, Any], series: Tensor) -> list[dict[str, Any]]:
    """A number a row: what it is, of which model, for which step or year."""
    rows: list[dict[str, Any]] = []

    def add(data: str, model: str, what: str, at: int, value: float) -> None:
        rows.append({"data": data, "model": model, "what": what, "at": at, "value": value})

    for data, found_in in learned.items():
        for name, nats in found_in.nats.items():
            add(data, name, "held-out nats of an observation", STEPS[data], nats)
        for name, model in found_in.models.items():
            for t in range(1, STEPS[data] + 1):
                add(data, name, "parameters of a step", t, model.cost(t).parameters)
                add(data, name, "multiply-adds of a step", t, model.cost(t).multiply_adds)
    begin = len(series) - HELD
    for k in range(AHEAD if ahead else 0):
        add("sunspots", "observed", "sunspot number", FIRST + begin + k, float(series[begin + k]))
        for name, found in ahead.items():
            for what, v in zip(("mean", "low", "high"), found, strict=True):
                add("sunspots", name, f"forecast {what}", FIRST + begin + k, float(v[k]))
    return rows


def sentences(learned: dict[str, Learned], ahead: dict[str, Any], series: Tensor) -> list[str]:
    """What each model is worth, what a step takes and how forecasts fared; of the text alone, the best's gain."""

    def ranking(data: str) -> str:
        nats = learned[data].nats
        order = sorted(learned[data].models, key=lambda name: -nats[name])
        below = [name for name in order if nats[name] <= nats[BASELINE]]
        against = (
            f"all but {listed(below)} beat" if 0 < len(below) < len(order) else "none beats" if below else "all beat"
        )
        named = listed(f"{name} {nats[name]:.2f}" for name in order)
        return f"{named}, and {against} persistence with {nats[BASELINE]:.2f}"

    begin = len(series) - HELD
    observed = series[begin : begin + AHEAD]
    inside = {name: int(((low <= observed) & (observed <= high)).sum()) for name, (_, low, high) in ahead.items()}
    data, first_of = next(iter(learned.items()))
    models = first_of.models
    takes = {name: (model.cost(1).parameters, model.cost(STEPS[data]).parameters) for name, model in models.items()}
    grows = [f"{name} ({first} to {last})" for name, (first, last) in takes.items() if last > first]
    stays = [f"{name} ({first})" for name, (first, last) in takes.items() if last == first]
    worth_of = {"sunspots": "a held-out year of sunspots", "text": "a held-out character of text"}
    said = [f"The log-likelihood of {worth_of[name]} is, in nats, {ranking(name)}." for name in learned]
    steps = (
        f"From t = 1 to {STEPS[data]} the parameters of a step grow for {listed(grows)} and stay for {listed(stays)}"
    )
    held = listed(f"{count} ({name})" for name, count in inside.items())
    bands = f"f the {AHEAD} years forecast the band of {LEVEL:.0%} held {held}."
    if len(learned) > 1:
        return [*said, f"{steps}, and o{bands}"]
    if ahead:
        return [*said, f"{steps}.", f"O{bands}"]
    best = max(models, key=first_of.nats.__getitem__)
    times = math.exp(first_of.nats[best] - first_of.nats[BASELINE])
    gain = (
        f"The probability of a character under {best} is {times:.2f} times that under persistence, in geometric mean."
    )
    return [*said, f"{steps}.", gain]


def draw(learned: dict[str, Learned], ahead: dict[str, Any], series: Tensor) -> Any:
    """Two forecasts, what an observation is worth, what a step takes."""
    fig, axes = figure(2 if ahead else 1, 2, width=5, height=3.4)
    *forecasts, gains, costs = axes
    begin = len(series) - HELD
    years = range(FIRST + begin, FIRST + begin + AHEAD)
    for axis, name in zip(forecasts, ("autoregressive", "latent GRU"), strict=False):
        axis.sharey(forecasts[0])
        expected, low, high = ahead[name]
        axis.fill_between(years, low, high, color="0.85", label=f"{LEVEL:.0%} band")
        axis.plot(years, expected, "--", color="black", label="mean")
        seen = range(begin - 30, begin + AHEAD)
        axis.plot([FIRST + k for k in seen], series[begin - 30 : begin + AHEAD], color="black", label="observed")
        axis.axvline(years[0] - 0.5, color="0.5", linewidth=1, linestyle=":")
        axis.set(title=f"forecast, {name}", xlabel="year", ylabel="sunspot number")
    if forecasts:
        forecasts[0].legend(fontsize=8, loc="upper left")
    places = range(len(NAMES))
    for side, (data, shade) in enumerate(zip(learned, ("0.35", "0.8"), strict=False)):
        nats = learned[data].nats
        gain = [nats[name] - nats[BASELINE] for name in NAMES]
        label = f"{data} (persistence: {nats[BASELINE]:.2f})"
        bars = gains.barh([k + 0.4 * side for k in places], gain, 0.4, color=shade, edgecolor="black", label=label)
        gains.bar_label(bars, [f"{v:+.2f}" for v in gain], fontsize=8, padding=2)
    gains.set_yticks([k + 0.2 for k in places], NAMES)
    gains.set_ylim(len(NAMES) - 0.3, -1.3)  # the first on top, and room for the legend
    gains.margins(x=0.15)
    gains.axvline(0, color="black", linewidth=1)
    gains.set(xlabel="held-out log-likelihood above persistence, nats", title="what an observation is worth")
    gains.legend(fontsize=8)
    data, found = next(iter(learned.items()))
    steps = range(1, STEPS[data] + 1)
    for name, style in zip(NAMES, STYLES, strict=True):
        counts = [found.models[name].cost(t).parameters for t in steps]
        costs.semilogy(steps, counts, label=name, markevery=3, **style)
    costs.set(title=f"what a step takes, {data}", xlabel="step t", ylabel=r"parameters of $p(x_t\,|\,\ldots)$")
    costs.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.7 if data == "sunspots" else 0.3))
    return fig
