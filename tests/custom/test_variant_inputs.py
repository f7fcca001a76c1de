"""What variants do outside of the step: LiGRU's batch norm over ragged rows, GRU-D's decays, sLSTM at its limits."""

from __future__ import annotations

import math

import pytest
import torch
from cell_loop import BACKENDS, F64

import rnnkit
from rnnkit import variants
from rnnkit.variants.gru import SequenceBatchNorm


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("ragged", [True, False])
def test_batch_norm_is_torchs_over_the_steps_that_there_are(momentum: float | None, ragged: bool) -> None:
    torch.manual_seed(0)
    mine, theirs = (kind(6, momentum=momentum, dtype=F64) for kind in (SequenceBatchNorm, torch.nn.BatchNorm1d))
    lengths = torch.tensor([4, 0, 5] if ragged else [5, 5, 5])
    inside = torch.arange(5)[:, None] < lengths
    for _ in range(3):
        x = torch.randn(5, 3, 6, dtype=F64)
        x[~inside] = math.nan
        found, expected = mine(x, lengths if ragged else None), theirs(x[inside])
        torch.testing.assert_close(found[inside], expected, rtol=1e-12, atol=1e-12)
    for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values()):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(mine.eval()(x, lengths)[inside], theirs.eval()(x[inside]))


def test_ligru_in_eval_uses_what_it_has_seen() -> None:
    torch.manual_seed(0)
    layer = rnnkit.Custom(variants.LiGRU, 4, 6, bias=False)
    x = torch.randn(5, 3, 4)
    assert set(layer.state_dict()) >= {"norm_l0.weight", "norm_l0.running_mean"}
    for _ in range(200):
        trained = layer(x)[0]
    layer.eval()
    torch.testing.assert_close(layer(x)[0], trained, rtol=0.1, atol=0.1)
    torch.testing.assert_close(layer(x[:, :1])[0], layer(x)[0][:, :1])  # a row by itself gives what it gave in company


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [80.0, 1000.0])
def test_slstm_at_its_limits(backend: str, dtype: torch.dtype, size: float) -> None:
    """Every combination of -80, 0 and 80, and of -1000, 0 and 1000, whose exponential is infinite, in i, f and z:
    finite, and as the paper's ratio by logarithms."""
    corners = torch.cartesian_prod(*[torch.tensor([-size, 0.0, size])] * 3).to(dtype)  # [27, 3]
    layer = rnnkit.Custom(variants.SLSTM, 3, 2, dtype=dtype, bias=False, backend=backend)
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
        layer.weight_ih_l0.copy_(torch.eye(4, 3).repeat_interleave(2, 0))  # o is 0, the two units are equal
    order = torch.stack([torch.roll(torch.arange(27), k) for k in range(4)])
    x = corners[order].requires_grad_()  # [T = 4, 27, 3]: every corner after another
    y, states = layer(x)
    (y.sum() + sum(v.sum() for v in states)).backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and all(v.isfinite().all() for v in states)
    near = 2e-6 if size == 80 else 2e-4  # of m ≈ 1000 float32 has three digits behind the point
    i, f, z = x.detach().double().unbind(-1)
    for t in range(4):  # h = σ(o) Σ w_k tanh(z_k) / Σ w_k, log w_k = i_k + Σ log σ(f) after k
        kept = [torch.nn.functional.logsigmoid(f[k + 1 : t + 1]).sum(0) for k in range(t + 1)]
        log_w = i[: t + 1] + torch.stack(kept)
        expected = 0.5 * (torch.softmax(log_w, 0) * torch.tanh(z[: t + 1])).sum(0)
        torch.testing.assert_close(y[t].double(), expected[:, None].expand(27, 2), rtol=near, atol=near)


def test_slstm_begins_anew_after_a_reset() -> None:
    torch.manual_seed(0)
    layer = rnnkit.Custom(variants.SLSTM, 4, 6, heads=2, dtype=F64)
    x = torch.randn(6, 2, 4, dtype=F64)
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3, 1] = True
    torch.testing.assert_close(layer(x, reset=reset)[0][3:, 1], layer(x[3:, 1:])[0][:, 0])


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_inputs_of_grud_are_the_papers(batch_first: bool) -> None:
    """One number at a time; what is not observed may be NaN."""
    torch.manual_seed(0)
    steps, rows, width = 6, 3, 2
    times, observed = torch.rand(steps, rows, dtype=F64).cumsum(0), torch.rand(steps, rows, width) < 0.5
    x = torch.randn(steps, rows, width, dtype=F64)
    reset = torch.zeros(steps, rows, dtype=torch.bool)
    reset[3, 1] = True
    made = variants.GRUDInputs(width, 5, mean=torch.tensor([0.3, -0.2]), batch_first=batch_first, dtype=F64)
    gaps, features = torch.zeros(steps, rows, width, dtype=F64), torch.zeros(steps, rows, 2 * width, dtype=F64)
    with torch.no_grad():
        made.bias_x.fill_(0.1)
        for b in range(rows):
            for d in range(width):
                last = made.mean[d]
                for t in range(steps):
                    if t:
                        gaps[t, b, d] = times[t, b] - times[t - 1, b] + (not observed[t - 1, b, d]) * gaps[t - 1, b, d]
                    if reset[t, b]:
                        last = made.mean[d]
                    if observed[t, b, d]:
                        last = features[t, b, d] = x[t, b, d]
                    else:
                        decay = math.exp(-max(0.0, made.weight_x[d] * gaps[t, b, d] + made.bias_x[d]))
                        features[t, b, d] = decay * last + (1 - decay) * made.mean[d]
                    features[t, b, width + d] = float(observed[t, b, d])
        decays = torch.exp(-torch.relu(gaps @ made.hidden.weight.T + made.hidden.bias))
    given = [x.masked_fill(~observed, math.nan), observed, times, reset]
    if batch_first:
        given = [v.transpose(0, 1) for v in given]
        gaps, features, decays = (v.transpose(0, 1) for v in (gaps, features, decays))
    value, seen, when, again = given
    found = variants.time_gaps(when, seen, batch_first)
    torch.testing.assert_close(found, gaps)
    torch.testing.assert_close(made(value, seen, found, again), (features, decays))
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(made, {"weight_x": w}, tuple([
        value, seen, found])), made.weight_x.detach().requires_grad_())  # fmt: skip


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_reset_begins_the_gaps_anew(batch_first: bool) -> None:
    """By a loop over each sequence alone: the time since its first step, or since a variable was seen in it."""
    torch.manual_seed(4)
    steps, rows, width = 9, 3, 4
    times, observed = torch.rand(steps, rows).cumsum(0), torch.rand(steps, rows, width) < 0.4
    reset = torch.rand(steps, rows) < 0.3
    reset[0, 0] = reset[5, 0] = reset[6, 0] = True
    reset[:, 2] = False
    wanted = torch.zeros(steps, rows, width)
    for b in range(rows):
        for d in range(width):
            since = times[0, b]
            for t in range(steps):
                if reset[t, b]:
                    since = times[t, b]
                wanted[t, b, d] = times[t, b] - since
                if observed[t, b, d]:
                    since = times[t, b]
    given = [v.transpose(0, 1) if batch_first else v for v in (times, observed, reset, wanted)]
    found = variants.time_gaps(*given[:2], batch_first, reset=given[2])
    torch.testing.assert_close(found, given[3])
    assert not torch.equal(found, variants.time_gaps(*given[:2], batch_first))
    none = torch.zeros_like(given[2])
    assert torch.equal(
        variants.time_gaps(*given[:2], batch_first, reset=none), variants.time_gaps(*given[:2], batch_first)
    )


def test_grud_with_resets_is_its_sequences_apart() -> None:
    """Two sequences in one row give what they give in two."""
    torch.manual_seed(5)
    made, layer = variants.GRUDInputs(3, 8), rnnkit.Custom(variants.GRUD, 6, 8)
    x, observed, times = torch.randn(7, 1, 3), torch.rand(7, 1, 3) < 0.5, torch.rand(7, 1).cumsum(0)
    reset = torch.zeros(7, 1, dtype=torch.bool)
    reset[4] = True
    gaps = variants.time_gaps(times, observed, reset=reset)
    features, decay = made(x, observed, gaps, reset)
    y, _ = layer(features, decay=decay, reset=reset)
    for part in (slice(0, 4), slice(4, 7)):
        features, decay = made(x[part], observed[part], variants.time_gaps(times[part], observed[part]))
        torch.testing.assert_close(layer(features, decay=decay)[0], y[part])


def test_grud_with_gaps_trains() -> None:
    torch.manual_seed(0)
    made, layer = variants.GRUDInputs(3, 8), rnnkit.Custom(variants.GRUD, 6, 8)
    x, observed = torch.randn(7, 2, 3), torch.rand(7, 2, 3) < 0.6
    features, decay = made(x, observed, variants.time_gaps(torch.arange(7.0)[:, None].expand(7, 2), observed))
    layer(features, decay=decay, lengths=torch.tensor([7, 4]))[0].square().sum().backward()
    assert all(v.grad is not None and v.grad.abs().sum() > 0 for v in [*layer.parameters(), made.hidden.weight])


def test_what_does_not_fit_grud_is_said() -> None:
    x = torch.zeros(4, 2, 3)
    with pytest.raises(ValueError, match=r"gaps must have the shape of x, \[4, 2, 3\], got \[4, 2, 1\]"):
        variants.GRUDInputs(3, 8)(x, x.bool(), x[..., :1])
    with pytest.raises(ValueError, match=r"reset must be \[T, B\] = \[4, 2\], as observed is, got \[2, 4\]"):
        variants.time_gaps(x[..., 0], x.bool(), reset=x[..., 0].T.bool())
    with pytest.raises(ValueError, match=r"reset must be \[B, T\] = \[4, 2\], as observed is, got \[4, 2, 3\]"):
        variants.time_gaps(x[..., 0], x.bool(), batch_first=True, reset=x.bool())
    with pytest.raises(ValueError, match=r"mean must be \[I\] = \[3\]"):
        variants.GRUDInputs(3, 8, mean=torch.zeros(2))
    with pytest.raises(TypeError, match="GRUD needs decay at every call"):
        rnnkit.Custom(variants.GRUD, 6, 8)(torch.zeros(4, 2, 6))


def test_attention_0_leaves_the_state() -> None:
    torch.manual_seed(0)
    layer = rnnkit.Custom(variants.AUGRU, 4, 6, batch_first=True)
    attention = torch.rand(2, 5)
    attention[:, 3] = 0
    y, _ = layer(torch.randn(2, 5, 4), attention=attention)
    assert torch.equal(y[:, 3], y[:, 2]) and not torch.equal(y[:, 4], y[:, 3])
