"""How many threads the CPU engine takes: no more than can run at once, and the same bits whatever the number.

Quotas are read from made-up trees of cgroups. Masks and variables of the environment belong to processes of their own.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from programs import program

from rnnkit.backends.cpu import extension

pytestmark = pytest.mark.skipif(not extension.available(), reason=extension.reason())
linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity masks are Linux's")

V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct"
OTHER = "33 31 0:30 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset"
PART = "31 23 0:28 /docker/7f /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"
"""As a container without a namespace of its own sees it: the part of the hierarchy that it has, and its whole path."""
SPACE = r"31 23 0:28 / /sys/fs/my\040groups rw - cgroup2 none rw"

QUOTAS = {
    "nothing at all": (None, None, {}, 0),
    "version 2": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
    "rounded up": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
    "less than one": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "1000 100000"}, 1),
    "max": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "max 100000"}, 0),
    "no file": ("0::/", V2, {}, 0),
    "nested, the parent has less": (
        "0::/pod/box",
        V2,
        {"sys/fs/cgroup/pod/cpu.max": "300000 100000", "sys/fs/cgroup/pod/box/cpu.max": "800000 100000"},
        3,
    ),
    "nested, the child has less": (
        "0::/pod/box",
        V2,
        {"sys/fs/cgroup/pod/cpu.max": "max 100000", "sys/fs/cgroup/pod/box/cpu.max": "100000 50000"},
        2,
    ),
    "a cgroup that is another's": ("0::/pod", V2, {"sys/fs/cgroup/podium/cpu.max": "100000 100000"}, 0),
    "beyond the namespace": ("0::/../other", V2, {"sys/fs/cgroup/cpu.max": "500000 100000"}, 5),
    "a folder with a space": ("0::/", SPACE, {"sys/fs/my groups/cpu.max": "400000 100000"}, 4),
    "version 1": (
        "4:cpu,cpuacct:/job\n3:cpuset:/\n0::/",
        f"{OTHER}\n{V1}",
        {
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "250000",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
        },
        3,
    ),
    "version 1, none": (
        "4:cpu,cpuacct:/",
        V1,
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        0,
    ),
    "version 1, part of it": (
        "4:cpu:/docker/7f/box",
        PART,
        {
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "700000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "600000",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
        },
        6,
    ),
    "version 1, elsewhere": (
        "4:cpu:/docker/7fff",
        PART,
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "700000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
        7,
    ),
    "both versions": (
        "4:cpu,cpuacct:/\n0::/",
        f"{V1}\n{V2}",
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "900000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu.max": "800000 100000",
        },
        8,
    ),
    "no period": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "100000"}, 0),
    "a period of nothing": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "100000 0"}, 0),
    "words": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "two cpus"}, 0),
    "a tail": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "100000x 100000"}, 0),
    "more than 64 bits": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "99999999999999999999 100000"}, 0),
    "the largest number": ("0::/", V2, {"sys/fs/cgroup/cpu.max": f"{2**63 - 1} 100000"}, -(-(2**63 - 1) // 100000)),
    "an empty file": ("0::/", V2, {"sys/fs/cgroup/cpu.max": ""}, 0),
    "other lines": ("\n:\n0\n0:\n::\n0::/", f"\n-\n - \n1 2 - cgroup2\n{V2}", {"sys/fs/cgroup/cpu.max": "2 1"}, 2),
    "bytes": ("\0\x7f:" * 99, " - cgroup2 \0\n" * 99, {"sys/fs/cgroup/cpu.max": "\0"}, 0),
}


@linux
@pytest.mark.parametrize("name", QUOTAS)
def test_the_quota_of_a_made_up_tree(name: str, tmp_path: Path) -> None:
    cgroup, mounts, files, cpus = QUOTAS[name]
    proc = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts}
    for path, text in {**proc, **files}.items():
        if text is not None:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text + "\n")
    assert torch.ops.rnnkit.cpu_quota(str(tmp_path)) == cpus


def test_another_number_of_torchs_threads_has_effect_at_once() -> None:
    for count in (1, 3, 2, 64, 65):
        torch.set_num_threads(count)
        found = extension.workers()
        assert found is not None
        assert (found.workers, found.torch, found.asked) == (min(count, 64), count, 64)
        assert found.limit == ("RNNKIT_CPU_THREADS" if count > 64 else "torch's threads")


MASK = """
import os, torch
from layers import assert_same, both, make
from rnnkit.backends.cpu import extension
every = os.sched_getaffinity(0)
torch.set_num_threads(5)
sizes = ((12, 24, 4, 48), (4, 2, 4, 200))
found = []
for mask in (every, {min(every)}, every):
    os.sched_setaffinity(0, mask)
    now = extension.workers()
    assert now.affinity == len(mask) and now.torch == 5 and now.asked == 0, now
    assert now.workers == min(5, len(mask), now.quota or 5), now
    if now.workers == len(mask) < min(5, now.quota or 5):
        assert now.limit == "the affinity mask", now.limit
    found.append([both(make("lstm", size=size)) for size in sizes])
exact = ("y", "h_n", "c_n", "gates", "c", "dh_0", "dc_0")
for some in found[1:]:
    for got, want in zip(some, found[0]):
        assert_same(got, want, only=exact)
print("same")
"""


@linux
def test_a_mask_of_one_cpu() -> None:
    """It holds at the next call, and no longer than it is set."""
    assert program(MASK, RNNKIT_CPU_THREADS="").strip() == "same"


BOUND = """
import torch
from rnnkit.backends.cpu import extension
torch.set_num_threads(5)
print(extension.workers().affinity)
"""


@linux
@pytest.mark.parametrize("bind", ["true", "false"])
def test_threads_that_openmp_binds(bind: str) -> None:
    """Then each has a mask of one CPU, which is no limit of the process."""
    cpus = int(program(BOUND, RNNKIT_CPU_THREADS="", OMP_PROC_BIND=bind))
    assert cpus == (0 if bind == "true" else len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("asked", ["0", "-2", "two", "2 ", "99999999999999999999"])
def test_a_number_of_threads_that_is_none(asked: str) -> None:
    text = "from rnnkit.backends.cpu import extension; print(extension.workers(), extension.refusal)"
    said = program(text, RNNKIT_CPU_THREADS=asked)
    assert f"None RNNKIT_CPU_THREADS must be a number of threads from 1 on, got '{asked}'; unset it" in said


ONE_CPU = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from layers import OF_THE_SCAN, assert_same, backward, forward, gradients_for, make
from rnnkit.backends.cpu import extension
for cell, size in (("lstm", (3, 256, 4, 20)), ("gru", (3, 2, 4, 1040)), ("gru_reset_before", (3, 2, 4, 1040))):
    layer = make(cell, size=size)
    found = {}
    for count in (1, 4, 16, 64):
        torch.set_num_threads(count)
        assert extension.workers().workers == count
        results = forward(layer)
        gradients = backward(layer, results, gradients_for(results))
        found[count] = {**results, **{name: v for name, v in gradients.items() if name in OF_THE_SCAN}}
    for count in (4, 16, 64):
        assert_same(found[count], found[1])
print("same")
"""


@linux
def test_64_workers_on_one_cpu_end_with_equal_bits() -> None:
    """By rows and, at 1040 units in vectors of four, by units: 65 panels, so that 64 threads meet at each step."""
    assert program(ONE_CPU, timeout=300, RNNKIT_CPU_ISA="baseline").strip() == "same"


POOL = """
import os, signal, threading, torch
from layers import OF_THE_SCAN, assert_same, backward, forward, gradients_for, make

def scan(layer):
    results = forward(layer)
    gradients = backward(layer, results, gradients_for(results))
    return {**results, **{name: v for name, v in gradients.items() if name in OF_THE_SCAN}}

torch.set_num_threads(1)
layers = [make("lstm", size=size, seed=seed) for size in ((12, 24, 4, 48), (4, 2, 4, 200)) for seed in range(2)]
alone = [scan(layer) for layer in layers]
torch.set_num_threads(5)
errors = []

def work(k):
    try:
        torch.set_num_threads(5)
        for _ in range(5):
            assert_same(scan(layers[k]), alone[k])
    except BaseException as error:
        errors.append(error)

for _ in range(2):
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
assert not errors, errors
child = os.fork()
if child == 0:
    signal.alarm(60)
    work(3)
    os._exit(len(errors))
assert os.waitpid(child, 0)[1] == 0
work(0)
assert not errors, errors
print("same")
"""


def test_fewer_workers_than_torch_has_threads() -> None:
    """They are the engine's own threads: for one call at a time, with others beside it, and not after a fork."""
    assert program(POOL, RNNKIT_CPU_THREADS="3").strip() == "same"


FOLLOWED = """
import os, torch
from layers import forward, make

torch.set_num_threads(5)
layer, every = make("lstm", size=(12, 24, 4, 48)), os.sched_getaffinity(0)
before = set(os.listdir("/proc/self/task"))
forward(layer)
helpers = [int(tid) for tid in set(os.listdir("/proc/self/task")) - before]
assert helpers
for mask in (every, {max(every)}, every):
    os.sched_setaffinity(0, mask)
    forward(layer)
    assert [os.sched_getaffinity(tid) for tid in helpers] == [mask] * len(helpers), mask
print("same")
"""


@linux
def test_the_engines_threads_run_where_their_caller_may() -> None:
    assert program(FOLLOWED, RNNKIT_CPU_THREADS="3").strip() == "same"


TAKEN_UP = """
import os, torch
import rnnkit

def status(tid):
    with open(f"/proc/self/task/{tid}/status") as lines:
        return dict(line.strip().split(":", 1) for line in lines)

def slept():  # how often each helper fell asleep, once all sleep
    while any(status(tid)["State"].split()[0] != "S" for tid in helpers):
        os.sched_yield()
    return [int(status(tid)["voluntary_ctxt_switches"]) for tid in helpers]

def tasks():
    return set(os.listdir("/proc/self/task"))

layer, x = rnnkit.GRU(4, 48, 2, backend="cpu"), torch.randn(12, 24, 4)
with torch.no_grad():
    torch.set_num_threads(1)
    before = tasks()
    layer(x)
    assert tasks() == before, "one thread, and others were started"
    torch.set_num_threads(5)
    layer(x)
    helpers = sorted(tasks() - before)
    assert len(helpers) == 2, helpers
    for threads in (1, 5, 1, 2, 5):
        torch.set_num_threads(threads)
        seen = slept()
        layer(x)
        worked = [now > then for now, then in zip(slept(), seen)]
        assert worked == [threads == 5] * 2, (threads, worked)
print("same")
"""


@linux
def test_another_number_of_torchs_threads_is_what_the_next_call_uses() -> None:
    """By the threads that worked: with five of torch's where three may run they are the engine's own, which nothing
    else wakes; with up to three of torch's, torch runs them."""
    assert program(TAKEN_UP, RNNKIT_CPU_THREADS="3").strip() == "same"


def test_a_wrong_number_of_threads_is_refused_with_one_thread_too() -> None:
    text = """
import torch
torch.set_num_threads(1)
from layers import forward, make
try:
    forward(make("lstm"))
except RuntimeError as error:
    print(error)
"""
    assert "RNNKIT_CPU_THREADS must be a number of threads" in program(text, RNNKIT_CPU_THREADS="two")
