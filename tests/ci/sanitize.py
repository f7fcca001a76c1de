"""The extension under AddressSanitizer and UndefinedBehaviorSanitizer: random layers through `rnnkit.ops.layer` and,
every third, of cells of `rnnkit.variants` through `rnnkit.Custom`; and programs of which one word is another.

Without arguments of its own it builds the extension with the sanitizers into build/sanitize, by the same setup.py,
beside links to the package's Python files, and starts itself again there with the sanitizer's library loaded first.
There every problem runs forward and backward on backend `cpu`; memory that nobody wrote is NaN, and no result may be.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "sanitize"
# A compiler with more flags after those of setup.py, at whose -O3 the sanitized templates compile for minutes. For the
# same reason the engine has UBSan in the harness only.
WRAPPER = """#!/bin/sh
case "$*" in
  *" -c "*/csrc/cpu/*) exec {compiler} "$@" -O1 -g1 -fsanitize=address ;;
  *) exec {compiler} "$@" -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all ;;
esac
"""
COMPILER = os.environ.get("CXX", "g++")


def build() -> None:
    """The sanitized library and the links."""
    package = TREE / "rnnkit"
    package.mkdir(parents=True, exist_ok=True)
    for source in [*(ROOT / "rnnkit").iterdir(), ROOT / "kernels", ROOT / "benchmarks"]:
        link = package / source.name
        if source.name != "__pycache__" and source.suffix != ".so" and not link.is_symlink():
            link.symlink_to(source)
    compiler = TREE / "c++"
    compiler.write_text(WRAPPER.format(compiler=COMPILER), encoding="utf-8")
    compiler.chmod(0o755)
    env = {**os.environ, "CXX": str(compiler), "RNNKIT_EXTENSION": "1"}
    env.setdefault("MAX_JOBS", "2")
    command = ["setup.py", "-q", "build_ext", f"--build-lib={TREE}", f"--build-temp={TREE / 'objects'}"]
    subprocess.run([sys.executable, *command], cwd=ROOT, env=env, check=True)


def again(arguments: list[str]) -> int:
    """This file with the sanitizers' libraries first in the process."""
    names = ("libasan.so", "libubsan.so")
    found = [subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip() for name in names]
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(found),
        # Python and torch leave memory behind at exit.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(TREE),
        "RNNKIT_SANITIZED": "1",
        # Of torch's one, two or three threads: the third case is the engine's own pool.
        "RNNKIT_CPU_THREADS": "2",
    }
    return subprocess.run([sys.executable, __file__, *arguments], cwd=TREE, env=env).returncode


def problem(r: random.Random) -> str:
    """Run one random layer forward and backward. Returns what it was."""
    import torch

    import rnnkit.ops
    from rnnkit.cells import CELLS

    cell = r.choice(sorted(CELLS))
    dtype = r.choice((torch.float32, torch.float64, torch.bfloat16, torch.float16))
    steps, rows, features = r.choice((0, 1, 2, 5, 9)), r.choice((0, 1, 2, 3, 8, 17)), r.choice((0, 1, 3, 17, 33))
    hidden = r.choice((1, 2, 7, 16, 31, 64, 67, 130))
    proj = r.choice((1, 5, 70)) if cell == "lstm" and r.random() < 0.3 else 0
    state, gates = proj or hidden, CELLS[cell].gates
    bias, lengths, reset, reset_state, reverse, all_states, recompute, expanded = (r.random() < 0.5 for _ in range(8))
    what = (
        f"{cell} {dtype} T={steps} B={rows} I={features} H={hidden} P={proj} bias={bias} lengths={lengths}"
        f" reset={reset} reset_state={reset_state} reverse={reverse} all_states={all_states} recompute={recompute}"
    )

    def leaf(*sizes: int) -> torch.Tensor:
        v = torch.randn(sizes, dtype=torch.float64) / max(sizes[-1], 1) ** 0.5
        if len(sizes) > 1 and r.random() < 0.3:  # other strides
            v = v.transpose(0, 1).contiguous().transpose(0, 1)
        return v.to(dtype).requires_grad_()

    shapes = [(gates * hidden, features), (gates * hidden, state)]
    shapes += [(gates * hidden,)] * (2 * bias) + [(proj, hidden)] * bool(proj)
    weights = [leaf(*shape) for shape in shapes]
    x = leaf(steps, rows, features)
    h = leaf(rows, state) if r.random() < 0.7 else None
    c = leaf(rows, hidden) if cell == "lstm" and h is not None else None
    h_r = [leaf(rows, state)] + ([leaf(rows, hidden)] if cell == "lstm" else [])
    extra = {
        "lengths": torch.tensor([r.randint(0, steps) for _ in range(rows)], dtype=torch.int64) if lengths else None,
        "reset": torch.rand(steps, rows) < 0.4 if reset else None,
        "reset_state": (h_r if cell == "lstm" else h_r[0]) if reset and reset_state else None,
    }
    torch.set_num_threads(r.choice((1, 2, 3)))
    y, h_n, c_n, c_all = rnnkit.ops.layer(
        cell, x, h, c, weights, reverse=reverse, all_states=all_states, recompute=recompute, backend="cpu", **extra
    )
    outputs = [v for v in (y, h_n, c_n, c_all) if v is not None and r.random() < 0.7] or [y]
    given = [torch.ones((), dtype=dtype).expand_as(v) if expanded else torch.randn_like(v) for v in outputs]
    leaves = [v for v in (x, h, c, *weights, *(h_r if extra["reset_state"] is not None else [])) if v is not None]
    grads = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
    if not all(v.isfinite().all() for v in (*outputs, *grads) if v is not None):
        raise SystemExit(f"not finite: {what}")
    return what


def custom_problem(r: random.Random) -> str:
    """The same for a layer of a variant."""
    import torch

    import rnnkit
    from rnnkit import variants
    from rnnkit.custom.declare import spec_of

    name = r.choice(("LSTM", "GRUResetBefore", "LayerNormLSTM", "SLSTM", "AUGRU", "IndRNN", "ZoneoutGRU", "BlockGRU"))
    dtype = r.choice((torch.float32, torch.float64, torch.bfloat16, torch.float16))
    steps, rows, features = r.choice((1, 2, 9, 40)), r.choice((0, 1, 3, 17)), r.choice((1, 3, 17))
    hidden, heads = r.choice(((2, 1), (7, 1), (16, 1), (31, 1), (66, 3), (130, 2), (600, 1)))
    bias, lengths, reset, recompute, both = (r.random() < 0.5 for _ in range(5))
    what = f"{name} {dtype} T={steps} B={rows} I={features} H={hidden}/{heads} {lengths=} {reset=} {recompute=} {both=}"
    cell = getattr(variants, name)
    layer = rnnkit.Custom(
        cell,
        features,
        hidden,
        bias=bias,
        bidirectional=both,
        dtype=dtype,
        backend="cpu",
        recompute=recompute,
        heads=heads,
    )
    spec, directions = spec_of(cell), 2 if both else 1
    x = torch.randn(steps, rows, features).to(dtype).requires_grad_()
    given = {n: torch.rand((steps, rows) if kind == "row" else (steps, rows, hidden)) for n, kind, _ in spec.steps}
    given = {
        n: v.to(dtype).requires_grad_(grad) for (n, v), (_, _, grad) in zip(given.items(), spec.steps, strict=True)
    }
    hx = tuple((torch.rand(directions, rows, hidden) + 1).to(dtype).requires_grad_() for _ in spec.states)
    torch.set_num_threads(r.choice((1, 2, 3)))
    if r.random() < 0.3:
        hx = ()
    y, states = layer(
        x,
        None if not hx else hx if len(hx) > 1 else hx[0],
        lengths=torch.tensor([r.randint(0, steps) for _ in range(rows)], dtype=torch.int64) if lengths else None,
        reset=torch.rand(steps, rows) < 0.4 if reset else None,
        return_all_states=False,
        **given,
    )
    outputs = [y, *(states if isinstance(states, tuple) else (states,))]
    leaves = [x, *hx, *layer.parameters(), *(v for v in given.values() if v.requires_grad)]
    grads = torch.autograd.grad(outputs, leaves, [torch.randn_like(v) for v in outputs], allow_unused=True)
    if name != "SLSTM" and not all(v.isfinite().all() for v in (*outputs, *grads) if v is not None):
        raise SystemExit(f"not finite: {what}")
    return what


def wrong_words(r: random.Random, times: int) -> int:
    """Programs of which one word is another: an error, or numbers. Returns how many were refused."""
    import struct

    import torch

    from rnnkit import variants
    from rnnkit.backends.cpu import extension
    from rnnkit.backends.cpu import program as cpu
    from rnnkit.custom import check, program
    from rnnkit.custom.declare import spec_of
    from rnnkit.custom.inputs import CellInputs

    spec = spec_of(variants.LayerNormLSTM)
    made = check.program_of(spec, 8).program
    right = program.forward_words(program.ProgramKey(made), True, 3)
    words = list(struct.unpack(f"<{len(right) // 8}q", right))
    units = tuple(torch.rand(8) for _ in spec.units)
    state = (torch.rand(2, 8), torch.rand(2, 8))
    weights = tuple(torch.rand(blocks * 8, 8) for _, blocks in spec.weights)
    biases = torch.rand(32), torch.rand(32)
    t = CellInputs(torch.rand(3, 2, 5), state, torch.rand(32, 5), *biases, weights, units, (), None, None, ())
    refused = 0
    for _ in range(times):
        k = r.randrange(len(words))
        value = r.choice((-2, -1, 0, 1, 2, 3, 5, 9, 17, 33, 64, 4096, 1 << 40, words[k] + 1, words[k] - 1))
        changed = struct.pack(f"<{len(words)}q", *(value if i == k else v for i, v in enumerate(words)))
        try:
            extension.native.program_forward(changed, 1, 0, 2, cpu._tensors(made, t))
        except RuntimeError:
            refused += 1
    return refused


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--problems", type=int, default=300)
    arguments.add_argument("--seed", type=int, default=1)
    o = arguments.parse_args()
    if "RNNKIT_SANITIZED" not in os.environ:
        build()
        return again(sys.argv[1:])

    import torch

    from rnnkit.backends.cpu import extension

    if extension.reason():
        raise SystemExit(extension.reason())
    os.environ["RNNKIT_FILL_NEW_MEMORY"] = "1"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    r = random.Random(o.seed)
    torch.manual_seed(o.seed)
    for k in range(1, o.problems + 1):
        what = problem(r) if k % 3 else custom_problem(r)
        if k % 100 == 0:
            print(f"{k} layers, the last: {what}", flush=True)
    print(f"{wrong_words(r, 10 * o.problems)} of {10 * o.problems} programs with a wrong word refused")
    print(f"{o.problems} layers forward and backward under AddressSanitizer and UBSan: nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
