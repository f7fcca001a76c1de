"""What is measured: one literal table of cases, and the choice among them that the command line asks for.

A case is the sizes of a layer and what is done with it. Its group says why it is here: `grid` the shapes by which a
release is judged, `stacks` small layers of one to three floors in one or two directions, `field` those that other
projects publish, `sweep` lines along T, B and H for the pictures, `scan` the recurrence alone (I = 1 leaves no input
projection), `step` one step of a cell, `resets` and `lengths` what torch does by splitting and packing. `variants` are
custom cells, those of rnnkit.variants, against a loop of torch operators, and `compiled` the same over the few steps
that torch.compile can unroll; both are measured only where they are asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from . import variant_cells

VARIANTS = variant_cells.NAMES
CELLS = ("RNN", "LSTM", "GRU")
MODES = ("inference", "training")
DTYPES = ("float32", "bfloat16", "float16")
CPU, CUDA = ("cpu",), ("cuda",)
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
CUSTOM = ("variants", "compiled")
"""Groups of custom cells."""


class BadInput(ValueError):
    """What was asked for does not exist or cannot be done; the command line says so and exits with 2."""


@dataclass(frozen=True)
class BenchCase:
    """One layer and its input: B rows, T steps, I inputs, H hidden units."""

    group: str
    batch: int
    steps: int
    inputs: int
    hidden: int
    layers: int = 1
    directions: int = 1
    resets: float = 0.0
    """The share of steps at which a row's state is reset, in group `resets`."""
    cells: tuple[str, ...] = CELLS
    modes: tuple[str, ...] = MODES
    devices: tuple[str, ...] = CPU + CUDA
    quick: bool = False

    @property
    def name(self) -> str:
        """BxTxIxH, and the layers and `b` for both directions where it is not one layer in one direction."""
        deep = self.layers > 1 or self.directions > 1
        more = f"x{self.layers}{'b' if self.directions > 1 else ''}" if deep else ""
        return f"{self.batch}x{self.steps}x{self.inputs}x{self.hidden}{more}"

    @property
    def rows(self) -> float:
        """How many rows are at work in a step, on average: lengths are drawn evenly from 1 to T."""
        return self.batch * (self.steps + 1) / (2 * self.steps) if self.group == "lengths" else self.batch

    def products(self, cell: str) -> float:
        """Floating-point operations of the forward products, two for each multiply-add; training has three times it."""
        if self.group in CUSTOM:
            gates, blocks = variant_cells.products(cell)
            return 2 * self.steps * self.rows * self.hidden * (gates * self.inputs + blocks * self.hidden)
        width = self.inputs + self.hidden + (self.layers - 1) * self.hidden * (self.directions + 1)
        return 2 * self.steps * self.rows * GATES[cell] * self.hidden * self.directions * width


TABLE = (
    BenchCase("grid", 1, 1, 64, 64, quick=True),
    BenchCase("grid", 1, 128, 64, 64, quick=True),
    BenchCase("grid", 1, 128, 256, 256),
    BenchCase("grid", 1, 128, 512, 512),
    BenchCase("grid", 1, 1024, 40, 128),
    BenchCase("grid", 4, 100, 128, 128),
    BenchCase("grid", 8, 64, 256, 256),
    BenchCase("grid", 16, 128, 128, 128),
    BenchCase("grid", 32, 100, 256, 256),
    BenchCase("grid", 64, 50, 512, 512),
    BenchCase("grid", 16, 64, 768, 768),
    BenchCase("grid", 128, 64, 64, 256),
    BenchCase("grid", 256, 32, 32, 512),
    BenchCase("grid", 64, 24, 8, 16),
    BenchCase("grid", 512, 10, 4, 32),
    BenchCase("grid", 7, 33, 19, 45, quick=True),
    BenchCase("grid", 16, 100, 128, 128, layers=2, directions=2),
    BenchCase("grid", 1, 1, 64, 64, layers=3, devices=CPU),
    BenchCase("grid", 16, 1, 64, 64, layers=2, devices=CPU),
    BenchCase("grid", 1, 10, 64, 64, directions=2, devices=CPU),
    BenchCase("grid", 4, 20, 64, 64, layers=2, directions=2, devices=CPU),
    *(
        BenchCase("stacks", batch, steps, 64, 64, layers, directions, devices=CPU, quick=(batch, layers) == (1, 2))
        for layers in (1, 2, 3)
        for directions in (1, 2)
        for steps in (1, 10)
        for batch in (1, 4, 16)
    ),
    # fastrnns, in torch's own repository
    BenchCase("field", 64, 100, 512, 512),
    # FlashRNN
    BenchCase("field", 16, 1024, 768, 768, cells=("LSTM",), devices=CUDA),
    # DeepBench
    BenchCase("field", 16, 25, 512, 512, cells=("LSTM",)),
    BenchCase("field", 32, 25, 1024, 1024, cells=("LSTM",)),
    BenchCase("field", 128, 25, 2048, 2048, cells=("LSTM",), devices=CUDA),
    BenchCase("field", 16, 150, 256, 256, cells=("LSTM",)),
    BenchCase("field", 64, 150, 256, 256, cells=("LSTM",)),
    BenchCase("field", 4, 25, 1024, 1024, cells=("LSTM",), modes=("inference",)),
    BenchCase("field", 32, 187, 1536, 1536, cells=("GRU",), devices=CUDA),
    BenchCase("field", 32, 1500, 2816, 2816, cells=("GRU",), devices=CUDA),
    BenchCase("field", 1, 187, 1536, 1536, cells=("GRU",), modes=("inference",)),
    BenchCase("field", 16, 50, 1760, 1760, cells=("RNN",)),
    BenchCase("field", 128, 50, 2560, 2560, cells=("RNN",), devices=CUDA),
    # TorchRL; recurrent PPO with many environments
    BenchCase("field", 256, 128, 32, 512, devices=CUDA),
    BenchCase("field", 256, 128, 32, 512, cells=("LSTM", "GRU"), modes=("inference",), devices=CPU),
    BenchCase("field", 128, 128, 64, 256, cells=("LSTM", "GRU")),
    BenchCase("field", 4096, 16, 64, 128, cells=("LSTM", "GRU")),
    # streaming
    BenchCase("field", 1, 1, 32, 32, modes=("inference",)),
    BenchCase("field", 1, 1, 512, 512),
    BenchCase("field", 1, 1, 1024, 1024),
    # Lines through (16, 64, 128, 128), which stands under T.
    *(BenchCase("sweep", 16, steps, 128, 128) for steps in (1, 4, 16, 64, 256, 1024)),
    *(BenchCase("sweep", batch, 64, 128, 128) for batch in (1, 4, 64, 256)),
    *(BenchCase("sweep", 16, 64, size, size) for size in (16, 32, 64, 256, 512)),
    BenchCase("scan", 32, 100, 1, 128, modes=("inference",)),
    BenchCase("scan", 32, 100, 1, 256, modes=("inference",)),
    BenchCase("scan", 64, 50, 1, 512, modes=("inference",)),
    BenchCase("scan", 128, 64, 1, 256, modes=("inference",)),
    BenchCase("scan", 1, 256, 1, 128, modes=("inference",)),
    BenchCase("scan", 1, 128, 1, 256, modes=("inference",)),
    BenchCase("scan", 1, 128, 1, 512, modes=("inference",)),
    BenchCase("step", 1, 1, 64, 64, modes=("inference",), quick=True),
    BenchCase("resets", 16, 128, 128, 128, resets=0.03),
    BenchCase("resets", 64, 64, 32, 128, resets=0.02, quick=True),
    BenchCase("resets", 128, 64, 64, 256, resets=0.01),
    BenchCase("resets", 256, 128, 32, 512, resets=0.01, devices=CUDA),
    BenchCase("lengths", 16, 128, 128, 128),
    BenchCase("lengths", 64, 64, 32, 128, quick=True),
    BenchCase("lengths", 32, 100, 256, 256),
    BenchCase("lengths", 256, 128, 32, 512, devices=CUDA),
    BenchCase("variants", 4, 100, 64, 64, cells=VARIANTS, devices=CPU),
    BenchCase("variants", 32, 100, 128, 128, cells=VARIANTS, devices=CPU),
    BenchCase("variants", 2, 10, 32, 32, cells=VARIANTS, devices=CPU, quick=True),
    BenchCase("compiled", 4, 32, 64, 64, cells=VARIANTS, modes=("inference",), devices=CPU, quick=True),
    BenchCase("compiled", 32, 32, 128, 128, cells=VARIANTS, modes=("inference",), devices=CPU),
)
GROUPS = tuple(dict.fromkeys(case.group for case in TABLE))
PLAIN = ("grid", "stacks", "field", "sweep")
"""Groups of plain layers, as torch.nn has them."""
JUDGED = {"float32": ("grid", "stacks", "step", "scan", "resets", "lengths"), "bfloat16": ("grid", "scan")}
"""By dtype: the groups of which something is wanted on a CPU; `judged` on the command line."""


@dataclass(frozen=True)
class BenchJob:
    """A case with one cell in one mode and dtype: what is set up, checked and timed together."""

    case: BenchCase
    cell: str
    mode: str
    dtype: str = DTYPES[0]

    @property
    def train(self) -> bool:
        """Whether a backward follows."""
        return self.mode == "training"

    @property
    def name(self) -> str:
        """As it stands in messages."""
        narrow = "" if self.dtype == DTYPES[0] else f" {self.dtype}"
        return f"{self.case.group} {self.case.name} {self.cell} {self.mode}{narrow}"

    @property
    def flops(self) -> float:
        """Operations of the products; of the recurrent one alone in group `scan`."""
        case = self.case
        if case.group == "scan":
            return 2 * case.steps * case.batch * GATES[self.cell] * case.hidden**2
        return case.products(self.cell) * (3 if self.train else 1)


def known(what: str, wanted: Iterable[str], names: Sequence[str]) -> tuple[str, ...]:
    """The wanted names once each, spelt as in `names`; raises BadInput, with those that exist, where one does not."""
    found = []
    for name in wanted:
        meant = [n for n in names if n.lower() == name.lower()]
        if not meant:
            raise BadInput(f"unknown {what} {name!r}; there are: {', '.join(names)}")
        found += meant
    return tuple(dict.fromkeys(found))


def _cells(wanted: Sequence[str]) -> tuple[set[str], set[str], bool]:
    """The wanted cells of plain groups and of custom ones, and whether one was asked for that is custom alone. Without
    a wish it is all of both."""
    plain: set[str] = set()
    custom: set[str] = set()
    alone = False
    for name in wanted:
        every = VARIANTS if name.lower() == "variants" else [v for v in VARIANTS if v.lower() == name.lower()]
        custom |= {*every}
        alone |= any(v not in CELLS for v in every)
        if not every or name.lower() in (v.lower() for v in CELLS):
            plain |= {*known("cell", [name], (*CELLS, "variants", "each of rnnkit.variants"))}
    return (plain, custom, alone) if wanted else ({*CELLS}, {*VARIANTS}, False)


def select(
    device: str,
    cases: Sequence[str] = (),
    cells: Sequence[str] = (),
    modes: Sequence[str] = (),
    quick: bool = False,
    dtypes: Sequence[str] = (),
    compiled: bool = False,
) -> list[BenchJob]:
    """The jobs of a device. cases: names of groups, of shapes, or both as `grid/1x128x64x64`, or `judged`; empty: all
    but those of custom cells. cells: of CELLS and VARIANTS, or `variants` for all of those. dtypes: of DTYPES; empty:
    float32. compiled: whether loops are compiled.

    Raises BadInput for a name that does not exist, and where nothing is left.
    """
    here = [case for case in TABLE if device in case.devices]
    shapes = tuple(dict.fromkeys(case.name for case in here))
    both = tuple(f"{case.group}/{case.name}" for case in here)
    for name in cases:
        if name.lower() not in (*GROUPS, *shapes, *both, "judged"):
            near = ", ".join(difflib.get_close_matches(name.lower(), (*shapes, *both)))
            raise BadInput(
                f"unknown case {name!r} on {device}; there are the groups {', '.join(GROUPS)}, and in each shapes "
                f"BxTxIxH, {f'close to it {near}' if near else f'as grid/{shapes[0]}'}"
            )
    modes = known("mode", modes, MODES)
    plain, custom, alone = _cells(cells)
    dtypes = known("dtype", dtypes, DTYPES) or DTYPES[:1]
    wanted = {name.lower() for name in cases}
    jobs = [
        BenchJob(case, cell, mode, dtype)
        for dtype in dtypes
        for case in here
        if not wanted
        or wanted & {case.group, case.name, f"{case.group}/{case.name}"}
        or ("judged" in wanted and case.group in JUDGED.get(dtype, ()))
        if wanted or case.group not in CUSTOM or (alone and (compiled or case.group != "compiled"))
        if case.quick or not quick
        for cell in case.cells
        if cell in (custom if case.group in CUSTOM else plain)
        for mode in case.modes
        if not modes or mode in modes
    ]
    if not jobs:
        raise BadInput(
            "nothing is left to measure: --case, --cell, --mode"
            f"{' and --quick' if quick else ''} have no case in common on {device}"
        )
    return jobs
