"""The API reference is true to the code: what a docstring's `Args:` names are parameters, and each stands on a line.

The site (`make docs`) is made of these docstrings. It shows an argument that does not exist, or two in one line, as it
is told to.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import rnnkit
from rnnkit import diagnostics, sequence, variants
from rnnkit.diagnostics import initialise

OWN_LINE = "has no line of its own"


def public() -> Iterator[tuple[str, Any]]:
    """Every public function, class and method of the package, by name."""
    places = {"rnnkit": rnnkit, "functional": rnnkit.functional, "sequence": sequence, "diagnostics": diagnostics}
    places["variants"] = variants
    for place, module in places.items():
        for name in getattr(module, "__all__", ("rnn", "lstm", "gru", "rnn_cell", "lstm_cell", "gru_cell")):
            thing = getattr(module, name)
            if not inspect.ismodule(thing):
                yield f"{place}.{name}", thing
            if inspect.isclass(thing):
                yield from (
                    (f"{place}.{name}.{key}", getattr(thing, key))
                    for key, value in vars(thing).items()
                    if not key.startswith("_") and (inspect.isfunction(value) or isinstance(value, classmethod))
                    if getattr(thing, key).__module__.startswith("rnnkit")
                )
    yield "ops.layer", rnnkit.ops.layer
    for name, thing in vars(initialise).items():
        if inspect.isfunction(thing) and not name.startswith("_"):
            yield f"initialise.{name}", thing


PUBLIC = dict(public())


def arguments(docstring: str) -> Iterator[tuple[list[str], str]]:
    """The names and the text of each entry under `Args:`."""
    found = re.search(r"^Args:\n((?:(?: .*)?\n?)*)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    for entry in re.split(r"\n(?= {4}\S)", "\n" + found[1].rstrip() if found else ""):
        names, colon, text = entry.strip().partition(": ")
        if colon:
            yield names.split(", "), text


def wrong(docstring: str, parameters: set[str]) -> list[str]:
    """What `Args:` says that the signature does not."""
    found = []
    for names, text in arguments(docstring):
        found += [f"{name} is no parameter" for name in names if name.strip("*") not in parameters]
        within = [name for name in re.findall(r"\. (\w+): ", text) if name in parameters]
        found += [f"{name} {OWN_LINE}" for name in within]
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_arguments_are_parameters(name: str) -> None:
    docstring = inspect.getdoc(PUBLIC[name])  # a method's may be that of the class above
    assert docstring, f"{name} has no docstring"
    if "Args:" in docstring:
        parameters = inspect.signature(PUBLIC[name]).parameters
        any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        assert [fault for fault in wrong(docstring, set(parameters)) if not any_name or OWN_LINE in fault] == []


def test_a_wrong_docstring_is_seen() -> None:
    docstring = """A sum.

    Args:
        x, y: numbers. z: another,
            which goes on.
        w: none.

    Returns:
        v: the sum.
    """
    assert wrong(docstring, {"x", "y", "z", "w"}) == ["z has no line of its own"]
    assert wrong(docstring, {"x", "z"}) == ["y is no parameter", "z has no line of its own", "w is no parameter"]
