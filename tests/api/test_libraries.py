"""A library that is loaded and asks for torch's own classes is named once; one that is not loaded, never."""

from __future__ import annotations

import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator

import pytest
from torch import nn

import rnnkit
from rnnkit import libraries
from rnnkit.libraries import LIBRARIES, Library

IDS = [library.module for library in LIBRARIES]


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No library is loaded and none was named, whatever ran before in this process."""
    monkeypatch.setattr(libraries, "_said", set())
    for library in LIBRARIES:
        monkeypatch.delitem(sys.modules, library.module, raising=False)
    yield


def said(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught]


def convert() -> None:
    rnnkit.convert(nn.Sequential(nn.GRU(3, 4)))


def patch() -> None:
    with rnnkit.patch_torch():
        pass


def test_nothing_is_said_where_none_is_loaded() -> None:
    assert said(convert) == said(patch) == []


@pytest.mark.parametrize("library", LIBRARIES, ids=IDS)
def test_a_loaded_library_is_named_once(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library.module, types.ModuleType(library.module))
    (text,) = said(convert)
    for fragment in (library.module.split(".")[0], "rnnkit.convert(model)", library.passes, library.instead):
        assert fragment in text
    assert said(convert) == said(patch) == []


@pytest.mark.parametrize("library", LIBRARIES, ids=IDS)
def test_patch_torch_warns_of_those_that_hold_torchs_classes(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others ask for nn.LSTM when they are called, and inside of the patch that is ours."""
    monkeypatch.setitem(sys.modules, library.module, types.ModuleType(library.module))
    texts = said(patch)
    assert len(texts) == library.at_import
    assert all("rnnkit.patch_torch()" in text and library.instead in text for text in texts)


def test_a_model_without_recurrent_layers_is_no_ones_concern(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "thop", types.ModuleType("thop"))
    assert said(lambda: rnnkit.convert(nn.Linear(3, 4))) == []
    assert said(lambda: rnnkit.convert(rnnkit.GRU(3, 4))) == []
    assert len(said(convert)) == 1


def test_the_warning_points_at_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, run in (("thop", convert), ("ptflops", patch)):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        with pytest.warns(UserWarning, match=name) as caught:
            run()
        assert caught[0].filename == __file__


def test_importing_rnnkit_loads_none_of_them_and_torch_brings_none() -> None:
    code = """if True:
        import sys
        from rnnkit.libraries import LIBRARIES
        print([library.module for library in LIBRARIES if library.module in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_library_that_torch_brings_along_is_right_about_us() -> None:
    """quantize_fx is the one of the table that is here to be asked."""
    import torch
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    mapping = get_default_qconfig_mapping()
    model = nn.Sequential(rnnkit.LSTM(3, 4)).eval()
    done = convert_fx(prepare_fx(model, mapping, (torch.randn(2, 1, 3),)))
    assert any(isinstance(m, rnnkit.LSTM) for m in done.modules())  # in float, as the table says
