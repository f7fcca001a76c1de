"""Looking inside recurrent layers: how gradients travel, what gates do, whether a layer remembers, how it starts.

`gradient_flow` and `gates` work on rnnkit's and torch.nn's layers and cells, alone or inside any module.
`adding_problem` and `copy_task` are questions that only memory answers. `initialise` has the ways to start.
"""

from . import initialise
from .flow import GradientFlow, gradient_flow
from .gating import Gates, gates
from .tasks import Adding, Copying, adding_problem, copy_task

__all__ = [
    "Adding",
    "Copying",
    "Gates",
    "GradientFlow",
    "adding_problem",
    "copy_task",
    "gates",
    "gradient_flow",
    "initialise",
]
