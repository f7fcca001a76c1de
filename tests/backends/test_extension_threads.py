"""The extension among threads and processes, and over time: bits that do not change, no deadlock, flat memory.

Sizes are chosen so that scans are split among threads by rows (several rows for each thread) and by units (few rows,
wide layers, threads that wait for one another at every step). What may hang runs in a process of its own with a
time limit.
"""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator

import pytest
import torch
from layers import CELLS_AND_PROJECTION, OF_THE_SCAN, assert_same, backward, both, forward, gradients_for, make
from programs import program

import rnnkit.ops
from rnnkit.backends.cpu import extension

pytestmark = pytest.mark.skipif(not extension.available(), reason=extension.reason())

BY_ROWS = (12, 24, 4, 48)
BY_UNITS = (4, 2, 4, 200)
"""T, B, I, H: above 2^16 multiply-adds a step and 64 units, for every cell but the vanilla one, which has WIDE."""
WIDE = (4, 2, 4, 330)
every_cell = pytest.mark.parametrize(("cell", "proj"), [(c, p and 150) for c, p in CELLS_AND_PROJECTION])


def by_units(cell: str) -> tuple[int, int, int, int]:
    return WIDE if cell.startswith("rnn") else BY_UNITS


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may set torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_cell
@pytest.mark.parametrize("split", ["rows", "units"])
@pytest.mark.parametrize("reverse", [False, True])
def test_threads_change_nothing_in_the_scan(cell, proj, split, reverse, threads):
    size = BY_ROWS if split == "rows" else by_units(cell)
    layer = make(cell, proj and min(proj, size[3]), size=size, reverse=reverse)
    found = []
    for count in (1, 2, 3, 7, 64):
        torch.set_num_threads(count)
        results = forward(layer, all_states=True)
        gradients = backward(layer, results, gradients_for(results))
        found.append({**results, **{name: v for name, v in gradients.items() if name in OF_THE_SCAN}})
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_many_threads_of_python_at_once(cell, threads):
    """Each makes a scan of its own, split by units; more threads than cores wait for one another."""
    torch.set_num_threads(2)
    layers = [make(cell, size=BY_UNITS, seed=seed) for seed in range(8)]
    alone = [both(layer) for layer in layers]
    found: list[list[dict[str, torch.Tensor]]] = [[] for _ in layers]
    errors: list[BaseException] = []

    def work(k: int) -> None:
        try:
            torch.set_num_threads(2)
            for _ in range(4):
                found[k].append(both(layers[k]))
        except BaseException as error:
            errors.append(error)
            raise

    workers = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(len(layers))]
    for w in workers:
        w.start()
    for w in workers:
        w.join(timeout=120)
    assert not any(w.is_alive() for w in workers), "threads wait for one another for ever"
    assert not errors
    for some, want in zip(found, alone, strict=True):
        assert len(some) == 4
        for got in some:
            assert_same(got, want)


FORKED = """
import os, signal, torch
from layers import ORDER, OF_THE_SCAN, backward, both, forward, gradients_for, make
torch.set_num_threads(2)
layers = [make("lstm", size=size) for size in ((12, 24, 4, 48), (4, 2, 4, 200))]
before = [both(layer) for layer in layers]

def scan():
    found = []
    for layer in layers:
        results = forward(layer)
        needs = sum(1 << ORDER.index(name) for name in OF_THE_SCAN)
        gradients = backward(layer, results, gradients_for(results), needs)
        found.append({**results, **{f"d{name}": v for name, v in gradients.items()}})
    return found

def everything():
    torch.set_num_threads(1)
    return [both(layer) for layer in layers]

for work in (scan, everything):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends the child where it hangs
        exact = ("y", "h_n", "c_n", *(f"d{name}" for name in OF_THE_SCAN))
        after = work()
        ok = all(torch.equal(a[name], b[name]) for a, b in zip(after, before) for name in exact)
        os._exit(0 if ok else 1)
    print(os.waitpid(child, 0)[1])
"""


def test_a_forked_process_runs_the_engine_again():
    """The scans as they are. The products around a backward are torch's, which need one thread in a forked process:
    there torch's own `a @ a` waits for ever for the threads of its parent."""
    assert program(FORKED).split() == ["0", "0"]


FORKED_FIRST = """
import os, signal, torch, rnnkit
torch.set_num_threads(2)
a = torch.randn(600, 600)
a @ a  # torch's threads are there now, in this process
layers = [getattr(rnnkit, name)(256, 256, backend="cpu") for name in ("RNN", "LSTM", "GRU")]
x, gy = torch.randn(100, 32, 256), torch.randn(100, 32, 256)
child = os.fork()
if child == 0:
    signal.alarm(60)
    for layer in layers:
        y = layer(x)[0]
        torch.autograd.grad(y, layer.parameters(), gy)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


def test_the_first_large_layer_of_a_forked_process():
    """Large enough for torch's products, which there wait for ever; nor may they be timed to choose among products."""
    assert program(FORKED_FIRST).split() == ["0"]


FEWER = """
import layers
import torch
from layers import assert_same, both, make
results = {}
for size in ((12, 24, 4, 48), (4, 2, 4, 200)):
    for count in (1, 4):
        torch.set_num_threads(count)
        results[count] = both(make("lstm", size=size))
    assert_same(results[4], results[1], only=("y", "h_n", "c_n", "gates", "c", "dh_0", "dc_0"))
print("same")
"""


@pytest.mark.parametrize("limit", ["1", "2", "3"])
def test_openmp_may_give_fewer_threads_than_torch_asks_for(limit):
    """Then one call stands for several parts."""
    assert program(FEWER, OMP_THREAD_LIMIT=limit).strip() == "same"


def test_memory_stays_flat():
    layer = make("lstm", 5, size=(6, 4, 8, 32))

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    def run(count: int) -> None:
        for _ in range(count):
            results = forward(layer, all_states=True)
            backward(layer, results, grads)

    grads = gradients_for(forward(layer, all_states=True))
    run(300)
    before = peak()
    run(2000)
    # One result of 6 x 4 x 128 gates is 12 KiB: a leak of one in each iteration would be 24 MiB.
    assert peak() - before < 2048


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru", "gru_reset_before"])
def test_a_long_sequence(cell):
    """T = 100,000: the last states depend on the last steps alone, and inference keeps nothing but its output."""
    layer = make(cell, size=(100_000, 1, 2, 8), lengths=False, reset=False)
    found = both(layer)
    assert all(v.isfinite().all() for v in found.values())
    tail = layer.change(x=layer.t.x[-2000:].contiguous())
    assert torch.allclose(forward(tail)["h_n"], found["h_n"], atol=1e-5)
    assert torch.equal(forward(layer, save=False)["y"], found["y"])


def test_a_wide_layer():
    """H = 4096: indices into weights of 2^26 elements; one unit against a product in float64."""
    g = torch.Generator().manual_seed(0)
    hidden = 4096
    w_hh = torch.randn(4 * hidden, hidden, generator=g) / hidden**0.5
    w_ih = torch.randn(4 * hidden, 3, generator=g)
    x, h_0, c_0 = (torch.randn(*s, generator=g) for s in ((2, 1, 3), (1, hidden), (1, hidden)))
    y, _, _, c_all = rnnkit.ops.layer("lstm", x, h_0, c_0, [w_ih, w_hh], all_states=True, backend="cpu")
    a = x[0].double() @ w_ih.double().T + h_0.double() @ w_hh.double().T
    i, f, cell, o = a.chunk(4, -1)
    c = f.sigmoid() * c_0.double() + i.sigmoid() * cell.tanh()
    # K = 4096 products whose magnitudes sum to about 41: rounding errors, as good as random, stay below
    # sqrt(K) u 41 = 1.6e-4 (Higham and Mary, 2019); the gates pass on no more
    assert (c_all[0] - c).abs().max() < 2e-4
    assert (y[0] - o.sigmoid() * c.tanh()).abs().max() < 2e-4
