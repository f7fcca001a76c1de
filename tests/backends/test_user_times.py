"""The table that `tune` writes into the user's folder: used and named where it was made for this machine; else ignored,
with a word in `info`; and what is at its place is never followed, run or written over unless it is ours."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rnnkit
import rnnkit.tune
from rnnkit.backends import LayerSpec, preference, processor, recorded, select, user_times
from rnnkit.backends.cpu import extension
from rnnkit.backends.dispatch_times import Kind, RecordedShape, at_threads
from rnnkit.backends.user_times import Refused
from rnnkit.cli import main as cli

SPEC = LayerSpec("gru", "cpu", torch.float32, 10, 4, 64, 64, 0, True)


def row(*sizes: int, cpu: float, torch: float, threads: int = 1, **kind: Any) -> RecordedShape:
    """Of a GRU's inference."""
    facts: Any = {"device": "cpu", "isa": "avx512", "dtype": "float32", "cell": "gru", "train": False, **kind}
    return RecordedShape(*(sizes or (4, 10, 64, 64)), Kind(**facts), threads, "x", {"cpu": cpu, "torch": torch})


TORCH_FIRST = row(cpu=9.0, torch=1.0)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the user's table would be, in a folder of the test's own. The engine is that of AVX-512."""
    monkeypatch.delenv("RNNKIT_TUNED")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(extension, "variants", ("avx512", "avx2", "baseline"))
    select.forget()
    yield tmp_path / "rnnkit" / "dispatch_times.csv"
    monkeypatch.undo()
    select.forget()


def first(spec: LayerSpec = SPEC) -> str:
    return preference(spec)[2].name  # behind the two for GPUs


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The line of `info`, and the same as JSON."""
    assert cli.main(["info"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("times ")]
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["dispatch_times"]
    assert (found["reason"] or found["path"]) in line
    return line


def test_it_decides_and_is_named(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert first() == "cpu" and f"of this machine, {path}: there is none; `python -m rnnkit tune`" in said(capsys)
    user_times.write(path, [TORCH_FIRST])
    assert first() == "cpu", "a process reads it once"
    select.forget()
    assert first() == "torch"
    assert f"this machine's, 1 rows for avx512 float32 1 thread, in {path}" in said(capsys)
    text = str(rnnkit.explain(rnnkit.GRU(64, 64).requires_grad_(False), torch.randn(10, 4, 64)))
    assert f"in float32 on avx512, 1 thread, this machine ({path}): torch 1 ms, cpu 9 ms" in text


def test_its_first_lines_say_for_what_it_was_made(path: Path) -> None:
    user_times.write(path, [TORCH_FIRST, row(cpu=1.0, torch=2.0, isa="avx2")])
    assert path.read_text().splitlines()[:6] == [
        "# rnnkit: times of this machine, by `python -m rnnkit tune`",
        f"# processor: {processor.identity()}",
        f"# torch: {torch.__version__}",
        f"# rnnkit: {rnnkit.__version__}",
        "# instruction sets: avx512, avx2",
        "device,isa,dtype,cell,train,threads,B,T,I,H,source,cpu,torch",
    ]
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing else is left"


@pytest.mark.parametrize("what", ["processor", "torch", "rnnkit"])
def test_made_for_another_it_is_ignored(what: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    user_times.write(path, [TORCH_FIRST])
    here = user_times.made_for()[what]
    path.write_text(path.read_text().replace(f"# {what}: {here}\n", f"# {what}: another\n"))
    select.forget()
    assert first() == "cpu" and "this machine" not in str(recorded(SPEC))
    assert f"{path}: it was made for {what} another, and this is {here}; `python -m rnnkit tune`" in said(capsys)
    assert user_times.write(path, [row(cpu=1.0, torch=2.0)])[0].ms["cpu"] == 1.0, "ours, so it is written over"
    path.write_text(path.read_text().replace(f"# {what}: {here}\n", ""))
    select.forget()
    assert f"it was made for {what} unknown" in said(capsys)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text[:-12], "it is broken in line 7: "),
        (lambda text: text.replace(",9,1", ",nan,1"), "it is broken in line 7: a size or a time is not above 0"),
        (lambda text: text.replace(",9,1", ",-9,1"), "it is broken in line 7: a size or a time is not above 0"),
        (lambda text: text.replace(",9,1", ",9,inf"), "it is broken in line 7: a size or a time is not above 0"),
        (lambda text: text.replace(",9,1", ",,"), "it is broken in line 7: a size or a time is not above 0"),
        (lambda text: text.replace(",9,1", ",9,one"), "it is broken in line 7: could not convert"),
        (lambda text: text.replace(",9,1", ",9,1,1"), "it is broken in line 7: "),
        (lambda text: text.replace(",4,10,", ",0,10,"), "it is broken in line 7: a size or a time is not above 0"),
        (lambda text: text.replace(",gru,0,1,", ",gru,0,,"), "it is broken in line 7: a size or a time is not above 0"),
        (lambda text: text.replace("torch\n", "triton\n"), "it is broken in line 6: has the columns"),
        (lambda text: text[: text.index("cpu,avx512")], "it is broken: there are no rows in it"),
        (lambda text: "", "it is no table of `python -m rnnkit tune`"),
        (lambda text: "import os\n" + text, "it is no table of `python -m rnnkit tune`"),
        (lambda text: "\0\1\2" * 1000, "it is no table of `python -m rnnkit tune`"),
        (lambda text: text + "#" * (1 << 20), "bytes, and a table at most 1048576"),
    ],
)
def test_a_broken_one_is_ignored(
    change: Callable[[str], str], reason: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    user_times.write(path, [TORCH_FIRST])
    path.write_text(change(path.read_text()))
    select.forget()
    assert first() == "cpu" and reason in said(capsys)


def folder(path: Path) -> None:
    path.mkdir(parents=True)


def pipe(path: Path) -> None:
    path.parent.mkdir(parents=True)
    os.mkfifo(path)


def link(path: Path) -> None:
    target = path.parents[1] / "elsewhere.csv"
    user_times.write(target, [TORCH_FIRST])
    path.parent.mkdir(parents=True)
    path.symlink_to(target)


def dangling(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.symlink_to(path.parents[1] / "gone.csv")


def foreign(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("import sys; sys.exit('run')\n")


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody shall wait for a table that cannot be written."""

    def measured(*_: object) -> None:
        pytest.fail("it measured first")

    monkeypatch.setattr(rnnkit.tune, "measure_layers", measured)


def state(path: Path) -> list[tuple[str, int, str, bytes]]:
    """Everything below the user's folder."""
    found = []
    for one in sorted(path.parents[1].rglob("*")):
        mode = one.lstat().st_mode
        goal = os.readlink(one) if stat.S_ISLNK(mode) else ""
        found.append((str(one), mode, goal, one.read_bytes() if stat.S_ISREG(mode) else b""))
    return found


@pytest.mark.parametrize(
    ("put", "reason"),
    [
        (folder, "it is no regular file"),
        (pipe, "it is no regular file"),
        (link, "it is a link, and links are not followed"),
        (dangling, "it is a link, and links are not followed"),
        (foreign, "it is no table of `python -m rnnkit tune`"),
    ],
)
def test_what_is_not_ours_is_neither_read_nor_written_over(
    put: Callable[[Path], None], reason: str, path: Path, unmeasured: None, capsys: pytest.CaptureFixture[str]
) -> None:
    put(path)
    before = state(path)
    assert first() == "cpu" and reason in said(capsys)
    with pytest.raises(Refused, match=reason):
        user_times.write(path, [TORCH_FIRST])
    assert cli.main(["tune"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and complaint.startswith(f"rnnkit tune: cannot write {path}: {reason}")
    assert state(path) == before


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_takes_no_file_is_said_before_anything_is_measured(
    code: int, path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    user_times.write(path, [TORCH_FIRST])
    before = state(path)
    monkeypatch.setattr(os, "fsync" if code == errno.ENOSPC else "open", refuse)
    assert cli.main(["tune"]) == 2
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert said == f"rnnkit tune: cannot write {path}: {os.strerror(code)}\n"
    assert state(path) == before


def test_the_switch(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    user_times.write(path, [TORCH_FIRST])
    for value, name, words in (
        ("0", "cpu", f"{path}: RNNKIT_TUNED=0"),
        ("1", "torch", "this machine's, 1 rows"),
        ("", "torch", "this machine's, 1 rows"),
        ("no", "cpu", f"{path}: RNNKIT_TUNED must be 0, 1 or unset, got 'no'"),
    ):
        monkeypatch.setenv("RNNKIT_TUNED", value)
        select.forget()
        assert first() == name and words in said(capsys)


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("LOCALAPPDATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    own = tmp_path / ".local" / "share" / "rnnkit" / "dispatch_times.csv"
    for given in ("", "relative/folder"):
        monkeypatch.setenv("XDG_DATA_HOME", given)
        assert user_times.default_path() == own
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert user_times.default_path() == Path("/somewhere/rnnkit/dispatch_times.csv")
    monkeypatch.delenv("XDG_DATA_HOME")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(Refused, match="set XDG_DATA_HOME"):
        user_times.default_path()
    user_times.forget()
    assert user_times.load().path is None and "set XDG_DATA_HOME" in str(user_times.load().reason)
    assert cli.main(["tune"]) == 2 and cli.main(["info"]) == 0
    user_times.forget()


def test_a_second_table_keeps_what_it_does_not_measure_again(path: Path) -> None:
    other = row(cpu=1.0, torch=2.0, isa="avx2")
    user_times.write(path, [TORCH_FIRST, other])
    every = user_times.write(path, [row(cpu=3.0, torch=1.0), row(cpu=5.0, torch=1.0, threads=2)])
    assert [(r.kind.isa, r.threads, r.ms["cpu"]) for r in every] == [
        ("avx512", 1, 3.0), ("avx2", 1, 1.0), ("avx512", 2, 5.0)
    ]  # fmt: skip
    assert [r._replace(source="x") for r in user_times.read(path)] == [r._replace(source="x") for r in every]


def test_a_row_of_the_users_takes_the_place_of_the_same_shape_alone() -> None:
    shipped = [row(*sizes, cpu=1.0, torch=2.0, threads=n) for n in (1, 16) for sizes in ((4, 10, 64, 64), (1, 1, 8, 8))]

    def times(threads: int, own: RecordedShape, **how: bool) -> list[tuple[int, int, float]]:
        return [(r.threads, r.batch, r.ms["cpu"]) for r in at_threads(threads, shipped, [own], **how)]

    first, fourth = row(cpu=9.0, torch=1.0), row(cpu=9.0, torch=1.0, threads=4)
    assert times(1, first) == times(3, first) == [(1, 4, 9.0), (1, 1, 1.0)]
    assert times(1, fourth) == [(1, 4, 1.0), (1, 1, 1.0)]
    assert times(2, fourth) == times(4, fourth) == times(8, fourth) == [(4, 4, 9.0)], "as near to 1 and to 16"
    assert times(9, fourth) == times(16, fourth) == [(16, 4, 1.0), (16, 1, 1.0)]
    assert times(17, fourth) == [] and times(17, fourth, beyond=True) == times(16, fourth)


def test_it_is_read_at_the_first_choice_on_a_cpu_and_not_at_import(path: Path) -> None:
    user_times.write(path, [TORCH_FIRST])
    program = """if True:
        import sys
        opened = []
        sys.addaudithook(lambda event, what: opened.append(str(what[0])) if event == "open" else None)
        import torch
        import rnnkit
        print(sum(name.endswith("dispatch_times.csv") for name in opened))
        layer = rnnkit.GRU(4, 4)
        print(sum(name.endswith("dispatch_times.csv") for name in opened))
        for _ in range(2):
            layer(torch.zeros(2, 1, 4))
        print(sum(name.endswith("dispatch_times.csv") for name in opened))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.split() == ["0", "0", "2"], done.stderr  # the package's and the user's
