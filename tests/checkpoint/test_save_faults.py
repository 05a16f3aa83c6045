"""What goes wrong around a checkpoint: broken disks, and two that save to one path."""

from __future__ import annotations

import contextlib
import errno
import re
import subprocess
import sys
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from lightning_cases import assert_same
from sharded_cases import everything, fit

from lightning_zinf.checkpoint import files
from lightning_zinf.checkpoint.claim import Claim
from lightning_zinf.checkpoint.folder import Folder
from lightning_zinf.checkpoint.manifest import CheckpointError
from lightning_zinf.checkpoint.source import Checkpoint


class Disk:
    """Counts reads and writes, and breaks at one of them."""

    def __init__(self) -> None:
        self.count, self.breaks_at = 0, -1

    def use(self) -> None:
        self.count += 1
        if self.count == self.breaks_at:
            raise OSError(errno.EIO, "Input/output error")


DISK = Disk()


class BrokenFile(MemoryFile):
    def write(self, content: Any) -> int:
        DISK.use()
        return int(super().write(content))

    def readinto(self, content: Any) -> int:
        DISK.use()
        return int(super().readinto(content))


class BrokenFileSystem(MemoryFileSystem):
    """A file system in memory whose disk breaks."""

    protocol = "broken"
    store: dict[str, Any] = {}  # noqa: RUF012  # as in the base class
    pseudo_dirs = [""]  # noqa: RUF012

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        file.__class__ = BrokenFile
        return file

    def pipe_file(self, path: str, value: Any, mode: str = "overwrite", **options: Any) -> None:
        DISK.use()
        super().pipe_file(path, value, **options)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> Any:
        DISK.use()
        return super().cat_file(path, start, end, **options)


@pytest.fixture
def remote() -> Iterator[str]:
    fsspec.register_implementation("broken", BrokenFileSystem, clobber=True)
    DISK.count, DISK.breaks_at = 0, -1
    yield f"broken://{uuid.uuid4().hex}/a.ckpt"
    DISK.breaks_at = -1


def uses(run: Any) -> int:
    """Return how often the disk is used."""
    DISK.count, DISK.breaks_at = 0, -1
    run()
    return DISK.count


def test_a_disk_that_breaks_while_saving(tmp_path: Path, remote: str) -> None:
    """At every read and write in turn: the error has the path, and the older checkpoint stays."""
    model, used = fit(tmp_path, "nvme", 1)
    used.save_checkpoint(remote)
    state = everything(model, used)
    names = sorted(fsspec.filesystem("broken").ls(remote, detail=False))
    used.save_checkpoint(f"{remote}.other")
    total = uses(lambda: used.save_checkpoint(f"{remote}.other"))
    assert total > 5
    for at in range(1, total + 1):
        DISK.count, DISK.breaks_at = 0, at
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                used.save_checkpoint(remote)
            except OSError as error:
                refused = str(error)
            else:
                refused = ""
        DISK.breaks_at = -1
        if refused:
            assert re.match(rf"{remote} was not saved: .*Input/output error", refused)
            assert sorted(fsspec.filesystem("broken").ls(remote, detail=False)) == names
        else:  # after the commit there is nothing but cleaning up
            assert at == total
            assert any("was saved, but what it replaces is still there" in str(w.message) for w in said)
    assert_same(everything(*fit(tmp_path, "none", 1, path=remote)), state)
    used.save_checkpoint(remote)  # nothing is broken
    with Checkpoint(remote) as source:
        source.verify([info.path for info in source.manifest.files])


def test_a_disk_that_breaks_while_loading(tmp_path: Path, remote: str) -> None:
    """At every read in turn: the error has the file's path; then it loads."""
    model, used = fit(tmp_path, "nvme", 1)
    used.save_checkpoint(remote)
    state = everything(model, used)
    total = uses(lambda: fit(tmp_path, "nvme", 1, path=remote))
    assert total > 5
    for at in {1, 2, 3, 4, total // 2, total}:
        DISK.count, DISK.breaks_at = 0, at
        with pytest.raises((OSError, CheckpointError), match=rf"Input/output error.*{remote}/"):
            fit(tmp_path, "nvme", 1, path=remote)
    DISK.breaks_at = -1
    assert_same(everything(*fit(tmp_path, "nvme", 1, path=remote)), state)


def test_a_local_disk_that_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, used = fit(tmp_path, "nvme", 1)
    path = tmp_path / "a.ckpt"
    used.save_checkpoint(path)
    state = everything(model, used)
    before = sorted(p.name for p in path.iterdir())

    def broken(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", broken)
        with pytest.raises(OSError, match=r"a.ckpt was not saved: rank 0: .*Input/output error"):
            used.save_checkpoint(path)
    assert sorted(p.name for p in path.iterdir()) == before
    assert_same(everything(*fit(tmp_path, "none", 1, path=path)), state)


# ---------------------------------------------------------------------- two that save to one path


@contextlib.contextmanager
def meanwhile(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, other: Any) -> Iterator[None]:
    """Do something else the first time that a method is called."""
    original, done = getattr(owner, method), []

    def both(*arguments: Any, **options: Any) -> Any:
        if not done:
            done.append(True)
            other()
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, both)
        yield


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_the_second_is_told(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = fit(tmp_path / "1", "nvme", 1), fit(tmp_path / "2", "none", 2)
    path = tmp_path / "a.ckpt"

    def other() -> None:
        with pytest.raises(OSError, match=r"a.ckpt was not saved: rank 0: another run is saving to .* of its own"):
            second[1].save_checkpoint(path)

    owner = Folder if moment == "replace" else files.Writer
    with meanwhile(monkeypatch, owner, moment, other):
        first[1].save_checkpoint(path)
    with Checkpoint(path) as source:
        source.verify([info.path for info in source.manifest.files])
    assert_same(everything(*fit(tmp_path, "none", 1, path=path)), everything(*first))
    second[1].save_checkpoint(path)  # now it may
    assert_same(everything(*fit(tmp_path, "none", 2, path=path)), everything(*second))
    assert len(list(path.iterdir())) == 4


@pytest.mark.parametrize("moment", ["write", "check", "replace"])
def test_without_locks(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an object store who finds his files gone says so, and what the other saved stays."""
    first, second = fit(tmp_path / "1", "nvme", 1), fit(tmp_path / "2", "none", 2)
    url = f"memory://{uuid.uuid4().hex}/a.ckpt"
    owner: Any = {"write": files.Writer, "check": Claim, "replace": Folder}[moment]
    gone = pytest.raises(OSError, match=r"a.ckpt was not saved: .* is gone: another run saves to this folder")
    with (
        contextlib.nullcontext() if moment == "replace" else gone,
        meanwhile(monkeypatch, owner, moment, lambda: second[1].save_checkpoint(url)),
    ):
        first[1].save_checkpoint(url)
    if moment == "replace":  # between looking and committing: it is noticed when it is read
        with pytest.raises(CheckpointError, match="is missing: the checkpoint is not complete"):
            fit(tmp_path, "none", 1, path=url)
        second[1].save_checkpoint(url)
    assert_same(everything(*fit(tmp_path, "none", 2, path=url)), everything(*second))
    with Checkpoint(url) as source:
        source.verify([info.path for info in source.manifest.files])


SAVER = """
import os, sys
sys.path[:0] = sys.argv[2].split(os.pathsep)
from pathlib import Path
from sharded_cases import fit
_, used = fit(Path(sys.argv[1]) / sys.argv[3], "nvme", 1)
saved = refused = 0
open(f"{sys.argv[1]}/ready-{sys.argv[3]}", "w").close()
import time
while len(list(Path(sys.argv[1]).glob("ready-*"))) < 2:
    time.sleep(0.01)
while saved < 15:
    try:
        used.save_checkpoint(sys.argv[1] + "/a.ckpt")
        saved += 1
    except OSError as error:
        assert "another run is saving" in str(error), error
        refused += 1
print(saved, refused)
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    paths = ":".join(map(str, (tests.parent, tests, tests.parent / "lightning")))
    both = [
        subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path), paths, str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    said = [process.communicate(timeout=250)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    with Checkpoint(tmp_path / "a.ckpt") as source:
        source.verify([info.path for info in source.manifest.files])
    assert len(list((tmp_path / "a.ckpt").iterdir())) == 4
