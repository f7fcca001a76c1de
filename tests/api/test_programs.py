"""Programs around the layers: DistributedDataParallel, torch.ao's quantization, copies."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import some
from torch import nn

import rnnkit

KINDS = ("RNN", "LSTM", "GRU")


DISTRIBUTED = """
import os, torch, torch.distributed as dist, rnnkit
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(0)
model = rnnkit.{kind}(3, 4, 2, bidirectional=True)
x, lengths = torch.randn(6, 4, 3), torch.tensor([6, 0, 3, 5])
mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
wrapped = DistributedDataParallel(model)
wrapped(x[:, mine], lengths=lengths[mine])[0].square().sum().backward()
shared = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
(model(x, lengths=lengths)[0].square().sum() / 2).backward()  # DDP takes the mean over the processes
torch.testing.assert_close(shared, [p.grad for p in model.parameters()])
dist.destroy_process_group()
os._exit(0)  # a thread of gloo's may outlive its group, and an ordinary end then aborts
"""


@pytest.mark.parametrize("kind", some(KINDS))
def test_two_processes_train_as_one(kind: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED.format(kind=kind))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_a_shallow_copy_shares_its_weights(kind: str) -> None:
    layer = getattr(rnnkit, kind)(3, 4)
    other = copy.copy(layer)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    assert other.weight_hh_l0 is layer.weight_hh_l0
    assert torch.equal(other(x)[0], layer(x)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantization_after_revert() -> None:
    """torch.ao knows torch's layers alone: ours stay as they are, reverted ones are quantized."""
    model = rnnkit.convert(nn.Sequential(nn.LSTM(3, 4)).eval())
    quantize = torch.ao.quantization.quantize_dynamic
    assert type(quantize(model, {nn.LSTM})[0]) is rnnkit.LSTM
    quantized = quantize(rnnkit.revert(model), {nn.LSTM})
    assert type(quantized[0]) is torch.ao.nn.quantized.dynamic.LSTM
    assert quantized(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)


def test_the_rooms_for_programs_are_imported_when_they_are_asked_for() -> None:
    code = """if True:
        import sys, rnnkit
        rooms = ("rnnkit.diagnostics", "rnnkit.sequence")
        assert not [room for room in rooms if room in sys.modules]
        assert rnnkit.diagnostics.gates and rnnkit.sequence.fit
        assert all(room in sys.modules for room in rooms)
        try:
            rnnkit.nothing
        except AttributeError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "module 'rnnkit' has no attribute 'nothing'\n", done.stderr
