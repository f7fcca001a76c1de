"""How a GPU backend chooses its kernels: one `select_config` each, of one form, which `explain` prints."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from rnnkit.backends import BY_NAME, LayerInputs, LayerSpec, gpu
from rnnkit.backends.cuda import backend as cuda
from rnnkit.backends.triton import backend as triton
from rnnkit.cells import CELLS

SPEC = LayerSpec("lstm", "cuda", torch.bfloat16, 100, 16, 64, 128, 0, True, device_index=0)
BACKENDS = {"cuda": cuda, "triton": triton}


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "machine", cuda.machine._replace(capability=lambda index: 90))
    monkeypatch.setattr(triton, "chip", lambda index=None: 90)


@pytest.fixture(params=BACKENDS)
def select(request: pytest.FixtureRequest) -> Callable[[LayerSpec], gpu.KernelConfig | gpu.Reason]:
    return BY_NAME[request.param].select_config  # type: ignore[attr-defined]


def test_each_side_has_a_kernel_that_says_how_and_why(select: Callable[..., gpu.KernelConfig]) -> None:
    inference, training = select(SPEC), select(SPEC._replace(train=True))
    assert inference.backward is None and training.backward is not None
    for config in (inference.forward, training.forward, training.backward):
        assert config.regime in ("cta", "persistent") and "the whole sequence" in config.reason
    assert str(training) == str(inference) == f"{inference.forward.regime}: {inference.forward.reason}"


def test_what_no_table_holds_goes_step_by_step(select: Callable[..., gpu.KernelConfig]) -> None:
    config = select(SPEC._replace(hidden_size=2000, train=True))
    assert config.forward.regime == "step" and "fit" in config.forward.reason


def test_sides_that_differ_are_both_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 128 exact float32 units an RNN's backward alone fits."""
    monkeypatch.setattr(triton, "kind", lambda dtype: "ieee")
    config = BY_NAME["triton"].select_config(  # type: ignore[attr-defined]
        SPEC._replace(cell="rnn_tanh", dtype=torch.float32, train=True)
    )
    forward, backward = str(config).split("; ")
    assert (config.forward.regime, config.backward.regime) == ("step", "persistent")
    assert forward.startswith("forward step: ") and backward.startswith("backward persistent: ")


@pytest.mark.parametrize(("name", "regime"), [("cuda", "cta"), ("triton", "persistent")])
def test_a_named_regime_that_cannot_is_a_reason(name: str, regime: str) -> None:
    large = SPEC._replace(hidden_size=2000)
    with BACKENDS[name].regimes.alone(regime):
        found = BY_NAME[name].select_config(large)  # type: ignore[attr-defined]
        assert isinstance(found, gpu.Reason) and found.startswith(f"RNNKIT_{name.upper()}_REGIME={regime}: ")
        assert isinstance(BY_NAME[name].select_config(SPEC), gpu.KernelConfig)  # type: ignore[attr-defined]
        x, h, w_ih, w_hh = (
            torch.empty(size, device="meta") for size in ((1, 1, 3), (1, 2000), (8000, 3), (8000, 2000))
        )
        with pytest.raises(NotImplementedError, match=f"^{re.escape(found)}$"):  # and a scan raises it
            t = LayerInputs(x.bfloat16(), h, h, w_ih, w_hh, None, None)
            BY_NAME[name].config(CELLS["lstm"], t, train=False)  # type: ignore[attr-defined]


def test_an_unknown_cell_is_a_reason(select: Callable[..., gpu.Reason], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CELLS, "sixth", replace(CELLS["lstm"], name="sixth"))
    found = select(SPEC._replace(cell="sixth"))
    assert isinstance(found, gpu.Reason) and found == "has no kernel for the cell 'sixth'"


@pytest.mark.parametrize("name", BACKENDS)
def test_explain_prints_it(name: str) -> None:
    backend = BY_NAME[name]
    assert backend.detail(SPEC) == str(backend.select_config(SPEC))  # type: ignore[attr-defined]
