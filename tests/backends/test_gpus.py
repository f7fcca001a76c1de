"""What backends `cuda` and `triton` ask of a machine's GPUs, on make-believe machines: nothing for tensors that are on
a CPU, of several GPUs the one that the tensors are on, the driver's version, and what is too old or too small for what.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_backends import PLAIN
from torch import Tensor

import rnnkit
from rnnkit import backends
from rnnkit.backends import BACKENDS, BY_NAME, LayerSpec, gpu, select
from rnnkit.backends.cpu import extension
from rnnkit.backends.cuda import backend as cuda
from rnnkit.backends.cuda import configs as cuda_configs
from rnnkit.backends.triton import backend as triton
from rnnkit.backends.triton import configs as triton_configs
from rnnkit.benchmarks.gpu_check import parity_cases
from rnnkit.benchmarks.usage import cuda_usage as compiled

KERNELS = ("cuda", "triton")
ASK = {name: getattr(gpu, name).__wrapped__ for name in ("present", "capability_of", "amd", "driver")}
"""torch, each time."""
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine where both are built, with GPUs of these compute capabilities and a driver for this CUDA."""

    def make(*capabilities: tuple[int, int], driver: int = 13000, built: str = "13.0 sm_80 sm_90a sm_100") -> None:
        monkeypatch.setattr(extension, "cuda_missing", "")
        monkeypatch.setattr(extension, "cuda_built", tuple(built.split()))
        monkeypatch.setattr(triton, "installed", lambda: True)
        monkeypatch.setattr(triton, "interpreted", lambda: False)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(gpu, "present", gpu.once(lambda: bool(capabilities)))
        monkeypatch.setattr(gpu, "capability_of", gpu.once(lambda index: int("{}{}".format(*capabilities[index]))))
        monkeypatch.setattr(gpu, "driver", gpu.once(lambda: driver))
        monkeypatch.setattr(select, "_selected", {})

    return make


def reasons(name: str, index: int = 0, **change: Any) -> list[str]:
    return BY_NAME[name].unsupported(LayerSpec(**{**PLAIN, "device": "cuda", "device_index": index, **change}))


def test_a_layer_on_a_cpu_asks_no_gpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process forked from one that used CUDA, as a DataLoader's worker is, may ask nothing."""

    def forked(*_: Any) -> Any:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    machine((9, 0))
    for name, ask in ASK.items():
        monkeypatch.setattr(gpu, name, ask)
    for name in ("is_available", "device_count", "current_device", "get_device_capability", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, forked)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", forked, raising=False)
    x = torch.zeros(2, 1, 3)
    for layer in (rnnkit.RNN(3, 5), rnnkit.LSTM(3, 5, bidirectional=True), rnnkit.GRU(3, 5, reset_after=False)):
        layer(x)[0].sum().backward()
        layer(x, lengths=torch.tensor([2]))
    (found,) = rnnkit.explain(rnnkit.LSTM(3, 5), x).to_dict()["layers"]
    for name in KERNELS:
        assert found["reasons"][name] == ["runs on the device cuda, got cpu"]
        with pytest.raises(NotImplementedError, match="runs on the device cuda, got cpu"):
            rnnkit.LSTM(3, 5, backend=name)(x)
    monkeypatch.setattr(extension, "cuda_missing", "it is not built")
    monkeypatch.setattr(triton, "installed", lambda: False)
    on_cpu = [reasons(name, device="cpu") for name in KERNELS]
    assert [len(some) for some in on_cpu] == [2, 2] and on_cpu[0][1] == "it is not built"
    assert on_cpu[1][1] == "Triton is not installed: pip install rnnkit[triton]"


def test_what_torch_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((7, 5), (10, 3))[index])
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    assert (ASK["present"](), ASK["capability_of"](0), ASK["capability_of"](1), ASK["driver"]()) == (
        True,
        75,
        103,
        12080,
    )
    monkeypatch.delattr(torch._C, "_cuda_getDriverVersion")
    assert ASK["driver"]() is None


@pytest.mark.parametrize("name", KERNELS)
def test_each_gpu_is_judged_by_itself(name: str, machine: Machine) -> None:
    machine((7, 5), (9, 0))
    old = "needs compute capability 8.0 or later, got a GPU of 7.5: "
    (reason,) = reasons(name, 0)
    assert reason.startswith(old)
    assert reasons(name, 1) == []
    assert BY_NAME[name].available() is None, "one of them serves"
    machine((7, 5), (7, 0))
    assert str(BY_NAME[name].available()).startswith(old)
    machine()
    assert "needs a GPU, and torch sees none" in str(BY_NAME[name].available())


def test_a_choice_is_remembered_for_its_gpu(machine: Machine) -> None:
    machine((7, 5), (9, 0))
    problem = LayerSpec(**{**PLAIN, "device": "cuda", "device_index": 0, "lengths": True})
    assert backends.select_backend("auto", problem).name == "reference"
    assert backends.select_backend("auto", problem._replace(device_index=1)).name == "cuda"
    assert backends.select_backend("auto", problem).name == "reference"


def test_a_problem_says_which_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Placed(Tensor):
        is_cpu = False
        device = torch.device("cuda", 3)  # type: ignore[assignment]

    weights = (torch.zeros(12, 3), torch.zeros(12, 4), None, None)
    for x, place in ((torch.zeros(2, 1, 3), ("cpu", None)), (torch.zeros(2, 1, 3).as_subclass(Placed), ("cuda", 3))):
        t = backends.LayerInputs(x, torch.zeros(1, 4), None, *weights)
        found = backends.describe("gru", t, backends.LayerOptions(), train=False)
        assert (found.device, found.device_index) == place


@pytest.mark.parametrize(
    ("built", "driver", "reason"),
    [
        ("13.0 sm_90a", 13000, None),
        ("13.2 sm_90a", 13000, None),
        ("12.8 sm_90a", 13000, None),
        ("12.8 sm_90a", 12040, None),
        ("13.2 sm_90a compute_100", 13000, None),
        ("13.0 sm_90a", 12080, "compiled by CUDA 13.0, needs a driver for CUDA 13.0 or later, got one for CUDA 12.8: "),
        ("13.2 sm_90a", 12090, "compiled by CUDA 13.2, needs a driver for CUDA 13.0 or later, got one for CUDA 12.9: "),
    ],
)
def test_a_driver_older_than_the_kernels(built: str, driver: int, reason: str | None, machine: Machine) -> None:
    """Whatever CUDA torch is built with: the kernels have a runtime of their own."""
    machine((9, 0), driver=driver, built=built)
    found = reasons("cuda")
    assert found == [] if reason is None else (len(found) == 1 and found[0].startswith(reason))
    assert BY_NAME["cuda"].available() == (found[0] if found else None)
    if reason is not None:
        assert "update the driver, or build again with the nvcc of CUDA 12" in found[0]
        assert reasons("triton") == []
        spec = LayerSpec(**{**PLAIN, "device": "cuda", "device_index": 0, "lengths": True})
        assert backends.select_backend("auto", spec, cache=False, report=False).name == "triton"


def test_ptx_takes_a_driver_of_its_own_version(machine: Machine) -> None:
    machine((12, 0), built="13.2 sm_100 compute_100", driver=13000)
    (found,) = reasons("cuda")
    assert found.startswith("compiled by CUDA 13.2, needs a driver for CUDA 13.2 or later, got one for CUDA 13.0: ")
    machine((12, 0), built="13.2 sm_100 compute_100", driver=13020)
    assert reasons("cuda") == []


def test_a_gpu_that_was_not_compiled_for(machine: Machine) -> None:
    machine((8, 0), (9, 0), built="13.0 sm_80")
    assert reasons("cuda", 0) == []
    assert reasons("cuda", 1) == ["its kernels are compiled for sm_80, got a GPU of 9.0; build again for it"]


def test_too_old_for_any_plan() -> None:
    for regime in (None, *cuda_configs.REGIMES):
        with pytest.raises(ValueError, match=r"needs compute capability 8.0 or later, got a GPU of 7.5: .*cta, step"):
            cuda_configs.plan("lstm", 64, 0, "bf16", 8, 75, regime)


@pytest.mark.parametrize(
    ("cell", "hidden", "kind", "capability", "why"),
    [
        (
            "lstm",
            160,
            "bf16",
            86,
            "on one multiprocessor of sm_86 (99 KiB of shared memory a block) fit up to 128 units",
        ),
        (
            "lstm",
            160,
            "bf16",
            80,
            "on one multiprocessor of sm_80 (163 KiB of shared memory a block) fit up to 128 units",
        ),
        (
            "lstm",
            161,
            "bf16",
            90,
            "on one multiprocessor of sm_90 (227 KiB of shared memory a block) fit up to 160 units",
        ),
        (
            "gru",
            9,
            "f64",
            90,
            "no weights of gru in float64 fit on one multiprocessor of sm_90 (227 KiB of shared memory a",
        ),
    ],
)
def test_what_a_smaller_gpu_is_told(cell: str, hidden: int, kind: str, capability: int, why: str) -> None:
    row, said = cuda_configs.plan(cell, hidden, 0, kind, 8, capability)
    assert row.regime == "step" and said.startswith(why)
    with pytest.raises(ValueError) as caught:
        cuda_configs.plan(cell, hidden, 0, kind, 8, capability, "cta")
    assert str(caught.value) == said
    assert cuda_configs.plan(cell, hidden, 0, kind, 8, capability, "step")[0] == row


@pytest.mark.parametrize("name", KERNELS)
def test_under_compile_a_gpu_is_judged_alike(name: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((7, 5), (12, 0), built="13.0 sm_80 compute_100")

    def untraced(ask: Callable[..., Any]) -> Callable[..., Any]:
        return gpu.once(lambda *args: (torch._dynamo.graph_break(), ask(*args))[1])

    for question in ("present", "capability_of", "driver"):
        monkeypatch.setattr(gpu, question, untraced(getattr(gpu, question)))

    @torch.compile(fullgraph=True, backend="eager")
    def count(x: Tensor, device: torch.device) -> Tensor:
        return x + len(reasons(name, device.index, dtype=torch.bfloat16))

    assert [int(count(torch.zeros(1), torch.device("cuda", index))) for index in (0, 1)] == [1, 0]


def test_a_regime_is_an_entry_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up one between the others is planned, written, run by parity and proved as they are."""
    cluster = cuda_configs.REGIMES["cta"]._replace(oldest=90, place="a cluster", why="of many", asks=("one", "two"))
    rows = (cuda_configs.CompiledKernel("cluster", "lstm", "bf16", 512, 8, 8, (1, 2)),)
    row = rows[0]
    cluster = cluster._replace(shared=lambda row, side: 1000 + side, arguments=lambda row: (row.units, 16))
    both = cuda_configs.REGIMES
    monkeypatch.setattr(cuda_configs, "REGIMES", {"cta": both["cta"], "cluster": cluster, "step": both["step"]})
    monkeypatch.setattr(cuda_configs, "ROWS", cuda_configs.ROWS + rows)
    assert cuda_configs.plan("lstm", 160, 0, "bf16", 8, 90)[0].regime == "cta"
    found, why = cuda_configs.plan("lstm", 161, 0, "bf16", 8, 90)
    assert found == row and why.startswith("on one multiprocessor of sm_90 ") and "a cluster" not in why
    assert cuda_configs.plan("lstm", 8, 0, "bf16", 8, 90, "cluster") == (row, "of many")
    assert "; on a cluster of sm_90 (227 KiB" in cuda_configs.plan("lstm", 513, 0, "bf16", 8, 90)[1]
    assert row in cuda_configs.able(90) and row not in cuda_configs.able(80)
    found, why = cuda_configs.plan("lstm", 161, 0, "bf16", 8, 80)
    assert found.regime == "step" and why.endswith("; cluster needs compute capability 9.0 or later, got 8.0")
    assert (
        cuda_configs.source(row)
        == '#include "cluster.cuh"\n\nRNNKIT_CLUSTER(cluster_lstm_bf16_512, lstm, bf16, 512, 16)\n'
    )
    assert cuda_configs.shared_bytes(row, 1) == 1001
    assert "forward_asks[one + 1]" in compiled.source(row) and "backward_asks[two + 1]" in compiled.source(row)
    (problem,) = parity_cases.resident(rows)
    assert not list(parity_cases.stepping(rows)) and parity_cases.compiled_for(problem, 90) == row


# A regime that is named.


def test_a_regime_of_cuda_by_name(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((8, 6))

    def detail(hidden: int) -> str:
        problem = LayerSpec(**{**PLAIN, "device": "cuda", "device_index": 0, "hidden_size": hidden, "cell": "lstm"})
        return str(BY_NAME["cuda"].detail(problem._replace(dtype=torch.bfloat16)))

    monkeypatch.setattr(cuda.regimes, "only", "step")
    assert detail(64) == "step: RNNKIT_CUDA_REGIME=step asks for it (step_lstm_bf16_8)"
    monkeypatch.setattr(cuda.regimes, "only", "cta")
    assert detail(64) == "cta: RNNKIT_CUDA_REGIME=cta asks for it (cta_lstm_bf16_64)"
    assert reasons("cuda", 0, hidden_size=64, cell="lstm", dtype=torch.bfloat16) == []
    with pytest.raises(NotImplementedError) as caught:
        detail(129)
    assert str(caught.value) == (
        "RNNKIT_CUDA_REGIME=cta: on one multiprocessor of sm_86 (99 KiB of shared memory a block) fit up to 128 units "
        "of lstm in bfloat16, got H=129. Unset it, or name step"
    )
    assert reasons("cuda", 0, hidden_size=129, cell="lstm", dtype=torch.bfloat16) == [str(caught.value)]
    monkeypatch.setattr(cuda.regimes, "only", None)
    assert detail(129).startswith("step: on one multiprocessor of sm_86")


def test_a_regime_of_triton_by_name(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((8, 6))

    def detail(hidden: int) -> str:
        problem = LayerSpec(**{**PLAIN, "device": "cuda", "device_index": 0, "hidden_size": hidden, "cell": "lstm"})
        return str(BY_NAME["triton"].detail(problem._replace(dtype=torch.bfloat16)))

    monkeypatch.setattr(triton.regimes, "only", "step")
    assert detail(64) == "step: RNNKIT_TRITON_REGIME=step asks for it"
    monkeypatch.setattr(triton.regimes, "only", "persistent")
    assert detail(64) == "persistent: RNNKIT_TRITON_REGIME=persistent asks for it"
    assert reasons("triton", 0, hidden_size=64, cell="lstm", dtype=torch.bfloat16) == []
    with pytest.raises(NotImplementedError) as caught:
        detail(80)
    assert str(caught.value) == (
        "RNNKIT_TRITON_REGIME=persistent: forward: no kernel keeps the recurrent weights of H=80 on chip in half "
        "precision on sm_86 (99 KiB of shared memory a block), up to 64 units fit. Unset it, or name step"
    )
    assert reasons("triton", 0, hidden_size=80, cell="lstm", dtype=torch.bfloat16) == [str(caught.value)]
    # A backward may be what does not fit: its forward is not begun.
    odd = {"hidden_size": 63, "cell": "lstm", "dtype": torch.bfloat16}
    (refused,) = reasons("triton", 0, **odd, train=True)
    assert refused.startswith("RNNKIT_TRITON_REGIME=persistent: backward: no kernel keeps")
    assert reasons("triton", 0, **odd, train=False) == []


@pytest.mark.parametrize(("name", "regimes"), [("cuda", "cta, step"), ("triton", "persistent, step")])
def test_an_unknown_regime(name: str, regimes: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((9, 0))
    monkeypatch.setattr({"cuda": cuda, "triton": triton}[name].regimes, "only", "ctaa")
    wrong = f"RNNKIT_{name.upper()}_REGIME must be one of {regimes} or unset, got 'ctaa'"
    assert reasons(name, 0) == [wrong] and BY_NAME[name].available() == wrong
    assert reasons(name, device="cpu")[0] == "runs on the device cuda, got cpu"
    problem = LayerSpec(**{**PLAIN, "device": "cuda", "device_index": 0})
    with pytest.raises(NotImplementedError, match=wrong):
        backends.select_backend(name, problem, cache=False, report=False)
    assert backends.select_backend("auto", problem, cache=False, report=False).name != name
    monkeypatch.setenv("RNNKIT_SOME_REGIME", "ctaa")
    with pytest.warns(
        UserWarning, match="RNNKIT_SOME_REGIME must be one of cta, step or unset, got 'ctaa': the backend"
    ):
        gpu.Regimes("RNNKIT_SOME_REGIME", ("cta", "step"))


def test_what_triton_keeps_with_a_projection() -> None:
    said = triton_configs.plan("lstm", "forward", 208, 48, "half", 90, 16).reason
    assert said.endswith("of H=208 P=48 on chip in half precision on sm_90 (227 KiB of shared memory a block), up to "
                         "128 units fit")  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_what_is_not_available_says_so_first(backend: Any) -> None:
    missing = backend.available()
    if missing is not None:
        where = {} if backend.name not in KERNELS else {"device": "cuda"}
        assert backend.unsupported(LayerSpec(**{**PLAIN, **where}))[0] == missing and missing.strip()
