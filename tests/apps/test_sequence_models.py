"""The four sequence models: the joint density against closed forms, nothing seen of the future, step by step as all at
once, ragged rows, draws and forecasts against what theory says of them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MultivariateNormal, Normal

import rnnkit
from rnnkit.sequence import (
    AutoregressiveModel,
    LatentAutoregressiveModel,
    MarkovModel,
    NaiveSequenceModel,
    SequenceModel,
)

V, D, B, T = 5, 3, 4, 7
WIDE = torch.float64
KINDS: dict[str, dict[str, Any]] = {"scalars": {}, "vectors": {"features": D}, "tokens": {"vocabulary": V}}
MODELS = ("naive", "order 1", "order 3", "order 3, hidden", "order 9", "markov", "rnn", "lstm", "gru", "stack")


def made(model: str, kind: str) -> SequenceModel:
    """A model with random parameters in float64."""
    torch.manual_seed(1)
    of, width = KINDS[kind], D if kind == "vectors" else 1 if kind == "scalars" else 4
    how: dict[str, Any] = {"dtype": WIDE, "batch_first": model != "lstm"}
    found: SequenceModel
    if model == "naive":
        found = NaiveSequenceModel(T + 3, **of)
    elif model.startswith("order"):
        found = AutoregressiveModel(int(model[6]), hidden=6 if "hidden" in model else None, **of)
    elif model == "markov":
        found = MarkovModel(**of)
    elif model == "stack":
        found = LatentAutoregressiveModel(rnnkit.LSTM(width, 6, 2, proj_size=2, **how), **of)
    else:
        found = LatentAutoregressiveModel(getattr(rnnkit, model.upper())(width, 6, **how), **of)
    found = found.to(WIDE)
    with torch.no_grad():
        for p in found.parameters():
            p.normal_(std=0.4)
    return found.eval()


def series(kind: str, steps: int = T, rows: int = B) -> Tensor:
    torch.manual_seed(2)
    if kind == "tokens":
        return torch.randint(V, (rows, steps))
    return torch.randn((rows, steps) if kind == "scalars" else (rows, steps, D), dtype=WIDE)


every_model = pytest.mark.parametrize("model", MODELS)
every_kind = pytest.mark.parametrize("kind", KINDS)


# The joint density.


@every_model
@every_kind
def test_the_joint_is_the_product_of_the_conditionals(model: str, kind: str) -> None:
    m, x = made(model, kind), series(kind)
    found = m(x)
    assert isinstance(found, Categorical if kind == "tokens" else Normal if kind == "scalars" else Independent)
    assert found.batch_shape == (B, T) and m.log_prob(x).shape == (B,)
    assert torch.allclose(m.log_prob(x), found.log_prob(x).sum(1), rtol=1e-12)


@pytest.mark.parametrize("model", ["naive", "order 1", "order 3", "order 9", "markov"])
@pytest.mark.parametrize("kind", ["scalars", "vectors"])
def test_linear_models_against_the_multivariate_normal(model: str, kind: str) -> None:
    """x = b + A x + noise with A strictly lower triangular: x is normal with mean (I - A)⁻¹ b. A and b are found by
    asking for the means at zero and at each unit vector."""
    m, x = made(model, kind), series(kind)
    width = D if kind == "vectors" else 1
    zeros = x.new_zeros(1, T * width)

    def means(flat: Tensor) -> Tensor:
        return m(flat.view(-1, *x.shape[1:])).mean.reshape(-1, T * width)

    b = means(zeros)[0]
    matrix = (means(torch.eye(T * width, dtype=WIDE)) - b).T
    scale = m(zeros.view(1, *x.shape[1:])).stddev.reshape(-1)
    assert float((matrix - matrix.tril(-1)).detach().abs().max()) < 1e-14, "no observation helps to predict itself"
    inverse = (torch.eye(T * width, dtype=WIDE) - matrix.tril(-1)).inverse()
    joint = MultivariateNormal(inverse @ b, inverse @ scale.square().diag() @ inverse.T)
    assert torch.allclose(m.log_prob(x), joint.log_prob(x.reshape(B, -1)), rtol=1e-9)


def test_a_table_of_counts() -> None:
    x = torch.tensor([[0, 1, 1, 2], [0, 0, 1, 4], [2, 1, 0, 0]])
    lengths = torch.tensor([4, 3, 2])
    m = MarkovModel.from_counts(x, 3 + 2, lengths=lengths, smoothing=0.0)
    p = m(x, lengths).probs
    first, after = p[0, 0], {j: MarkovModel.following(m, torch.tensor([[j]])).softmax(-1)[0] for j in range(3)}
    expected = {0: [1 / 3, 2 / 3, 0, 0, 0], 1: [0, 1 / 2, 1 / 2, 0, 0], 2: [0, 1, 0, 0, 0]}
    assert torch.allclose(first, torch.tensor([2 / 3, 0, 1 / 3, 0, 0]), atol=1e-6)
    for j, row in expected.items():
        assert torch.allclose(after[j], torch.tensor(row, dtype=torch.float32), atol=1e-6), j
    total = 2 * math.log(2 / 3) + math.log(1 / 3) + 2 * math.log(2 / 3) + math.log(1 / 3) + 2 * math.log(1 / 2)
    assert float(m.log_prob(x, lengths).sum().detach()) == pytest.approx(total, rel=1e-5)
    smooth = MarkovModel.from_counts(x, 5, lengths=lengths)
    assert torch.allclose(smooth(x).probs[0, 1], torch.tensor([2.0, 3, 1, 1, 1]) / 8)


def test_counts_are_what_training_would_find() -> None:
    """Of all transition tables none gives the data a higher likelihood."""
    x = torch.randint(3, (6, 20), generator=torch.Generator().manual_seed(0))
    m = MarkovModel.from_counts(x, 3, smoothing=0.0).double()
    best = m.log_prob(x).sum()
    best.backward()
    rows = [m.weight.grad[0], m.bias.grad]
    assert all(float(g.abs().max()) < 1e-5 for g in rows), "no direction improves it"


# What a model sees.


@every_model
@every_kind
def test_nothing_is_seen_of_the_future(model: str, kind: str) -> None:
    m, x = made(model, kind), series(kind)
    found = m.conditionals(x, None)
    for t in range(T):
        other = x.clone()
        other[:, t:] = (x[:, t:] + 1) % V if kind == "tokens" else x[:, t:] + 100
        assert torch.equal(m.conditionals(other, None)[:, : t + 1], found[:, : t + 1]), t


@pytest.mark.parametrize(("model", "reach"), [("naive", T), ("order 1", 1), ("order 3", 3), ("markov", 1), ("gru", T)])
@every_kind
def test_how_far_back_a_model_looks(model: str, reach: int, kind: str) -> None:
    m, x = made(model, kind), series(kind)
    found, last = m.conditionals(x, None), T - 1
    for t in range(last):
        other = x.clone()
        other[:, t] = (x[:, t] + 1) % V if kind == "tokens" else x[:, t] + 1
        same = torch.equal(m.conditionals(other, None)[:, last], found[:, last])
        assert same == (t < last - reach), t


@every_model
@every_kind
@pytest.mark.parametrize("ragged", [False, True])
def test_step_by_step_as_all_at_once(model: str, kind: str, ragged: bool) -> None:
    m, x = made(model, kind), series(kind)
    lengths = torch.tensor([2, 0, T - 3, 1]) if ragged else torch.tensor([2] * B)
    start = x[:, : T - 3] if ragged else x[:, :2]
    state = m.begin(*m._given(start, lengths if ragged else None, empty=True))
    whole = m.conditionals(x, None)
    for k in range(3):
        at = lengths + k
        expected = whole[torch.arange(B), at]
        assert torch.allclose(m.following(state), expected, rtol=1e-10, atol=1e-12), k
        state = m.advance(state, x[torch.arange(B), at])


@every_model
@every_kind
def test_ragged_rows_are_as_alone(model: str, kind: str) -> None:
    m, x = made(model, kind), series(kind)
    lengths = torch.tensor([T, 3, 1, 0])
    if kind != "tokens":
        for b, n in enumerate(lengths):
            x[b, n:] = math.nan
    else:
        for b, n in enumerate(lengths):
            x[b, n:] = 99
    found = m.log_prob(x, lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = float(m.log_prob(x[b : b + 1, :n]).detach()) if n else 0.0
        assert float(found[b].detach()) == pytest.approx(alone, rel=1e-9)
    found.sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in m.parameters())


@every_kind
def test_no_series_is_too_short(kind: str) -> None:
    """Of one point, an order above it sees the learned start alone: with the same weight at the end, order 1's."""
    long, short, x = made("order 9", kind), made("order 1", kind), series(kind, 1)
    with torch.no_grad():
        for name, p in long.named_parameters():
            p.zero_()
            p[-1:] = short.get_parameter(name)[-1:]
            if name in ("bias", "log_scale"):
                p.copy_(short.get_parameter(name))
    assert torch.equal(long.log_prob(x), short.log_prob(x))


# Draws and forecasts.


@every_model
@every_kind
def test_draws(model: str, kind: str) -> None:
    m, x = made(model, kind), series(kind, 4)
    first, again = (m.generate(x, 3, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert first.shape == (B, 3, *x.shape[2:]) and torch.equal(first, again)
    assert first.dtype == x.dtype and (kind != "tokens" or bool(((first >= 0) & (first < V)).all()))
    assert m.generate(x, 0).shape == (B, 0, *x.shape[2:])
    assert m.generate(x[:, :0], 2).shape == (B, 2, *x.shape[2:])
    ragged = m.generate(x, 2, lengths=torch.tensor([4, 0, 1, 2]))
    assert ragged.shape == (B, 2, *x.shape[2:])


def test_draws_of_a_chain_have_its_frequencies() -> None:
    m = MarkovModel(vocabulary=2)
    table = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]])
    with torch.no_grad():
        m.weight.copy_(table.log()[None])
    drawn = m.generate(torch.zeros(400, 0, dtype=torch.long), 200, generator=torch.Generator().manual_seed(0))
    pairs = torch.bincount((drawn[:, :-1] * 2 + drawn[:, 1:]).flatten(), minlength=4).view(2, 2).float()
    found = pairs / pairs.sum(1, keepdim=True)
    spread = (0.25 / pairs.sum(1, keepdim=True)).sqrt()  # of a frequency, at most
    assert bool(((found - table[:2]).abs() < 5 * spread).all())


def test_a_forecast_of_order_1_against_theory() -> None:
    """x_t = b + a x_{t-1} + σ e: mean and variance k steps ahead in closed form."""
    a, b, sigma, steps, samples = 0.8, 0.3, 0.5, 6, 20000
    m = MarkovModel().double()
    with torch.no_grad():
        m.weight.fill_(a)
        m.bias.fill_(b)
        m.log_scale.fill_(math.log(sigma))
    x = torch.tensor([[5.0], [-2.0]], dtype=WIDE)
    found = m.forecast(x, steps, level=0.8, samples=samples, generator=torch.Generator().manual_seed(0))
    k = torch.arange(1, steps + 1, dtype=WIDE)
    mean = a**k * x + b * (1 - a**k) / (1 - a)
    spread = sigma * ((1 - a ** (2 * k)) / (1 - a**2)).sqrt()
    reach = 1.2815515655446004 * spread  # the normal's 90 % point
    assert bool(((found.mean - mean).abs() <= 5 * spread / samples**0.5).all())
    for got, want in ((found.low, mean - reach), (found.high, mean + reach)):
        assert bool(((got - want).abs() <= 12 * spread / samples**0.5).all())  # a quantile varies 1.8 times as much
    assert float(found.mean[0, 0]) == pytest.approx(b + a * 5), "the first is known exactly"


def test_a_forecast_of_vectors_and_of_ragged_rows() -> None:
    m, x = made("gru", "vectors"), series("vectors", 4)
    found = m.forecast(x, 3, samples=10)
    assert all(v.shape == (B, 3, D) for v in found) and bool((found.low <= found.high).all())
    ragged = made("order 3", "scalars").forecast(series("scalars"), 2, samples=10, lengths=torch.tensor([7, 0, 1, 2]))
    assert ragged.mean.shape == (B, 2)
    assert m.forecast(x, 0).mean.shape == (B, 0, D)


@every_model
@every_kind
def test_no_rows_and_no_steps(model: str, kind: str) -> None:
    """Draws of nothing have the shape and the dtype that draws have, which is the model's and not x's."""
    m, x = made(model, kind), series(kind, 4)
    x = x.to(torch.int32 if kind == "tokens" else torch.float32)
    expected = m.generate(x, 1).dtype
    for rows, steps in ((B, 0), (0, 2), (0, 0)):
        shape = (rows, steps, *x.shape[2:])
        drawn = m.generate(x[:rows], steps)
        assert drawn.shape == shape and drawn.dtype == expected
        if kind != "tokens":
            found = m.forecast(x[:rows], steps, samples=3)
            assert all(v.shape == shape and v.dtype == expected for v in found)


def test_no_steps_after_the_last_that_a_naive_model_knows() -> None:
    assert made("naive", "scalars").generate(series("scalars", T + 3), 0).shape == (B, 0)


# What a step costs.


@every_kind
def test_only_the_naive_models_step_grows(kind: str) -> None:
    for model in MODELS:
        costs = [made(model, kind).cost(t) for t in (1, 2, 5, 8)]
        if model == "naive":
            assert all(a.parameters < b.parameters for a, b in itertools.pairwise(costs))
            assert costs[3].multiply_adds - costs[2].multiply_adds == 3 * (costs[1].multiply_adds)
        else:
            assert len(set(costs)) == 1
    naive = made("naive", kind)
    shared = naive.embedding.weight.numel() if kind == "tokens" else 0
    whole = sum(p.numel() for p in naive.parameters())
    assert sum(naive.cost(t).parameters for t in range(1, T + 4)) + shared == whole


# Bad input.


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AutoregressiveModel(0), "order must be 1 or more, got 0"),
        (lambda: AutoregressiveModel(2, hidden=0), "hidden must be 1 or more, got 0"),
        (lambda: NaiveSequenceModel(0), "steps must be 1 or more, got 0"),
        (lambda: MarkovModel(features=2, vocabulary=3), "give features or vocabulary, not both"),
        (lambda: MarkovModel(vocabulary=0), "vocabulary must be a positive number of tokens, got 0"),
        (lambda: MarkovModel(features=0), "features must be a positive number"),
        (lambda: LatentAutoregressiveModel(rnnkit.GRU(1, 2, bidirectional=True)), "must not be bidirectional"),
        (lambda: LatentAutoregressiveModel(rnnkit.GRU(3, 2), features=2), "must read 2 features.*got input_size=3"),
        (lambda: MarkovModel.from_counts(torch.zeros(1, 3).long(), 2, smoothing=-1), "smoothing must be 0 or more"),
    ],
)
def test_bad_models(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_layers_of_other_kinds() -> None:
    with pytest.raises(TypeError, match=r"got GRU; rnnkit\.convert\(layer\)"):
        LatentAutoregressiveModel(torch.nn.GRU(1, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got Linear$"):
        LatentAutoregressiveModel(torch.nn.Linear(1, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "x", "said"),
    [
        ("scalars", torch.zeros(2, 0), "needs at least 1 point"),
        ("scalars", torch.zeros(2, 3, 1), r"x must be \[B, T\], got \[2, 3, 1\]"),
        ("vectors", torch.zeros(2, 3, 2), r"x must be \[B, T, 3\], got \[2, 3, 2\]"),
        ("scalars", torch.tensor([[0.0, 1.0], [2.0, math.nan]]), r"got nan at row 1, step 1 \(1 in all\)"),
        ("scalars", torch.tensor([[0.0, math.inf]]), "got inf at row 0, step 1"),
        ("tokens", torch.tensor([[0, 1], [2, 5]]), "between 0 and 4, got 5 at row 1, step 1"),
        ("tokens", torch.tensor([[-1, 1]]), "got -1 at row 0, step 0"),
    ],
)
def test_bad_series(kind: str, x: Tensor, said: str) -> None:
    m = made("order 1", kind)
    for call in (m, m.log_prob):
        with pytest.raises(ValueError, match=said):
            call(x)


def test_other_bad_input() -> None:
    scalars, tokens = made("gru", "scalars"), made("gru", "tokens")
    with pytest.raises(TypeError, match=r"real numbers \[B, T\], got torch\.int64; a model of tokens has vocabulary"):
        scalars(torch.zeros(1, 2).long())
    with pytest.raises(TypeError, match=r"whole numbers.*got torch\.float32; a model of reals has no vocabulary"):
        tokens(torch.zeros(1, 2))
    with pytest.raises(TypeError, match="x must be a Tensor, got list"):
        tokens([[1, 2]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tokens have no mean"):
        tokens.forecast(torch.zeros(1, 2).long(), 2)
    x = series("scalars")
    for steps in (-1, 1.5):
        with pytest.raises(ValueError, match=f"steps must be 0 or more, got {steps}"):
            scalars.generate(x, steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 90"):
        scalars.forecast(x, 1, level=90)
    with pytest.raises(ValueError, match="samples must be a positive number, got 0"):
        scalars.forecast(x, 1, samples=0)
    with pytest.raises(ValueError, match=r"lengths must lie between 0 and T = 7, got \[8, 0, 0, 0\]"):
        scalars(x, torch.tensor([8, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"lengths must be whole numbers \[B\] = \[4\], got torch.int64 \[3\]"):
        scalars(x, torch.tensor([1, 2, 3]))
    naive = made("naive", "scalars")
    for call in (lambda: naive(series("scalars", T + 4)), lambda: naive.generate(x, 4)):
        with pytest.raises(ValueError, match=f"parameters for {T + 3} steps, and step {T + 4} is asked for"):
            call()
