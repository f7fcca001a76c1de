"""What the operators of the CUDA kernels refuse. They check shapes before devices, so that no GPU is needed for it.

Where the extension is built without CUDA, their file is compiled here, with kernels that do nothing.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

from rnnkit.backends.cpu import extension
from rnnkit.backends.cuda import backend as cuda
from rnnkit.backends.cuda import configs as cuda_configs

ROOT = Path(__file__).resolve().parents[2]
KERNELS = """
#include "probes.h"
#include "scan.h"
namespace rnnkit::cuda {
double probe(const char* what, int64_t size, Stream) { return *what == 'h' ? size / 2.0 : 0; }
namespace {
int64_t bytes(const Forward&) { return 0; }
int64_t bytes_back(const Backward&) { return 0; }
void run(const Forward&, Stream) {}
void run_back(const Backward&, Stream) {}
#define KERNEL(NAME) \\
  Kernel NAME = {#NAME, bytes, run, bytes_back, run_back, nullptr}; \\
  const Entry entry_##NAME(NAME);
"""
H, B, N = 6, 3, 2  # units, rows, steps


@pytest.fixture(scope="module", autouse=True)
def operators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if extension.cuda_kernels:
        yield
        return
    folder = tmp_path_factory.mktemp("operators")
    kernels = folder / "kernels.cpp"
    kernels.write_text(KERNELS + "\n".join(f"KERNEL({row.name})" for row in cuda_configs.ROWS) + "\n}\n}\n")
    library = folder / "operators.so"
    command = [
        "c++",
        "-std=c++17",
        "-O0",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
    ]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-DRNNKIT_CUDA_BUILT=13.7,sm_80,sm_90a"]
    command += [f"-isystem{path}" for path in cpp_extension.include_paths()] + [f"-I{ROOT / 'csrc' / 'cuda'}"]
    command += [str(ROOT / "csrc" / "cuda" / "ops.cpp"), str(kernels), "-o", str(library)]
    command += [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    torch.ops.load_library(str(library))
    yield


def forward(cell: str = "lstm", **changed: Any) -> None:
    """A scan in bfloat16 with everything that the cell can have, on the CPU."""
    G, saved, has_c = {
        "rnn": (1, 0, False),
        "lstm": (4, 4, True),
        "gru": (3, 4, False),
        "gru_reset_before": (3, 3, False),
    }[cell]
    fields: dict[str, Any] = {"kernel": f"step_{cell}_bf16_8", "t0": 0, "reverse": False, "relu": False}
    fields |= {
        "gx": some(N, B, G * H),
        "w_hh": some(G * H, H),
        "w_hr": None,
        "b_hn": some(H) if cell == "gru" else None,
    }
    fields |= {"h_0": wide(B, H), "c_0": wide(B, H) if has_c else None}
    fields |= {"lengths": torch.tensor([2, 0, 1]), "reset": torch.zeros(N, B, dtype=torch.bool)}
    fields |= {"h_r": some(B, H), "c_r": some(B, H) if has_c else None}
    fields |= {"y": some(N, B, H), "h_n": wide(B, H), "c_n": wide(B, H) if has_c else None}
    fields |= {"c_all": some(N, B, H) if has_c else None, "gates": some(N, B, saved * H) if saved else None}
    assert set(changed) <= set(fields)
    call("forward", {**fields, **changed})


def backward(cell: str = "lstm", **changed: Any) -> None:
    G, saved, has_c = {
        "rnn": (1, 0, False),
        "lstm": (4, 4, True),
        "gru": (3, 4, False),
        "gru_reset_before": (3, 3, False),
    }[cell]
    fields: dict[str, Any] = {"kernel": f"step_{cell}_bf16_8", "reverse": False, "relu": False}
    dgx = some(N, B, G * H)
    fields |= {"w_t": some(H, G * H), "w_hr_t": None, "h_0": wide(B, H), "c_0": wide(B, H) if has_c else None}
    fields |= {"lengths": torch.tensor([2, 0, 1]), "reset": torch.zeros(N, B, dtype=torch.bool)}
    fields |= {"h_r": some(B, H), "c_r": some(B, H) if has_c else None, "gy": some(N, B, H), "gh_n": wide(B, H)}
    fields |= {"gc_n": wide(B, H) if has_c else None, "gc_all": None, "y": some(N, B, H)}
    fields |= {"c_all": some(N, B, H) if has_c else None, "gates": some(N, B, saved * H) if saved else None}
    fields |= {"dgx": dgx, "dgh": torch.empty_like(dgx) if cell == "gru" else dgx, "dp": None, "dh_0": wide(B, H)}
    fields |= {"dc_0": wide(B, H) if has_c else None, "dh_r": wide(B, H), "dc_r": wide(B, H) if has_c else None}
    assert set(changed) <= set(fields)
    if "dgx" in changed and "dgh" not in changed:
        changed["dgh"] = changed["dgx"]
    call("backward", {**fields, **changed})


def call(side: str, fields: dict[str, Any]) -> None:
    cuda.launch(fields["kernel"], side, fields)


def some(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(sizes, dtype=dtype)


def wide(*sizes: int) -> Tensor:
    return some(*sizes, dtype=torch.float32)


RIGHT = "must be on a GPU, got the CPU"


@pytest.mark.parametrize("cell", cuda_configs.GATES)
def test_what_is_right_meets_the_device_alone(cell: str) -> None:
    with pytest.raises(RuntimeError, match=f"rnnkit: gx {RIGHT}"):
        forward(cell)
    with pytest.raises(RuntimeError, match=f"rnnkit: y {RIGHT}"):
        backward(cell)
    none = dict.fromkeys(("lengths", "reset", "h_r", "c_r"))
    with pytest.raises(RuntimeError, match=f"rnnkit: gx {RIGHT}"):
        forward(cell, b_hn=None, c_all=None, gates=None, h_0=some(B, H), h_n=some(B, H), **none)
    with pytest.raises(RuntimeError, match=f"rnnkit: y {RIGHT}"):
        backward(cell, gy=None, gh_n=None, gc_n=None, dh_r=None, dc_r=None, **none)
    with pytest.raises(RuntimeError, match=f"rnnkit: gx {RIGHT}"):
        forward(cell, t0=4, reset=torch.zeros(N + 9, B, dtype=torch.bool))


def test_a_projection() -> None:
    P = 4
    forward_fields = {"w_hh": some(4 * H, P), "w_hr": some(P, H), "h_0": wide(B, P), "h_n": wide(B, P)}
    forward_fields |= {"y": some(N, B, P), "h_r": some(B, P)}
    with pytest.raises(RuntimeError, match=f"rnnkit: gx {RIGHT}"):
        forward(**forward_fields)
    fields = {"w_t": some(P, 4 * H), "w_hr_t": some(H, P), "h_0": wide(B, P), "y": some(N, B, P), "h_r": some(B, P)}
    fields |= {"gy": some(N, B, P), "gh_n": wide(B, P), "dh_0": wide(B, P), "dh_r": wide(B, P)}
    with pytest.raises(RuntimeError, match=f"rnnkit: y {RIGHT}"):
        backward(**fields, dp=some(N, B, P))
    with pytest.raises(RuntimeError, match="dp must be given with a projection"):
        backward(**fields)
    with pytest.raises(RuntimeError, match=r"w_hr must be BFloat16 \[4, 6\], got BFloat16 \[6, 4\]"):
        forward(**{**forward_fields, "w_hr": some(H, P)})


FORWARD: list[tuple[str, dict[str, Any], str]] = [
    ("lstm", {"kernel": "cta_lstm_bf16_33"}, "kernel cta_lstm_bf16_33 is not in this build .* cta_lstm_bf16_32"),
    (
        "lstm",
        {"kernel": "lstm"},
        "kernel lstm is not in this build of the extension; it has .*step_gru_reset_before_ieee_8",
    ),
    ("gru", {"kernel": "step_lstm_bf16_8"}, "gx must be"),
    ("lstm", {"gx": some(N, B, 4 * H + 1)}, r"gx must be BFloat16 \[2, 3, 24\], got BFloat16 \[2, 3, 25\]"),
    ("lstm", {"gx": some(N, 4 * H)}, r"gx must have 3 dimensions, got \[2, 24\]"),
    ("lstm", {"gx": wide(N, B, 4 * H)}, "gx must be BFloat16 .* got Float"),
    ("lstm", {"gx": some(N, B, 8 * H)[..., ::2]}, r"gx must be contiguous, got strides \[144, 48, 2\]"),
    ("lstm", {"w_hh": some(4 * H)}, "w_hh must have 2 dimensions"),
    ("lstm", {"w_hh": wide(4 * H, H)}, "w_hh must be BFloat16"),
    ("lstm", {"w_hh": some(4 * H, 5)}, "without a projection the weights must be those of 6 units .* got 5"),
    ("gru", {"w_hr": some(H, H)}, "only an LSTM has a projection, got the kernel step_gru_bf16_8"),
    ("gru", {"relu": True}, "relu is an RNN's"),
    ("lstm", {"t0": -1}, "t0 must be at least 0, got -1"),
    ("lstm", {"t0": 1}, r"reset must be \[T, 3\] with a T of at least 3 steps, got \[2, 3\]"),
    ("lstm", {"h_0": some(B, H, dtype=torch.float64)}, r"h_0 must be BFloat16 \[3, 6\], got Double"),
    ("lstm", {"h_0": wide(B + 1, H)}, r"h_0 must be Float \[3, 6\], got Float \[4, 6\]"),
    ("lstm", {"c_0": None}, "c_0 must be given for an LSTM"),
    ("gru", {"c_0": wide(B, H)}, "c_0 must be None: it is given for an LSTM alone"),
    ("lstm", {"lengths": torch.zeros(B, dtype=torch.int32)}, "lengths must be Long .* got Int"),
    ("lstm", {"lengths": torch.zeros(B + 1, dtype=torch.int64)}, r"lengths must be Long \[3\], got Long \[4\]"),
    ("lstm", {"reset": torch.zeros(N, B)}, "reset must be Bool"),
    ("lstm", {"reset": torch.zeros(N, 1, dtype=torch.bool)}, r"reset must be Bool \[2, 3\], got Bool \[2, 1\]"),
    ("lstm", {"h_r": wide(1, H)}, "h_r must be"),
    ("lstm", {"c_r": wide(1, H)}, "c_r must be"),
    ("lstm", {"b_hn": some(H)}, "b_hn is for a GRU with reset after"),
    ("gru", {"b_hn": some(H + 1)}, "b_hn must be"),
    ("lstm", {"y": some(N + 1, B, H)}, "y must be"),
    ("lstm", {"y": some(N, H, B).transpose(1, 2)}, "y must be contiguous"),
    ("lstm", {"h_n": wide(B, H + 1)}, "h_n must be"),
    ("lstm", {"c_n": None}, "c_n must be given"),
    ("lstm", {"c_n": wide(B, H + 1)}, "c_n must be"),
    ("gru", {"c_all": some(N, B, H)}, "c_all is an LSTM's"),
    ("lstm", {"c_all": some(N, B, H + 1)}, "c_all must be"),
    ("rnn", {"gates": some(N, B, H)}, "an RNN saves no gates"),
    ("gru", {"gates": some(N, B, 3 * H)}, r"gates must be BFloat16 \[2, 3, 24\], got BFloat16 \[2, 3, 18\]"),
    ("gru", {"h_r": torch.zeros(B, H, dtype=torch.bfloat16).to_sparse()}, "h_r must be a dense tensor"),
]
BACKWARD: list[tuple[str, dict[str, Any], str]] = [
    ("lstm", {"w_t": some(4 * H, H)}, r"y must be BFloat16 \[2, 3, 24\], got"),
    ("lstm", {"y": some(N, H)}, "y must have 3 dimensions"),
    ("lstm", {"y": wide(N, B, H)}, "y must be BFloat16"),
    ("lstm", {"gy": some(N, 1, H).expand(N, B, H)}, "gy must be contiguous"),
    ("lstm", {"gh_n": wide(B, 1)}, "gh_n must be"),
    ("gru", {"gc_n": wide(B, H)}, "gc_n and gc_all are an LSTM's"),
    ("gru", {"gc_all": some(N, B, H)}, "gc_n and gc_all are an LSTM's"),
    ("lstm", {"gc_all": wide(N, B, H)}, "gc_all must be BFloat16"),
    ("lstm", {"c_all": None}, "c_all must be given for an LSTM"),
    ("gru", {"gates": None}, "gates must be given for every cell but an RNN"),
    ("rnn", {"gates": some(N, B, H)}, "gates must be None: it is given for every cell but an RNN alone"),
    ("lstm", {"reset": torch.zeros(N + 1, B, dtype=torch.bool)}, r"reset must be \[2, 3\], got 3 steps"),
    ("lstm", {"dgx": some(N, B, 3 * H)}, "dgx must be"),
    ("lstm", {"dgh": some(N, B, 4 * H)}, "dgh must be dgx itself"),
    ("gru", {"dgh": some(N, B, 4 * H)}, "dgh must be BFloat16"),
    ("lstm", {"dp": some(N, B, H)}, "dp must be None: it is given with a projection alone"),
    ("lstm", {"dh_0": wide(B, H + 1)}, "dh_0 must be"),
    ("lstm", {"dc_0": None}, "dc_0 must be given"),
    ("lstm", {"dh_r": None}, "dh_r must be given with a reset"),
    ("lstm", {"reset": None}, "dh_r must be None: it is given with a reset alone"),
    ("gru", {"dc_r": wide(B, H)}, "dc_r must be None"),
]


@pytest.mark.parametrize(
    ("cell", "changed", "message"), FORWARD, ids=lambda v: next(iter(v), "") if type(v) is dict else ""
)
def test_what_the_forward_refuses(cell: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"rnnkit: ({message})"):
        forward(cell, **changed)


@pytest.mark.parametrize(
    ("cell", "changed", "message"), BACKWARD, ids=lambda v: next(iter(v), "") if type(v) is dict else ""
)
def test_what_the_backward_refuses(cell: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"rnnkit: ({message})"):
        backward(cell, **changed)


def test_the_same_memory_is_no_gradient_of_its_own() -> None:
    dgx = some(N, B, 3 * H)
    with pytest.raises(RuntimeError, match="for a GRU with reset after memory of its own"):
        backward("gru", dgx=dgx, dgh=dgx)


def test_what_is_built_in() -> None:
    names = torch.ops.rnnkit.cuda_kernels().split()
    assert sorted(names) == sorted(row.name for row in cuda_configs.ROWS)
    toolkit, *chips = torch.ops.rnnkit.cuda_built().split()
    assert toolkit.replace(".", "").isdigit() and set(chips) <= {*cuda_configs.CHIPS, "compute_100"}


def test_another_kind_of_device() -> None:
    with pytest.raises(RuntimeError, match="rnnkit: gx must be on a GPU, got another kind of device"):
        forward(gx=some(N, B, 4 * H).to("meta"))


def test_probes_need_a_device() -> None:
    probe = torch.ops.rnnkit.cuda_probe
    if torch.version.cuda is None:
        with pytest.raises(RuntimeError, match="this torch is built without CUDA"):
            probe("half", 3)
    elif not torch.cuda.is_available():  # up to torch 2.12 its own words stay behind the interface
        with pytest.raises(RuntimeError, match=r"NVIDIA driver|CUDA GPUs|API call failed"):
            probe("half", 3)
    elif extension.cuda_kernels:
        with pytest.raises(
            RuntimeError, match=r"there is no probe half; benchmarks/gpu_check/probes\.py has their names"
        ):
            probe("half", 3)
    else:
        assert probe("half", 3) == 1.5
