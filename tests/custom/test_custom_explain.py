"""What `explain` and `info` say of custom layers: who runs them, the program in numbers, a refused step's reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rnnkit
from rnnkit.backends.cpu import extension
from rnnkit.cli import info
from rnnkit.custom import choose, facts
from rnnkit.custom.check import program_of
from rnnkit.custom.declare import spec_of
from rnnkit.custom.facts import CustomChoice
from rnnkit.custom.program import OPS, counts
from rnnkit.variants import LayerNormLSTM, LiGRU, PeepholeLSTM

NATIVE = pytest.mark.skipif(extension.native is None, reason="the engine cannot run here")
X = torch.randn(3, 2, 5)


class Sorted(rnnkit.Cell):
    gates, states = 1, ("h",)

    @staticmethod
    def step(a: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.cumsum(a, -1))


class Mean(rnnkit.Cell):
    """Seven instructions at most, one sum over a row, one product; the mean is not saved: a is."""

    gates, states = 1, ("h",)

    @staticmethod
    def step(a: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(a - a.mean(-1, keepdim=True))


def only(model: nn.Module, *args: Any, **kwargs: Any) -> CustomChoice:
    (found,) = rnnkit.explain(model, *args, **kwargs).choices
    assert isinstance(found, CustomChoice)
    return found


def test_a_step_in_numbers() -> None:
    program = program_of(spec_of(Mean), 7).program
    assert program is not None
    forward, backward = counts(program, 0)
    assert (forward.products, forward.row_sums, forward.barriers) == (1, 1, 2) and 3 <= forward.instructions <= 7
    assert (backward.products, backward.row_sums) == (1, 1), "of the gradient's sum, and to the state before"
    more, _ = counts(program_of(spec_of(LayerNormLSTM), 7).program, 0)  # type: ignore[arg-type]
    assert more.instructions > forward.instructions and more.row_sums > 1


@NATIVE
def test_a_custom_layer_is_explained() -> None:
    found = only(rnnkit.Custom(PeepholeLSTM, 5, 7), X)
    assert (found.backend, found.asked, found.refused, found.train) == ("cpu", "auto", None, True)
    assert (found.steps, found.batch, found.input_size, found.hidden_size) == (3, 2, 5, 7)
    assert found.program is not None and found.program.forward.products == 1
    assert found.program.saved_bytes == 2 * 4 * (7 * found.program.saved_blocks + found.program.saved_row_values)
    assert 0 < found.check_seconds == program_of(spec_of(PeepholeLSTM), 7).seconds
    assert found.kernel_check_seconds > 0
    assert set(found.reasons) == {"triton", "reference", "torch", "cuda"} and all(found.reasons.values())
    assert "auto asks cpu first" in found.reasons["reference"][0]
    text = str(rnnkit.explain(rnnkit.Custom(PeepholeLSTM, 5, 7), X))
    for words in (
        "→ cpu",
        "PeepholeLSTM T=3 B=2 I=5 H=7 float32 on cpu",
        "1 product",
        "2 barriers",
        "bytes a step",
        "passed in",
        "that of the kernel in",
    ):
        assert words in text
    by_reference = only(rnnkit.Custom(PeepholeLSTM, 5, 7, backend="reference"), X)
    assert by_reference.kernel_check_seconds == 0 and by_reference.check_seconds == found.check_seconds
    assert "of the kernel" not in "\n".join(by_reference.lines())
    assert f"backward {found.program.backward.instructions} instructions" in text
    fewer = only(rnnkit.Custom(PeepholeLSTM, 5, 7, recompute=True), X).program
    assert fewer is not None and fewer.saved_blocks < found.program.saved_blocks
    half = only(rnnkit.Custom(PeepholeLSTM, 5, 7, dtype=torch.bfloat16), X.bfloat16()).program
    more = 3 * 2 * 7 * 4  # the first state, which y rounds
    assert half is not None and len(X) * half.saved_bytes == len(X) * found.program.saved_bytes + more
    wide = only(rnnkit.Custom(PeepholeLSTM, 5, 7, dtype=torch.float64), X.double()).program
    assert wide is not None and wide.saved_bytes == 2 * found.program.saved_bytes


@NATIVE
@pytest.mark.parametrize("cell", [PeepholeLSTM, LayerNormLSTM])
def test_what_is_said_to_be_saved_is_saved(cell: type[rnnkit.Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = rnnkit.Custom(cell, 5, 8)
    found = only(layer, X)
    kept: list[torch.Tensor] = []
    backend = choose.backend_named("cpu")
    forward = backend.forward

    def spied(*args: Any) -> Any:
        outputs, saved = forward(*args)
        kept.extend(saved)
        return outputs, saved

    monkeypatch.setattr(backend, "forward", spied)
    layer(X)
    assert found.program is not None and sum(v.nbytes for v in kept) == len(X) * found.program.saved_bytes


def test_a_refused_step_has_its_reason() -> None:
    with pytest.warns(RuntimeWarning, match="cumsum"):
        layer = rnnkit.Custom(Sorted, 5, 7)
        found = only(layer, X)
    assert (found.backend, found.program) == ("reference", None) and found.refused is not None
    assert "cumsum" in found.refused and "write another form" in found.refused
    said = str(rnnkit.explain(layer, X))
    assert "has no program: cumsum" in said and "→ reference" in said and "passed" not in said
    if extension.native is not None:
        assert found.reasons["cpu"] == [found.refused]


def test_layers_directions_and_other_modules_stand_in_order() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = rnnkit.GRU(5, 6, backend="reference")
            self.second = rnnkit.Custom(LiGRU, 6, 7, 2, bidirectional=True, backend="reference")
            self.third = rnnkit.LSTM(14, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.second(self.first(x)[0])[0]
            return self.third(y)[0]

    model = Model()
    before = model.second.norm_l0.running_mean.clone()
    explained = rnnkit.explain(model, X)
    second = [choice for choice in explained.choices if isinstance(choice, CustomChoice)]
    assert [choice.name for choice in explained.choices] == ["first", *["second"] * 4, "third"]
    assert [(c.layer, c.reverse) for c in second] == [(0, False), (0, True), (1, False), (1, True)]
    assert all(c.projected and c.input_size == 14 and c.asked == c.backend == "reference" for c in second)
    assert second[0].reasons["cpu"] == ["can run it; reference was asked for"] or extension.native is None
    assert torch.equal(model.second.norm_l0.running_mean, before), "buffers are put back"
    layers = explained.to_dict()["layers"]
    assert layers[1]["problem"]["dtype"] == "float32" and layers[1]["program"]["forward"]["products"] == 1
    assert set(layers[0]) >= {"name", "layer", "problem", "asked", "backend", "reasons"} <= set(layers[1])
    assert "second, layer 1, reverse: LiGRU T=3 B=2 gx=14 H=7" in str(explained)


def test_nobody_is_told_when_nobody_records() -> None:
    layer = rnnkit.Custom(PeepholeLSTM, 5, 7, backend="reference")
    with facts.record() as outside:
        with facts.record() as inside, torch.no_grad():
            layer(X)
        assert len(inside) == 1 and not inside[0].train and not outside
        layer(X)
    assert len(outside) == 1
    layer(X)
    assert len(outside) == 1


def test_info_names_instructions_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = info.gather()
    (line,) = [line for line in info.table(found).splitlines() if line.startswith("custom cells")]
    kernels = found["custom_cells"]["kernels"]
    assert set(kernels) == {"cpu", "cuda"}
    if extension.native is not None:
        assert found["custom_cells"]["instructions"] == len(OPS) and f"{len(OPS)} instructions" in line
        assert kernels["cpu"]["reason"] is None and "on cpu by backend cpu" in line
    monkeypatch.setattr(extension, "native", None)
    found = info.gather()["custom_cells"]
    assert found["instructions"] == 0 and "torch 2.11" in found["kernels"]["cpu"]["reason"]
    assert "not on cpu: " in info.custom_cells(found)
