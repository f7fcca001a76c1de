"""The machinery that runs CUDA kernels on a CPU, held against toys.cu: wrappers give what the instruction gives, right
kernels pass under every schedule, and every kind of planted fault is found.

Faults of order are looked for under 20 schedules; AddressSanitizer and ThreadSanitizer run in processes of their own,
in which the sanitizer comes first.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from simt import run
from torch import Tensor

pytestmark = pytest.mark.skipif(run.why_not() is not None, reason=str(run.why_not()))

SEEDS = range(20)


def toys() -> ctypes.CDLL:
    return run.library("toys")


def pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def toy(name: str, fault: int = 0, seed: int = 0, ordered: bool = False) -> str:
    """What is wrong with a toy's results, or what its launch threw; empty where nothing is."""
    message = ctypes.create_string_buffer(1000)
    toys().toy(name.encode(), fault, ctypes.c_uint64(seed), ordered, message, ctypes.c_int64(len(message)))
    return message.value.decode()


def converted(name: str, v: Tensor, to: torch.dtype) -> Tensor:
    out = torch.empty(v.shape, dtype=to)
    getattr(toys(), f"toy_{name}")(pointer(v), pointer(out), ctypes.c_int64(v.numel()))
    return out


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, where they are not both NaN."""
    kinds = {2: torch.int16, 4: torch.int32}
    both = a.isnan() & b.isnan()
    return bool(((a.view(kinds[a.dtype.itemsize]) == b.view(kinds[b.dtype.itemsize])) | both).all())


HALFS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("kind", HALFS)
def test_every_half_is_the_float_that_torch_says(kind: str) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    assert same(converted(f"from_{kind}", every, torch.float32), every.view(HALFS[kind]).float())


def floats() -> Tensor:
    """Random bits; all halfs, the points between two of them, and the floats on both sides of each."""
    bits = [torch.randint(-(2**31), 2**31, (1 << 18,)).int()]
    for kind in HALFS.values():
        points = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(kind).float()
        following = (points.to(kind).view(torch.int16) + 1).view(kind).float()
        for v in (points, (points + following) / 2):
            bits += [v.view(torch.int32) + k for k in (-1, 0, 1)]
    return torch.cat(bits).contiguous().view(torch.float32)


@pytest.mark.parametrize("kind", HALFS)
def test_every_float_becomes_the_half_that_torch_says(kind: str) -> None:
    v = floats()
    got = converted(f"to_{kind}", v, HALFS[kind])
    assert same(got, v.to(HALFS[kind]))
    # PTX, cvt: a NaN becomes the one of which all bits but the sign are set.
    assert set(got[v.isnan()].view(torch.int16).tolist()) == {0x7FFF}


def test_tf32_is_rounded_to_nearest_and_ties_go_away_from_zero() -> None:
    v = floats()
    got = converted("to_tf32", v, torch.float32)
    bits = v.view(torch.int32)
    assert bool(((got.view(torch.int32) & 0x1FFF) == 0).all())
    # A NaN stays one where a bit that is kept says so, else it is infinity.
    assert bool((got.isnan() == (v.isnan() & (bits & 0x7FE000 != 0))).all()) and bool((got == v)[v.isinf()].all())
    v, got = v[v.isfinite()].double(), got[v.isfinite()].double()
    # 11 bits of the significand; a subnormal has the spacing of the smallest normal number.
    spacing = 2.0 ** (torch.frexp(v).exponent.clamp(min=-125) - 11).double()
    expected = torch.copysign((v.abs() / spacing + 0.5).floor() * spacing, v)
    assert bool((got == expected.float().double()).all())


@pytest.mark.parametrize("name, bound, most", [("tanh_fast", 2.0**-11, 30.0), ("exp_fast", 2.0**-22, 80.0)])
def test_approximate_functions_are_wrong_within_their_bound(name: str, bound: float, most: float) -> None:
    v = torch.empty(100_000).uniform_(-most, most)
    expected = getattr(torch, name.removesuffix("_fast"))(v.double())
    off = (converted(name, v, torch.float32).double() / expected - 1).abs()
    # exp: the product with log2 e is rounded before.
    allowed = bound + (v.abs() * 2.0**-23 if name == "exp_fast" else 0) + 2.0**-24
    assert bool((off <= allowed).all()) and off.max() > bound * 0.9
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    got = converted(name, special, torch.float32)
    assert same(got, getattr(torch, name.removesuffix("_fast"))(special))


@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32"])
def test_products_are_those_of_plain_loops(kind: str) -> None:
    inner = 8 if kind == "tf32" else 16
    for seed in SEEDS:
        torch.manual_seed(seed)
        a, b, d = torch.randn(16, inner), torch.randn(inner, 8), torch.randn(16, 8)
        if kind == "tf32":
            # A tensor core does not look at the 13 low bits: here they are as random gave them.
            left, right = (t.view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32) for t in (a, b))
        else:
            a, b = a.to(HALFS[kind]), b.to(HALFS[kind])
            left, right = a, b
        expected = d.double()
        for k in range(inner):
            expected += left[:, k, None].double() * right[None, k].double()
        toys().toy_product(kind.encode(), pointer(a), pointer(b), pointer(d), ctypes.c_uint64(seed))
        # Rounded once; the order of a sum in float64 may still move one that lies between two floats.
        assert bool(((d.double() - expected).abs() <= expected.abs() * 2.0**-24 * 1.001).all())


@pytest.mark.parametrize("name", ["exchange", "rounds", "buffers", "memory", "order", "hidden", "many", "refused"])
def test_right_kernels_pass_under_every_schedule(name: str) -> None:
    assert [toy(name, seed=seed) for seed in SEEDS] == [""] * len(SEEDS)
    assert toy(name, ordered=True) == ""


@pytest.mark.parametrize(
    "name, fault, said",
    [
        ("exchange", 1, "got -nan"),  # read before write
        ("rounds", 1, "got"),  # write after read
        ("rounds", 2, "got"),  # read before write
        ("buffers", 1, "got"),  # write after read, a round later
        ("memory", 1, "got -nan"),  # not initialised
        ("memory", 2, "got -nan"),  # loaded beyond
        ("memory", 3, "block (0, 0) stored outside its shared memory"),
        ("order", 1, "deadlock: thread"),
        ("order", 2, "divergence in a warp: thread"),
        ("order", 3, "divergence in a block: thread"),
        ("order", 4, "is in a warp of 16 lanes"),
        ("refused", 1, "blocks must be"),
        ("refused", 2, "blocks must be"),
        ("refused", 3, "threads must be"),
        ("refused", 4, "shared memory must be"),
    ],
)
def test_planted_faults_are_found(name: str, fault: int, said: str) -> None:
    heard = [toy(name, fault, seed) for seed in SEEDS]
    assert all(said in words for words in heard), heard
    assert toy(name) == ""  # what a failed launch leaves disturbs no other


def test_a_report_says_kernel_block_thread_and_line() -> None:
    assert toy("order", 1, ordered=True) == (
        "rnnkit: kernel order on 2 x 1 blocks of 80 threads with 0 bytes of shared memory: deadlock: thread 0 of block"
        f" (0, 0) waits in sync at toys.cu:{line('if (fault == 1')}; of its block's 80 threads 79 wait and 1 have ended"
        " (schedule in order)"
    )


def line(text: str) -> int:
    """The line after the one with this text in toys.cu."""
    source = (run.ROOT / "tests" / "cuda" / "simt" / "toys.cu").read_text(encoding="utf-8").splitlines()
    return next(k for k, words in enumerate(source) if text in words) + 2


def test_an_order_can_be_repeated_and_seeds_differ() -> None:
    first = [toy("rounds", 1, seed) for seed in SEEDS]
    assert first == [toy("rounds", 1, seed) for seed in SEEDS]
    assert len(set(first)) > 10


def test_fields_have_the_places_of_scan_h() -> None:
    sizes = {"n": 2, "B": 9, "H": 4, "N": 5, "t0": 7, "total": 1 << 40, "reverse": True, "relu": False}
    for side, cls in run.SIDES.items():
        names = [name for name, _ in cls._fields_ if name not in {*sizes, "lengths", "reset", "workspace"}]
        shapes = {"B": 9, "H": 4, "N": 5, "n": 2}
        fields = {name: torch.zeros([shapes[letter] for letter in run.SHAPES.get(name, "n")]) for name in names}
        lengths, reset = torch.zeros(9, dtype=torch.int64), torch.zeros(9, dtype=torch.bool)
        one = {**sizes, "total": 1}
        run.run("toys", side, {**fields, **one, "lengths": lengths, "reset": reset.view(1, 9)})
        assert [fields[name].flatten()[0].item() for name in names] == [*range(1, len(names) + 1)]
        assert lengths.tolist()[:8] == [int(v) for v in one.values()] and reset.tolist() == [True] + 8 * [False]
    assert run.kernels("toys") == ["toys"]


PROGRAM = """
import ctypes, sys
library, fault, seeds, *names = sys.argv[1:]
toys = ctypes.CDLL(library)
message = ctypes.create_string_buffer(1000)
for name in names:
    for seed in range(int(seeds)):
        toys.toy(name.encode(), int(fault), ctypes.c_uint64(seed), False, message, ctypes.c_int64(1000))
"""


def sanitized(flavour: str, *names: str, fault: int = 0, seeds: int = 1) -> str:
    """What a sanitizer says of toys, in a process of its own."""
    command = [sys.executable, "-S", "-E", "-c", PROGRAM, str(run.built("toys", flavour)), str(fault), str(seeds)]
    env = {**os.environ, **run.sanitizer(flavour)}
    done = subprocess.run([*command, *names], env=env, capture_output=True, text=True)
    assert bool(done.returncode) == ("Sanitizer" in done.stderr), done.stderr
    return done.stderr


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_sanitizers_pass_what_is_right(flavour: str) -> None:
    assert sanitized(flavour, "exchange", "rounds", "buffers", "memory", "order", "hidden", seeds=len(SEEDS)) == ""


@pytest.mark.parametrize("fault, access", [(2, "READ"), (3, "WRITE")])
def test_address_sanitizer_finds_the_first_byte_beyond(fault: int, access: str) -> None:
    said = sanitized("asan", "memory", fault=fault)
    assert "heap-buffer-overflow" in said and f"{access} of size 4" in said and "toys.cu" in said
    assert "0 bytes to the right of 36-byte" in said or "0 bytes after 36-byte" in said


@pytest.mark.parametrize(
    "fault, threads",
    [
        (1, ("thread 0 of block (", "thread 63 of block (")),
        (2, ("thread 5 of block (", "thread 5 of block (")),
        (3, ("thread ", "thread ")),
    ],
)
def test_thread_sanitizer_finds_what_no_order_shows(fault: int, threads: tuple[str, str]) -> None:
    assert [toy("hidden", fault, seed) for seed in SEEDS] == [""] * len(SEEDS)
    said = sanitized("tsan", "hidden", fault=fault)
    assert "data race" in said and "toys.cu" in said and all(f"'{words}" in said for words in threads)


@pytest.mark.parametrize("name, fault", [("exchange", 1), ("rounds", 1), ("rounds", 2), ("buffers", 1)])
def test_thread_sanitizer_finds_a_missing_barrier(name: str, fault: int) -> None:
    assert "data race" in sanitized("tsan", name, fault=fault)
