"""What can be wrong with a step: an error of its author, or only too much for a kernel."""


class StepError(ValueError):
    """The step cannot run as a cell on any backend: it returns the wrong states, changes its arguments, draws random
    numbers."""


class NotTraced(Exception):
    """No kernel is made from this step; the reference runs it. The text names the operation and what to write instead,
    so that it can stand behind "the reference runs this cell: "."""
