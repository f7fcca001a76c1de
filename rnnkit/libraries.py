"""Libraries that ask for torch's own recurrent classes, and so pass over ours: what each does, and what to do instead.

rnnkit's layers derive from `nn.RNNBase`, not from `nn.LSTM` (torch.compile breaks its graph at any instance of that).
Where one of these libraries is loaded in the process, `convert` and `patch_torch` say so, once for each. A library that
is not loaded is never mentioned.
"""

from __future__ import annotations

import sys
import warnings
from typing import NamedTuple

COUNT = (
    "count rnnkit.revert(copy.deepcopy(model)), or use torch.utils.flop_counter.FlopCounterMode, which knows rnnkit's "
    "operators"
)
QUANTIZE = "quantize rnnkit.revert(model)"


class Library(NamedTuple):
    """A library that asks for torch's classes."""

    module: str
    """The module whose presence in sys.modules says that the library is in use."""
    passes: str
    """What it does not do for our layers."""
    instead: str
    at_import: bool
    """Whether it holds torch's classes from its import on, so that `patch_torch` comes too late for it; else it asks
    for `nn.LSTM` when it is called, and under `patch_torch` that is ours."""


# Read in the sources that stand beside each line. Not listed: torch.ao.quantization.quantize_dynamic, which asks too,
# but `import torch` loads it, so its presence says nothing.
LIBRARIES: tuple[Library, ...] = (
    # pytorch/opacus, opacus/validators/lstm.py, module_validator.py: `type(sub_module) in FIXERS`, keyed by nn.LSTM
    Library(
        "opacus",
        "ModuleValidator replaces no rnnkit.LSTM by its DPLSTM",
        "call ModuleValidator.fix before rnnkit.convert, or rnnkit.revert(model) first",
        True,
    ),
    # deepspeedai/DeepSpeed, deepspeed/profiling/flops_profiler/profiler.py: `type(module) in MODULE_HOOK_MAPPING`
    Library("deepspeed.profiling.flops_profiler", "the flops profiler counts 0 for rnnkit layers", COUNT, True),
    # sovrasov/flops-counter.pytorch, ptflops/pytorch_engine.py: `type(module) in MODULES_MAPPING`, else a zero-op
    Library("ptflops", "get_model_complexity_info counts 0 for rnnkit layers", COUNT, True),
    # Lyken17/pytorch-OpCounter and ultralytics/thop, thop/profile.py: `type(m) in register_hooks`
    Library("thop", "profile counts 0 for rnnkit layers", COUNT, True),
    # VainF/Torch-Pruning, torch_pruning/ops.py: `isinstance(module, TORCH_LSTM)`, which is nn.LSTM as imported
    Library(
        "torch_pruning",
        "an rnnkit.LSTM is taken for an elementwise operation and its weights are not pruned",
        "prune rnnkit.revert(model) and convert it afterwards",
        True,
    ),
    # Xilinx/brevitas, brevitas/graph/quantize_impl.py: `isinstance(model, tuple(layer_map.keys()))`, keyed by nn.LSTM
    Library("brevitas", "layers of rnnkit are not replaced by its quantized ones", QUANTIZE, True),
    # intel/intel-extension-for-pytorch, nn/utils/_lstm_convert.py: `isinstance(child, torch.nn.LSTM)`
    Library(
        "intel_extension_for_pytorch",
        "optimize replaces no rnnkit.LSTM by its own",
        "nothing where rnnkit's kernels shall run; else call optimize before rnnkit.convert",
        False,
    ),
    # pytorch/pytorch, torch/ao/quantization/fx/utils.py: `isinstance(mod, torch.nn.LSTM)`, and its backend's patterns
    Library("torch.ao.quantization.quantize_fx", "layers of rnnkit stay in float", QUANTIZE, True),
)
_said: set[str] = set()


def warn_of_libraries(what: str, *, patched: bool) -> None:
    """Warn of each library in the process that passes over our layers, if nothing did before.

    what: the call that made them, for the text. patched: whether torch.nn's names mean ours from now on.
    """
    for library in LIBRARIES:
        if library.module not in sys.modules or library.module in _said or (patched and not library.at_import):
            continue
        _said.add(library.module)
        name = library.module.partition(".")[0] if not library.module.startswith("torch.") else library.module
        warnings.warn(
            f"{name} is loaded and asks for torch.nn's own classes, which layers made by {what} are not: "
            f"{library.passes}; {library.instead}",
            stacklevel=3,
        )
