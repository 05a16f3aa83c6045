"""The NVMe tier: folders, space, and what is said about them."""

from __future__ import annotations

import errno
import os
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_zinf.config import IOConfig
from lightning_zinf.memory import nvme
from lightning_zinf.memory.nvme import NvmeStore, file_system_of
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.ops import host_empty

IO = IOConfig(threads=1, backend="threads")


def store_in(folder: Path, *, chunk_bytes: int = 4096, io: IOConfig = IO) -> NvmeStore:
    return NvmeStore(folder, io, Counters(), chunk_bytes)


@pytest.fixture
def small_ram_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "ram"
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    store_in(folder).close()
    assert folder.is_dir()


def test_a_path_that_is_a_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(OSError, match="nvme_path cannot be used") as caught:
        store_in(path)
    assert caught.value.filename == str(path)
    assert path.read_text() == "x"


def test_a_folder_that_cannot_be_written_to_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("permissions do not bind this user")
    with pytest.raises(PermissionError, match="nvme_path cannot be used") as caught:
        store_in(folder)
    assert caught.value.filename == str(folder)


def test_a_folder_that_no_file_can_be_made_in_is_refused_by_name() -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("there is no /proc")
    with pytest.raises(OSError, match="nvme_path cannot be used") as caught:
        store_in(Path("/proc/self"))
    assert caught.value.filename == "/proc/self"


def test_a_full_disk_is_an_error_with_the_numbers(small_ram_disk: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = store_in(small_ram_disk)
    with pytest.raises(OSError, match=r"\d") as caught:
        store.reserve(64 * 2**20)
    assert caught.value.errno == errno.ENOSPC
    assert str(64 * 2**20) in str(caught.value)
    assert f"nvme_path={str(small_ram_disk)!r} must hold 0.06 GiB" in str(caught.value)
    assert str(caught.value.filename).startswith(str(small_ram_disk))
    assert store.volumes == []
    assert list(small_ram_disk.iterdir()) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store.reserve(2**18)  # a smaller one fits
    store.close()


def test_one_full_disk_of_two_is_named_and_nothing_is_left(small_ram_disk: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = NvmeStore([tmp_path / "a", small_ram_disk], IO, Counters())
    with pytest.raises(OSError, match=r"its share of 0\.06 GiB over 2 paths") as caught:
        store.reserve(64 * 2**20)
    assert caught.value.errno == errno.ENOSPC
    assert f"nvme_path={str(small_ram_disk)!r} must hold 0.03 GiB" in str(caught.value)
    assert str(32 * 2**20) in str(caught.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store.reserve(2**19)  # half of it fits
    assert [file.closed for volume in store.volumes for file in volume.files] == [False, False]
    store.close()


def test_memory_posing_as_a_disk_is_said(small_ram_disk: Path) -> None:
    with pytest.warns(UserWarning, match=r"RAM-backed file system \(tmpfs\)"):
        store_in(small_ram_disk).close()
    assert file_system_of(small_ram_disk / "deeper") == "tmpfs"


def test_the_file_system_is_that_of_the_longest_mount(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mounts = f"a / ext4 rw 0 0\nb {tmp_path} tmpfs rw 0 0\nc {tmp_path}/with\\040space xfs rw 0 0\n"
    monkeypatch.setattr(nvme.Path, "read_text", lambda self: mounts)
    assert file_system_of(tmp_path / "x") == "tmpfs"
    assert file_system_of(tmp_path / "with space" / "x") == "xfs"
    assert file_system_of(Path(f"{tmp_path}-beside")) == "ext4"


def test_without_a_table_of_mounts_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(nvme.Path, "read_text", missing)
    assert file_system_of(tmp_path) == ""


class Buffered(nvme.File):
    """A file on a file system without direct I/O."""

    @property
    def direct(self) -> bool:
        return False


def test_no_direct_io_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nvme, "File", Buffered)
    store = store_in(tmp_path)
    with pytest.warns(UserWarning, match="no direct I/O"):
        store.reserve(4096)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.reserve(4096)
    store.close()


def test_direct_io_that_was_not_asked_for_is_not_missed(tmp_path: Path) -> None:
    store = store_in(tmp_path, io=IOConfig(threads=1, backend="threads", direct=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.reserve(4096)
    store.close()


def test_extents_do_not_overlap_and_further_volumes_are_reserved(tmp_path: Path) -> None:
    store = store_in(tmp_path, chunk_bytes=16384)
    extents = [store.allocate(n) for n in (1, 4096, 5000, 4096, 20000, 1)]
    assert [e.nbytes for e in extents] == [4096, 4096, 8192, 4096, 20480, 4096]
    assert all(e.offset % 4096 == 0 and e.offset + e.nbytes <= e.volume.size for e in extents)
    assert [store.volumes.index(e.volume) for e in extents] == [0, 0, 0, 1, 2, 3]
    taken = [(store.volumes.index(e.volume), e.offset + at) for e in extents for at in range(0, e.nbytes, 4096)]
    assert len(taken) == len(set(taken))
    assert store.allocated_bytes == sum(e.nbytes for e in extents)
    store.close()


def test_what_was_reserved_is_used(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.reserve(5 * 4096)
    for _ in range(5):
        store.allocate(4096)
    assert len(store.volumes) == 1
    store.allocate(4096)
    assert len(store.volumes) == 2
    store.close()


def test_room_that_is_given_back_is_joined_and_used_by_who_asks_for_it(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.reserve(6 * 4096)
    extents = [store.allocate(4096) for _ in range(5)]
    for number in (1, 3, 2):
        store.release(extents[number])
    assert store.allocated_bytes == 2 * 4096
    last = store.allocate(4096)
    assert (last.offset, last.again) == (5 * 4096, False)  # who has not asked for it reads zeros
    parts = [store.allocate(n, again=True) for n in (8192, 1)]
    assert [(e.offset, e.nbytes, e.again) for e in parts] == [(4096, 8192, True), (3 * 4096, 4096, True)]
    assert len(store.volumes) == 1
    assert not store.allocate(4096, again=True).again
    assert len(store.volumes) == 2
    store.close()


def test_what_is_written_is_read_again_and_counted(tmp_path: Path) -> None:
    counters = Counters()
    store = NvmeStore(tmp_path, IO, counters)
    first, second = store.allocate(8192), store.allocate(4096)
    memory = host_empty(8192)
    memory.copy_(torch.arange(8192) % 251)
    store.write(first, memory).wait()
    store.write(second, memory[:4096]).wait()
    found = host_empty(4096)
    store.read(first, found, 4096).wait()
    assert torch.equal(found, memory[4096:])
    assert (counters.nvme_write_bytes, counters.nvme_read_bytes) == (12288, 4096)
    store.close()


def test_an_extent_starts_as_zeros(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    memory = host_empty(8192).fill_(1)
    store.read(store.allocate(8192), memory).wait()
    assert memory.eq(0).all()
    store.close()


@pytest.mark.parametrize("offset", [-4096, 4096])
def test_an_access_beyond_the_extent_is_refused(offset: int, tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.allocate(4096)
    extent = store.allocate(4096)
    store.allocate(4096)
    for operation in (store.read, store.write):
        with pytest.raises(AssertionError):
            operation(extent, host_empty(4096), offset)
    store.close()


def test_files_have_no_name_and_go_with_the_store(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.allocate(4096)
    (file,) = store.volumes[0].files
    assert list(tmp_path.iterdir()) == []
    store.close()
    assert file.closed
    assert store.volumes == []
