"""The tests of generated kernels can fail: an error planted in the text, or in what it calls, turns them red."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import test_generated
from test_generated import HOW, MASKED, SMALL, close
from test_triton_mutations import Mutation, kernels, mutate  # noqa: F401 (a fixture)

from rnnkit.backends.triton import program as triton
from rnnkit.custom import triton_source

LONGER = {**MASKED, "steps": 4, "rows": 5}
CALLED = [  # in kernels/pointwise.py: right, wrong, the cell that shows it, how
    ("row_sum", "tl.where(inside, x, 0.0)", "x", "LayerNormLSTM", SMALL),
    ("carry", "tl.where(live, new, old)", "new", "LSTM", LONGER),
    ("carry", "more != 0", "more == 0", "LSTM", LONGER),
    ("carry", "t + 1 - 2 * reverse", "t", "GRU", LONGER),
    ("replaced", "tl.where(at, read", "tl.where(~at, read", "GRU", LONGER),
    ("previous", "t - 1 + 2 * reverse", "t - 1", "GRU", {**LONGER, "reverse": True}),
    ("previous", "before >= length", "before > length", "GRU", {**LONGER, "reverse": True}),
    ("previous", "if reset is not None:", "if False:", "GRU", LONGER),
    ("give_back", "tl.where(cut, 0.0, before)", "before", "GRU", LONGER),
    ("give_back", "if reset is not None:", "if False:", "GRU", LONGER),
    ("give_back", "tl.where(good, new, 0.0), old", "new, old * 0", "GRU", LONGER),
    ("busy", "!= 0", "== 0", "LSTM", LONGER),
    ("product_at", "block * head", "0 * head", "LSTM", HOW["heads"]),
    ("product_at", "unit % head", "unit // HEADS", "LSTM", HOW["heads"]),
    ("read_product", "if bias is not None:", "if False:", "GRU", SMALL),
]
WRITTEN = [  # in the generated text
    ("carry(s0, short0, new0, old0, r0", "carry(s0, short0, new0, old0, r1", "LSTM", LONGER),
    ("carry(s1, short1, new1", "carry(s1, short1, new0", "LSTM", SMALL),
    (
        "write(w0, at * 5, unit, valid, tl.where(good, v0",
        "write(w0, at * 5, unit, valid, tl.where(good, v1",
        "LSTM",
        SMALL,
    ),
    ("read(du, row * 15 + 0, unit, valid, F) + ", "", "PeepholeLSTM", SMALL),
    ("old1 = read(d1", "old1 = read(d0", "LSTM", LONGER),
    ("length = length_of(lengths, row, total, B)", "length = length_of(None, row, total, B)", "LSTM", LONGER),
    ("read(gx, at * 20 + 5,", "read(gx, at * 20 + 0,", "LSTM", SMALL),
    ("read(saved, at * 20 + 0,", "read(saved, at * 20 + 5,", "LSTM", SMALL),
    ("came0 += read(g0", "came0 -= read(g0", "GRU", SMALL),
]


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    triton.kernels_of.cache_clear()
    yield
    triton.kernels_of.cache_clear()


@pytest.mark.parametrize("error", CALLED, ids=lambda e: f"{e[0]}-{e[2]}")
def test_red_where_what_is_called_is_wrong(error: tuple, kernels: Path) -> None:  # noqa: F811
    where, right, wrong, name, how = error
    mutate(kernels, Mutation(f"pointwise.{where}", right, wrong, name, "step"))
    with pytest.raises(AssertionError, match="off by"):
        close(name, how)


@pytest.mark.parametrize("error", WRITTEN, ids=lambda e: e[1])
def test_red_where_the_text_is_wrong(error: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, name, how = error
    made = triton_source.source_of

    def planted(program: object) -> triton_source.Source:
        source = made(program)  # type: ignore[arg-type]
        assert right in source.text, source.text
        source.text = source.text.replace(right, wrong)
        return source

    monkeypatch.setattr(triton, "source_of", planted)
    with pytest.raises(AssertionError, match="off by"):
        close(name, how)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LayerNormLSTM", "PeepholeLSTM"])
def test_silent_without_an_error(name: str, kernels: Path) -> None:  # noqa: F811
    close(name, LONGER if name != "LayerNormLSTM" else SMALL)
    assert test_generated.triton is triton
