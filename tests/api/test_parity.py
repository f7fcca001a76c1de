"""The same numbers as torch.nn: outputs, final states and the gradient of every input, state and parameter, for every
structure of a layer and every layout, dtype and backend, within the budget of `support.complaints`.

One test holds many configurations, and reports every one that is off.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    CELLS,
    DTYPES,
    LAYOUTS,
    SIZES,
    Config,
    Values,
    backends_for,
    by_lengths,
    by_reset,
    complaints,
    configs,
    flat,
    gradients,
    in_two,
    named,
    ours,
    parity,
)
from torch import Tensor, nn

KINDS = [(cell, False) for cell in CELLS] + [("lstm", True)]
DTYPE_NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
kinds = pytest.mark.parametrize(("cell", "proj"), KINDS, ids=[f"{c}-proj" if p else c for c, p in KINDS])


@kinds
@dtypes
def test_layers(cell: str, proj: bool, dtype: torch.dtype) -> None:
    # 9 has no factor in common with the numbers of choices, so each choice is met.
    every = list(configs(cell=cell, proj=proj, dtype=dtype))[::9]
    assert [text for config in every for text in parity(config)] == []


@pytest.mark.long
@kinds
@dtypes
def test_all_other_layers(cell: str, proj: bool, dtype: torch.dtype) -> None:
    every = [config for k, config in enumerate(configs(cell=cell, proj=proj, dtype=dtype)) if k % 9]
    assert [text for config in every for text in parity(config)] == []


@kinds
@dtypes
def test_lengths_are_packing(cell: str, proj: bool, dtype: torch.dtype) -> None:
    """`lengths` on a padded batch gives what torch.nn gives on the packed one."""
    found = []
    for layers, bidirectional, layout in itertools.product((1, 2), (False, True), ("packed", "packed_unsorted")):
        config = Config(cell, layers, bidirectional, proj, layout=layout, dtype=dtype, size=(5, 4, 3, 6))
        found += parity(config, how=by_lengths)
    assert found == []


@kinds
@dtypes
def test_a_reset_is_a_new_start(cell: str, proj: bool, dtype: torch.dtype) -> None:
    """A reset of all rows at one step gives what torch.nn gives on the two parts one after the other."""
    found = []
    for layers, hx, bias in itertools.product((1, 2), (False, True), (False, True)):
        config = Config(cell, layers, False, proj, bias, hx=hx, dtype=dtype, size=(6, 2, 3, 4))
        found += parity(config, how=by_reset, torch_how=in_two)
    assert found == []


drawn = st.builds(
    Config,
    cell=st.sampled_from(CELLS),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    hx=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    size=st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 20), st.integers(2, 33)),
    through=st.sampled_from(((0, 1, 2), (0,), (1,), (0, 1))),
    seed=st.integers(0, 10_000),
)


@settings(max_examples=150)
@given(config=drawn, proj=st.booleans())
def test_any_layer(config: Config, proj: bool) -> None:
    assert parity(replace(config, proj=proj and config.cell == "lstm")) == []


@pytest.mark.parametrize("cell", CELLS)
def test_wide_and_long(cell: str) -> None:
    """Sizes beyond one vector register and one cache line, with remainders, and a sequence that is not tiny."""
    sizes = ((33, 2, 17, 19), (3, 17, 33, 65), (2, 1, 130, 67))
    every = [Config(cell, 2, True, size=size, layout=layout) for size in sizes for layout in ("batch_first", "packed")]
    assert [text for config in every for text in parity(config)] == []


CELL_MODULES = [(nn.RNNCell, {"nonlinearity": "tanh"}), (nn.RNNCell, {"nonlinearity": "relu"})]
CELL_MODULES += [(nn.LSTMCell, {}), (nn.GRUCell, {})]


def step(module: nn.Module, arguments: list[Tensor], dtype: torch.dtype) -> Values:
    """What one call of a cell gives, and every gradient."""
    module = module.to(dtype)
    x, *state = leaves = [v.to(dtype).requires_grad_() for v in arguments]
    hx: Any = None if not state else tuple(state) if "LSTM" in type(module).__name__ else state[0]
    outputs = flat(module(x, hx))
    every = dict(zip(("input", "h", "c"), leaves, strict=False)) | dict(module.named_parameters())
    return named([v.detach() for v in outputs]) | gradients(outputs, every)


@dtypes
@pytest.mark.parametrize(("cls", "extra"), CELL_MODULES, ids=["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_cells(cls: type[nn.Module], extra: dict[str, Any], dtype: torch.dtype) -> None:
    found = []
    narrow = torch.float32 if dtype == torch.float64 else dtype
    for (_, rows, features, hidden), bias, hx, batched in itertools.product(
        (s for s in SIZES if s[3] > 1), (True, False), (True, False), (True, False)
    ):
        reference = cls(features, hidden, bias, **extra).to(narrow)
        lead = (rows,) if batched else ()
        arguments = [torch.randn(*lead, features, dtype=narrow)]
        states = 2 if cls is nn.LSTMCell else 1
        arguments += [torch.randn(*lead, hidden, dtype=narrow) for _ in range(states if hx else 0)]
        torch_gave, truth = step(reference, arguments, narrow), step(reference, arguments, torch.float64)
        twin = ours(reference).to(dtype)
        zeros = None if not hx else tuple(v.to(dtype) for v in arguments[1:])
        for backend in backends_for(twin, arguments[0].to(dtype), zeros if zeros is None or states == 2 else zeros[0]):
            twin.backend = backend
            for text in complaints(step(twin, arguments, dtype), torch_gave, truth, dtype):
                found.append(f"{backend}: {text} in {cls.__name__}({features}, {hidden}), {bias=} {hx=} {batched=}")
    assert found == []
