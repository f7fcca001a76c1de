"""What compat.py asks of an installed rnnkit: `info`, torch.nn's numbers, lengths, resets, torch.compile."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkit
from rnnkit.backends.cpu import extension


def close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    """float32 rounding of some tens of steps, and no more."""
    difference = float((got - want).detach().abs().max())
    if not difference <= 2e-5:
        raise SystemExit(f"compat: {what} is {difference:.1e} from what it should be")


def main() -> None:
    if not extension.available():
        raise SystemExit(f"compat: the extension is not there: {extension.reason()}")
    subprocess.run([sys.executable, "-m", "rnnkit", "info"], check=True, stdout=subprocess.DEVNULL)
    for name in ("RNN", "LSTM", "GRU"):
        torch.manual_seed(0)
        theirs = getattr(nn, name)(5, 6, 2, bidirectional=True)
        ours = getattr(rnnkit, name)(5, 6, 2, bidirectional=True)
        ours.load_state_dict(theirs.state_dict())
        x, lengths = torch.randn(7, 3, 5), torch.tensor([7, 4, 2])
        want = theirs(x)[0]
        close(ours(x)[0], want, f"{name}'s output")
        grads = [torch.autograd.grad(m(x)[0].square().sum(), [*m.parameters()]) for m in (theirs, ours)]
        for a, b in zip(*grads, strict=True):
            close(b / a.abs().max(), a / a.abs().max(), f"{name}'s gradient")
        packed = theirs(pack_padded_sequence(x, lengths))[0]
        close(ours(x, lengths=lengths)[0], pad_packed_sequence(packed, total_length=7)[0], f"{name} with lengths")
        one = getattr(rnnkit, name)(5, 6)
        reset = torch.zeros(7, 3, dtype=torch.bool)
        reset[4] = True
        cut = torch.cat([one(x[:4])[0], one(x[4:])[0]])
        close(one(x, reset=reset)[0], cut, f"{name} with resets")
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        close(compiled(x, lengths=lengths)[0], ours(x, lengths=lengths)[0], f"{name} compiled")
    print(f"compat: rnnkit {rnnkit.__version__} by torch {torch.__version__} on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
