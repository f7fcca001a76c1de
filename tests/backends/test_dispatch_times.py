"""The order in which `auto` asks the backends: read from recorded rows, nearest shape first, never under compile, or
by a rule where no row says anything of a layer.

How the rows come about is in tests/bench/test_speed_report.py and tests/apps/test_tune.py, the user's own table in
test_user_times.py.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rnnkit
from rnnkit.backends import (
    BACKENDS,
    BY_NAME,
    LayerSpec,
    choice_facts,
    dispatch_times,
    preference,
    processor,
    select,
    select_backend,
)
from rnnkit.backends.cpu import extension
from rnnkit.benchmarks.dispatch.record import LIMITS
from rnnkit.tune.measure import DTYPES

PLAIN = LayerSpec(
    "gru", "cpu", torch.float32, 100, 32, 256, 256, 0, True, False, False, False, False, False, False, True
)


def test_the_fastest_first_and_the_tables_order_in_a_tie() -> None:
    assert dispatch_times.fastest_first({"cpu": 3.0, "torch": 2.0, "reference": 1.0}) == ("reference", "torch", "cpu")
    assert dispatch_times.fastest_first({"cpu": 1.02, "torch": 1.0, "reference": 9.0}) == ("cpu", "torch", "reference")
    assert dispatch_times.fastest_first({"cpu": 1.04, "torch": 1.0, "reference": 9.0}) == ("torch", "cpu", "reference")
    assert dispatch_times.fastest_first({"cpu": 1.005, "torch": 1.0}) == ("cpu", "torch")


def test_no_backend_passes_another_for_less_than_the_noise() -> None:
    for cost in itertools.product((1.0, 1.005, 1.02, 1.029, 1.031, 1.05, 2.0), repeat=3):
        given = dict(zip(("cpu", "torch", "reference"), cost, strict=True))
        order = dispatch_times.fastest_first(given)
        assert sorted(order) == sorted(given)
        for earlier, later in itertools.combinations(given, 2):
            if order.index(later) < order.index(earlier):
                assert given[earlier] > 1.03 * given[later], f"{given}: {later} is not more than 3 % faster"


def test_what_is_recorded_moves_a_backend_only_where_it_is_faster_than_the_noise() -> None:
    for row in dispatch_times.read(dispatch_times.FILE):
        order = list(row.ms)
        first = dispatch_times.fastest_first(row.ms)[0]
        passed = order[: order.index(first)]
        assert all(row.ms[name] > 1.03 * row.ms[first] for name in passed), str(row)


def test_the_packages_rows_are_whole_and_what_is_read_of_them_is_theirs() -> None:
    every = dispatch_times.read(dispatch_times.FILE)
    assert len({row.key for row in every}) == len(every)
    groups: dict[Any, dict[Any, set[Any]]] = {}
    for row in every:
        kind = row.kind
        assert kind.device != "cpu" or (kind.isa in LIMITS and kind.dtype in DTYPES and row.threads > 0), str(row)
        shapes = groups.setdefault((kind.device, kind.isa, kind.dtype, row.threads), {})
        shapes.setdefault((kind.cell, kind.train), set()).add(row[:4])
    for group, shapes in groups.items():
        assert group[0] != "cpu" or len(shapes) == 6, group
        assert len({frozenset(some) for some in shapes.values()}) == 1, f"{group}: not of every cell and mode the same"
    for kind in {row.kind for row in every}:
        assert list(dispatch_times.shipped(kind)) == [row for row in every if row.kind == kind]


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts lines in the place of what is recorded. The engine is that of AVX-512, and no processor has more."""
    monkeypatch.setattr(extension, "variants", ("avx512", "avx2", "baseline"))
    monkeypatch.setattr(processor, "_bfloat16_products", lambda: "")
    monkeypatch.setattr(select, "_onednn_has", lambda dtype: dtype != "fp16")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    def put(*lines: str) -> None:
        path = tmp_path / "dispatch_times.csv"
        path.write_text("\n".join([",".join([*dispatch_times.FACTS, *BY_NAME]), *lines]) + "\n")
        monkeypatch.setattr(dispatch_times, "FILE", path)
        select.forget()

    yield put
    monkeypatch.undo()
    select.forget()


@pytest.fixture
def table(use: Callable[..., None]) -> None:
    """Two recorded shapes of a GRU: torch wins the small one, cpu the large one, and cpu on the whole."""
    use("cpu,avx512,float32,gru,1,1,1,1,64,64,x,,,2,1,4", "cpu,avx512,float32,gru,1,1,64,64,64,64,x,,,1,9,4")


def names(problem: LayerSpec) -> list[str]:
    return [backend.name for backend in preference(problem)]


def test_the_nearest_recorded_shape_decides(table: None) -> None:
    small, large = ["cuda", "triton", "torch", "cpu", "reference"], ["cuda", "triton", "cpu", "reference", "torch"]
    for _ in range(2):  # looked up, and remembered
        assert names(PLAIN._replace(batch=1, steps=1)) == small
        assert names(PLAIN) == large
        assert names(PLAIN._replace(batch=7, steps=7)) == small, "7 is nearer to 1 than to 64, by factors"
        assert names(PLAIN._replace(batch=9, steps=9)) == large
        assert names(PLAIN._replace(batch=0, steps=0)) == small
        assert names(PLAIN._replace(cell="gru_reset_before")) == large
    for other in ({"cell": "lstm"}, {"train": False}, {"device": "cuda"}):
        assert preference(PLAIN._replace(**other)) == BACKENDS, "nothing is recorded"
    row = rnnkit.backends.recorded(PLAIN)
    where = "B=64 T=64 I=64 H=64 in float32 on avx512, 1 thread, x"
    assert str(row) == f"{where}: cpu 1 ms, reference 4 ms, torch 9 ms"


def test_orders_are_remembered_but_not_without_end(table: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = select._orders
    monkeypatch.setattr(select, "ORDER_CACHE_SIZE", 3)
    for steps in range(1, 9):
        preference(PLAIN._replace(steps=steps))
        assert 0 < len(kept) <= 3
    monkeypatch.setattr(dispatch_times, "nearest", None)
    assert names(PLAIN._replace(steps=8))[2] == "cpu"


def test_what_was_not_measured_keeps_its_place() -> None:
    order = select._order
    assert [b.name for b in order(("reference", "torch"))] == ["cuda", "triton", "cpu", "reference", "torch"]
    assert [b.name for b in order(("torch", "cpu"))] == ["cuda", "triton", "torch", "cpu", "reference"]


def test_compiled_code_does_not_look_at_sizes(table: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch_times, "nearest", None)
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(rnnkit.GRU(8, 8), backend=count, dynamic=True, fullgraph=True)
    for batch, steps in ((2, 3), (3, 70), (64, 5), (70, 70)):
        compiled(torch.randn(steps, batch, 8))
    assert len(graphs) == 1


def test_a_symbolic_size_is_not_looked_up(table: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    symbol = env.create_symbol(5, ConstantSource("s"), dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    size: Any = env.create_symintnode(symbol, hint=5)
    monkeypatch.setattr(dispatch_times, "nearest", None)
    assert names(PLAIN._replace(steps=size)) == names(PLAIN._replace(batch=size)) == [
        *("cuda", "triton", "cpu", "torch", "reference")
    ]  # fmt: skip
    assert not env.guards


def test_explain_shows_the_row_that_decided(table: None) -> None:
    found = rnnkit.explain(rnnkit.GRU(64, 64), torch.randn(1, 1, 64))
    row = "B=1 T=1 I=64 H=64 in float32 on avx512, 1 thread, x: torch 1 ms, cpu 2 ms, reference 4 ms"
    assert f"    in the order measured at {row}\n" in str(found)
    (layer,) = found.to_dict()["layers"]
    assert (layer["measured"], layer["rule"], layer["backend"]) == (row, None, "torch")
    found = rnnkit.explain(rnnkit.LSTM(64, 64), torch.randn(1, 1, 64))
    rule = "cpu first, which multiplies in float32: no time is recorded of float32 on avx512 with 1 thread"
    assert f"    {rule}\n" in str(found)
    (layer,) = found.to_dict()["layers"]
    assert (layer["measured"], layer["rule"]) == (None, rule)
    named = str(rnnkit.explain(rnnkit.GRU(64, 64, backend="torch"), torch.randn(1, 1, 64)))
    assert "measured at" not in named and "no time is recorded" not in named


def test_every_problem_gets_every_backend() -> None:
    for cell, train in itertools.product(rnnkit.cells.CELLS, (False, True)):
        order = preference(PLAIN._replace(cell=cell, train=train))
        assert sorted(b.name for b in order) == sorted(BY_NAME)


# Which rows say something of a layer, and what decides where none does.

LSTM = PLAIN._replace(cell="lstm")


def first(spec: LayerSpec) -> str:
    return preference(spec)[2].name  # behind the two for GPUs


def line(isa: str, dtype: str, cell: str, threads: int, cpu: float, torch: float) -> str:
    """A recorded time, of PLAIN's sizes and mode."""
    return f"cpu,{isa},{dtype},{cell},1,{threads},32,100,256,256,x,,,{cpu},{torch},"


def test_rows_of_this_instruction_set_and_dtype_decide(
    use: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(
        line("avx512", "float32", "lstm", 1, 1, 2),
        line("avx512", "bfloat16", "lstm", 1, 2, 1),
        line("avx512_bf16", "bfloat16", "lstm", 1, 1, 3),
        line("avx2", "float32", "lstm", 1, 2, 1),
    )
    half = LSTM._replace(dtype=torch.bfloat16)
    assert (first(LSTM), first(half)) == ("cpu", "torch")
    monkeypatch.setattr(extension, "variants", ("avx512_bf16", "avx512", "avx2", "baseline"))
    select.forget()
    assert (first(LSTM), first(half)) == ("cpu", "cpu"), "products of bfloat16 are no matter in float32"
    monkeypatch.setattr(extension, "variants", ("avx2",))
    select.forget()
    assert first(LSTM) == "torch"


def test_the_number_of_threads_has_effect_at_once(use: Callable[..., None]) -> None:
    use(
        line("avx512", "float32", "gru", 1, 2, 1),
        line("avx512", "float32", "gru", 2, 1, 2),
        line("avx512", "float32", "gru", 8, 2, 1),
    )
    for threads, name in ((1, "torch"), (2, "cpu"), (3, "cpu"), (5, "torch"), (8, "torch"), (9, "cpu"), (1, "torch")):
        torch.set_num_threads(threads)
        assert first(PLAIN) == name, threads
        chosen = select_backend("auto", PLAIN)
        assert chosen.name == name and select._selected[choice_facts("auto"), PLAIN] is chosen
    torch.set_num_threads(9)
    assert rnnkit.backends.recorded(PLAIN) is None
    assert rnnkit.backends.basis(PLAIN).rule == (
        "cpu first, which multiplies in float32: no time is recorded of float32 on avx512 with 9 threads"
    )


def test_where_no_row_is_the_engine_runs_what_it_multiplies_in(
    use: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of every other kind say torch."""
    use(*(line(isa, "float32", cell, 1, 9, 1) for isa in ("avx512", "baseline") for cell in ("gru", "lstm")))
    for spec in (LSTM, PLAIN):
        assert first(spec) == "torch"
        assert first(spec._replace(dtype=torch.float64)) == "cpu"
        with_rows_of_float32 = spec._replace(dtype=torch.bfloat16)
        assert first(with_rows_of_float32) == "torch"
        assert rnnkit.backends.basis(with_rows_of_float32).rule == (
            "no time is recorded of bfloat16 on avx512 with 1 thread; those of float32 stand for it"
        )
    assert first(PLAIN._replace(dtype=torch.float16)) == "torch", "the same chain of small operators in every dtype"
    monkeypatch.setattr(extension, "variants", ("avx512_bf16", "avx512"))
    select.forget()
    assert first(PLAIN._replace(dtype=torch.bfloat16)) == "cpu"
    monkeypatch.setattr(extension, "variants", ("baseline",))
    select.forget()
    assert first(PLAIN) == "torch"
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    select.forget()
    assert first(PLAIN) == "cpu" and "float32 on neon with" in str(rnnkit.backends.basis(PLAIN).rule)
    half = PLAIN._replace(dtype=torch.bfloat16)
    assert first(half) == "cpu" and rnnkit.backends.basis(half).rule == (
        "cpu first: no time is recorded of bfloat16 on neon with 1 thread, nor of another dtype"
    )


def test_times_of_onednns_lstm_hold_only_where_onednn_runs_it(
    use: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a projection or without oneDNN torch's LSTM is a chain of small operators, and so is every float16 and
    float64 one, and one in bfloat16 where oneDNN does not support it."""
    use(*(line(isa, dtype, "lstm", 1, 9, 1) for isa in ("avx512", "avx2") for dtype in ("float32", "bfloat16")))
    half = LSTM._replace(dtype=torch.bfloat16)
    assert first(LSTM) == first(half) == "torch"
    chain = "cpu first: torch runs this LSTM in float16 as a chain of small operators here"
    assert rnnkit.backends.basis(LSTM._replace(dtype=torch.float16)).rule == chain
    assert first(LSTM._replace(dtype=torch.float16)) == first(LSTM._replace(dtype=torch.float64)) == "cpu"
    assert first(LSTM._replace(proj_size=8)) == "cpu"
    with torch.backends.mkldnn.flags(enabled=False):
        assert first(LSTM) == first(half) == "cpu" and rnnkit.backends.recorded(LSTM) is None
    monkeypatch.setattr(extension, "variants", ("avx2",))
    select.forget()
    assert first(half) == "torch", (
        "oneDNN supports it, unlike where the row was recorded: that of float32 stands for it"
    )
    assert "those of float32 stand for it" in str(rnnkit.backends.basis(half).rule)
    monkeypatch.setattr(select, "_onednn_has", lambda dtype: not dtype)
    select.forget()
    assert first(half) == "torch" and rnnkit.backends.basis(half).rule is None


@pytest.mark.parametrize("products", ["amx_bf16", "avx512_bf16"])
def test_torch_gets_a_large_lstm_where_onednn_has_products_that_the_engine_does_not_use(
    products: str, use: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(*(line("avx512", dtype, cell, 1, 1, 9) for dtype in ("float32", "bfloat16") for cell in ("lstm", "gru")))
    monkeypatch.setattr(processor, "_bfloat16_products", lambda: products)
    half = LSTM._replace(dtype=torch.bfloat16)
    assert (first(half), first(LSTM)) == ("torch", "cpu")
    others = ({"batch": 15}, {"hidden_size": 127}, {"cell": "gru"}, {"proj_size": 8})
    assert [first(half._replace(**other)) for other in others] == ["cpu"] * 4
    layer = rnnkit.LSTM(256, 256).bfloat16()
    said = str(rnnkit.explain(layer, torch.zeros(1, 32, 256, dtype=torch.bfloat16)))
    assert f"    torch first: oneDNN has this processor's products of bfloat16 ({products}), which cpu does not" in said
    assert "  → torch      chosen" in said
    monkeypatch.setattr(extension, "variants", ("avx512_bf16",))
    select.forget()
    assert first(half) == ("torch" if products == "amx_bf16" else "cpu"), "the engine uses those of AVX-512 itself"


@pytest.mark.parametrize(
    ("flags", "held", "products"),
    [
        ("amx_bf16 amx_tile avx512_bf16", "", "amx_bf16"),
        ("amx_bf16 amx_tile avx512_bf16", "AVX512_CORE_AMX", "amx_bf16"),
        ("amx_bf16 amx_tile avx512_bf16", "AVX512_CORE_BF16", "avx512_bf16"),
        ("amx_bf16 amx_tile avx512_bf16", "avx2", ""),
        ("avx512_bf16", "", "avx512_bf16"),
        ("avx512_bf16", "AVX512_CORE_VNNI", ""),
        ("avx2", "", ""),
    ],
)
def test_products_of_bfloat16_are_those_of_the_processor_that_onednn_may_use(
    flags: str, held: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "facts", lambda: {"flags": f"fpu {flags} sse"})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held)
    processor._bfloat16_products.cache_clear()
    try:
        assert processor._bfloat16_products() == products
    finally:
        processor._bfloat16_products.cache_clear()


def test_compiled_code_goes_by_the_same_rows_and_rules(use: Callable[..., None]) -> None:
    use(
        line("avx512", "float32", "lstm", 1, 9, 1),
        "cpu,avx512,float32,lstm,1,1,1,1,64,64,x,,,1,2,",
    )
    symbolic: Any = torch.SymInt(None)
    assert first(LSTM) == "torch" and first(LSTM._replace(batch=1, steps=1, hidden_size=64)) == "cpu"
    assert first(LSTM._replace(batch=symbolic)) == "torch"
    assert first(LSTM._replace(batch=symbolic, dtype=torch.float64)) == "cpu"
    with torch.backends.mkldnn.flags(enabled=False):
        assert first(LSTM._replace(batch=symbolic)) == "cpu"
