"""What holds for every test: memory that nobody wrote is poison, one thread, fixed seeds, rnnkit's own times.

One seed is another in each run, that of the steps which `test_custom_drawn_steps.py` draws. It is printed at the end,
and RNNKIT_DRAWN_SEED repeats it.

With deterministic algorithms on, torch itself fills what `empty`, `new_empty` and `empty_like` return, NaN for
floating dtypes and the largest value for integers. The extension, which asks torch below that, does so by a variable
of the environment. A kernel that forgets an element, or reads one too early, gives NaN in every run and not one in a
hundred.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator

os.environ["RNNKIT_FILL_NEW_MEMORY"] = "1"  # read when the extension first makes a tensor
os.environ["RNNKIT_CPU_THREADS"] = "64"  # work is split among as many threads as a test asks for, on any machine
os.environ["RNNKIT_TUNED"] = "0"  # no table that `python -m rnnkit tune` made of this machine
os.environ.setdefault("RNNKIT_DRAWN_SEED", str(random.SystemRandom().randrange(10**6)))  # workers have it from here

import pytest
import torch
from engine import Checking, install
from hypothesis import settings

settings.register_profile("rnnkit", derandomize=True, deadline=None, database=None, print_blob=False)
settings.load_profile("rnnkit")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", metavar="K/N", help="one of N parts of the tests, by a digest of a name")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, config.getoption("--part").split("/"))
    if parts > 1:
        every: list[list[pytest.Item]] = [[] for _ in range(parts)]
        for item in items:
            every[zlib.crc32(item.nodeid.encode()) % parts].append(item)
        items[:] = every.pop(part - 1)
        config.hook.pytest_deselected(items=[item for other in every for item in other])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say of which seed steps were drawn, where some were."""
    ran = [r for some in ("passed", "failed") for r in terminalreporter.stats.get(some, [])]
    if any(r.nodeid.partition("::")[0].endswith("test_custom_drawn_steps.py") for r in ran):
        terminalreporter.write_line(f"steps were drawn with RNNKIT_DRAWN_SEED={os.environ['RNNKIT_DRAWN_SEED']}")


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """NaN in uninitialised memory, for as long as the test runs."""
    fill, mode = torch.utils.deterministic.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def steady() -> Iterator[None]:
    """One thread, so that sums come in one order, and the same random numbers in every run. What a test leaves of the
    precision of recurrent products is undone: the choice of a GPU's kernel depends on it."""
    threads, rnn = torch.get_num_threads(), torch.backends.cudnn.rnn
    precision = rnn.fp32_precision  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    torch.manual_seed(20260)
    yield
    torch.set_num_threads(threads)
    if rnn.fp32_precision != precision:  # type: ignore[attr-defined]
        rnn.fp32_precision = precision  # type: ignore[attr-defined]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Checking:
    """A backend whose operators check everything, in the place of `cpu`."""
    return install(monkeypatch)
