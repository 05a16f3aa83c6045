"""Several paths: the arithmetic of stripes, what lies where, and what is said when one of the paths fails."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_zinf.config import IOConfig, nvme_paths
from lightning_zinf.memory import nvme
from lightning_zinf.memory.nvme import NvmeStore
from lightning_zinf.memory.stripes import cut, share
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.monitor.trace import Trace
from lightning_zinf.ops import host_empty

BLOCK = 4096
IO = IOConfig(threads=2, backend="threads", block_bytes=BLOCK)
SIZES = st.integers(0, 200)
FILES = st.integers(1, 5)
STRIPES = st.sampled_from([1, 3, 8, 64])


@given(SIZES, SIZES, FILES, STRIPES)
def test_pieces_are_the_range_and_lie_apart(offset: int, nbytes: int, files: int, stripe: int) -> None:
    pieces = cut(offset, nbytes, files, stripe)
    assert [p.start for p in pieces] == [sum(q.nbytes for q in pieces[:i]) for i in range(len(pieces))]
    assert sum(p.nbytes for p in pieces) == nbytes
    for piece in pieces:
        if files > 1:
            assert 0 < piece.nbytes <= stripe
            assert piece.offset // stripe == (piece.offset + piece.nbytes - 1) // stripe
        assert 0 <= piece.file < files


@given(SIZES, SIZES, FILES, STRIPES)
def test_a_byte_lies_in_one_place_whatever_range_it_is_read_in(offset: int, size: int, files: int, stripe: int) -> None:
    def places(start: int, nbytes: int) -> list[tuple[int, int]]:
        return [(p.file, p.offset + i) for p in cut(start, nbytes, files, stripe) for i in range(p.nbytes)]

    whole = places(0, offset + size)
    assert whole[offset:] == places(offset, size)
    assert len(set(whole)) == len(whole)
    # And what a file is made for is what lies in it, without a hole.
    for file in range(files):
        own = sorted(at for f, at in whole if f == file)
        assert own == list(range(share(offset + size, file, files, stripe)))


@given(SIZES, FILES, STRIPES)
def test_shares_are_even(nbytes: int, files: int, stripe: int) -> None:
    shares = [share(nbytes, file, files, stripe) for file in range(files)]
    assert sum(shares) == nbytes
    assert max(shares) - min(shares) <= stripe


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [tmp_path / name for name in "abc"]


@pytest.fixture
def store(folders: list[Path]) -> Iterator[NvmeStore]:
    store = NvmeStore(folders, IO, Counters())
    yield store
    store.close()


def pattern(nbytes: int) -> torch.Tensor:
    memory = host_empty(nbytes)
    memory.copy_(torch.randint(0, 256, (nbytes,), dtype=torch.uint8))
    return memory


def test_what_is_written_is_read_again_and_every_path_has_its_share(store: NvmeStore) -> None:
    store.reserve(12 * BLOCK)
    first, second = store.allocate(5 * BLOCK, "first"), store.allocate(7 * BLOCK, "second")
    data = pattern(12 * BLOCK)
    tickets = [store.write(first, data[: 5 * BLOCK]), store.write(second, data[5 * BLOCK :].view(torch.float32))]
    assert [t.wait() for t in tickets] == [5 * BLOCK, 7 * BLOCK]
    assert all(t.done() for t in tickets)
    assert store.traffic() == [(0, 4 * BLOCK)] * 3
    for start, count in ((0, 7), (1, 3), (6, 1)):
        found = host_empty(count * BLOCK)
        store.read(second, found, start * BLOCK).wait()
        assert torch.equal(found, data[(5 + start) * BLOCK :][: count * BLOCK])
    # Stripes 5 to 11, 6 to 8, and 11.
    assert store.traffic() == [(3 * BLOCK, 4 * BLOCK), (3 * BLOCK, 4 * BLOCK), (5 * BLOCK, 4 * BLOCK)]
    counters = store._counters
    assert counters.nvme_read_bytes == sum(read for read, _ in store.traffic()) == 11 * BLOCK
    assert counters.nvme_write_bytes == sum(written for _, written in store.traffic()) == 12 * BLOCK


def test_every_byte_is_where_the_arithmetic_says(store: NvmeStore) -> None:
    store.reserve(8 * BLOCK)
    data = pattern(8 * BLOCK)
    store.write(store.allocate(8 * BLOCK), data).wait()
    files = store.volumes[0].files
    assert [f.size for f in files] == [3 * BLOCK, 3 * BLOCK, 2 * BLOCK]
    for number, (file, engine) in enumerate(zip(files, store.engines, strict=True)):
        own = host_empty(file.size)
        engine.read(file, 0, own).wait()
        assert torch.equal(own, torch.cat([data[k * BLOCK : (k + 1) * BLOCK] for k in range(number, 8, 3)]))


def test_a_small_volume_has_a_file_on_each_path(store: NvmeStore) -> None:
    extent = store.allocate(1)
    assert [f.size for f in extent.volume.files] == [BLOCK] * 3
    store.write(extent, pattern(BLOCK)).wait()
    assert store.traffic() == [(0, BLOCK), (0, 0), (0, 0)]


def test_a_striped_request_is_one_event_of_a_trace(store: NvmeStore) -> None:
    trace = store._counters.trace = Trace()
    extent = store.allocate(6 * BLOCK, "blocks.0/float32/weight")
    store.write(extent, pattern(6 * BLOCK)).wait()
    (event,) = trace.events()
    assert (event.name, event.nbytes, event.observed) == ("blocks.0/float32/weight", 6 * BLOCK, False)
    assert event.end is not None
    assert event.end > event.begin


def test_the_memory_is_let_go_when_it_is_done(store: NvmeStore) -> None:
    data = pattern(6 * BLOCK)
    before = uses(data)
    ticket = store.write(store.allocate(6 * BLOCK), data)
    ticket.wait()
    assert uses(data) == before


def uses(tensor: torch.Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def test_one_path_that_fails_is_named_and_the_others_are_at_rest(store: NvmeStore, folders: list[Path]) -> None:
    extent = store.allocate(6 * BLOCK)
    broken = store.volumes[0].files[1]
    request = Broken(broken.path)
    original = store.engines[1].read
    try:
        store.engines[1].read = lambda *_: request  # type: ignore[method-assign]
        ticket = store.read(extent, host_empty(6 * BLOCK))
        with pytest.raises(OSError, match="Input/output error") as caught:
            ticket.wait()
    finally:
        store.engines[1].read = original  # type: ignore[method-assign]
    assert str(caught.value.filename).startswith(str(folders[1]))
    assert request.waited == 2
    assert all(engine.in_flight == 0 for engine in store.engines)


class Broken:
    """A request that the drive refused."""

    elapsed = 1

    def __init__(self, path: str) -> None:
        self.path, self.waited = path, 0

    def wait(self, timeout: float | None = None) -> int:
        self.waited += 1
        raise OSError(errno.EIO, "Input/output error", self.path)

    def done(self) -> bool:
        return True


class Slow(Broken):
    """A request that takes long."""

    def wait(self, timeout: float | None = None) -> int:
        raise TimeoutError(f"not done after {timeout}")

    def done(self) -> bool:
        return False


def test_a_request_that_takes_long_goes_on(store: NvmeStore) -> None:
    extent = store.allocate(6 * BLOCK)
    store.engines[2].read = lambda *_: Slow("x")  # type: ignore[method-assign]
    ticket = store.read(extent, host_empty(6 * BLOCK))
    assert not ticket.done()
    with pytest.raises(TimeoutError, match="not done"):
        ticket.wait(0.01)


def test_a_full_path_is_named_with_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was taken on the others is given back."""
    made: list[Any] = []

    class Full(nvme.File):
        def __init__(self, path: Any, size: int | None = None, **options: Any) -> None:
            if Path(path).parent.name == "b":
                raise OSError(
                    errno.ENOSPC, f"No space left on device: allocate (needs {size} bytes, 7 left)", str(path)
                )
            super().__init__(path, size, **options)
            made.append(self)

    monkeypatch.setattr(nvme, "File", Full)
    store = NvmeStore([tmp_path / "a", tmp_path / "b"], IO, Counters())
    with pytest.raises(OSError, match="No space left") as caught:
        store.reserve(2**30)
    text = str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert f"needs {2**29} bytes, 7 left" in text
    assert f"nvme_path={str(tmp_path / 'b')!r} must hold 0.50 GiB" in text
    assert "its share of 1.00 GiB over 2 paths" in text
    assert str(caught.value.filename).startswith(str(tmp_path / "b"))
    assert [file.closed for file in made] == [True]
    assert store.volumes == []
    store.close()


def test_paths_on_different_file_systems(tmp_path: Path) -> None:
    ram = Path("/dev/shm")
    if nvme.file_system_of(ram) != "tmpfs" or not os.access(ram, os.W_OK):
        pytest.skip("there is no tmpfs to write to")
    folder = ram / f"zinf-test-{os.getpid()}"
    try:
        with pytest.warns(UserWarning, match=r"/dev/shm/.*RAM-backed file system \(tmpfs\)"):
            store = NvmeStore([tmp_path, folder], IO, Counters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            extent = store.allocate(9 * BLOCK)
        data, found = pattern(9 * BLOCK), host_empty(9 * BLOCK)
        store.write(extent, data).wait()
        store.read(extent, found).wait()
        assert torch.equal(found, data)
        assert store.traffic() == [(5 * BLOCK, 5 * BLOCK), (4 * BLOCK, 4 * BLOCK)]
        store.close()
    finally:
        folder.rmdir()


def test_a_path_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="twice"):
        NvmeStore([tmp_path / "a", tmp_path / "b", tmp_path / "a" / ".." / "a"], IO, Counters())


def test_a_path_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="nvme_path cannot be used") as caught:
        NvmeStore([tmp_path / "a", tmp_path / "file"], IO, Counters())
    assert caught.value.filename == str(tmp_path / "file")


def test_where_the_paths_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZINF_NVME_PATH", raising=False)
    assert nvme_paths(None, tmp_path) == (str(tmp_path / "zinf_nvme"),)
    monkeypatch.setenv("ZINF_NVME_PATH", os.pathsep.join(["/x", "", "/y z"]))
    assert nvme_paths(None, tmp_path) == ("/x", "/y z")
    assert nvme_paths("/a", tmp_path) == ("/a",)
    assert nvme_paths(Path("/a"), tmp_path) == ("/a",)
    assert nvme_paths(["/a", Path("/b")], tmp_path) == ("/a", "/b")


@pytest.mark.parametrize("given", [[], [""], "", ["/a", ""]])
def test_no_path_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="at least one folder"):
        nvme_paths(given, ".")


@pytest.mark.parametrize("given", [3, [3], {"a"}, ["/a", None]])
def test_what_is_no_path_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="a folder or a list of folders"):
        nvme_paths(given, ".")


def test_several_paths_are_measured_as_they_are_used(tmp_path: Path) -> None:
    from lightning_zinf.planning.cache import joined
    from lightning_zinf.planning.measure import disk_rates

    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    rates = disk_rates(folders, 0.02, size=2**21, request=2**20)
    assert rates.keys() == {"nvme_read", "nvme_write", "nvme_mixed"}
    assert min(rates.values()) > 0
    assert [list(Path(folder).iterdir()) for folder in folders] == [[], []]
    assert joined(folders) == os.pathsep.join(folders)
    assert joined(folders[0]) == folders[0]


def test_plans_count_the_room_of_the_fullest_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_zinf import cli
    from lightning_zinf.memory import machine

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    room = {"a": 7 * 2**30, "b": 3 * 2**30}
    monkeypatch.setattr(machine, "free_disk_bytes", lambda folder: room[Path(folder).name])
    sizes = ["--layers=2", "--hidden=64", "--heads=4", "--seq=16", "--batch=1"]
    paths = ["--nvme-path", str(tmp_path / "a"), "--nvme-path", str(tmp_path / "b")]
    assert cli.main(["plan", *sizes, *paths]) == 0
    assert f"{tmp_path / 'a'}, {tmp_path / 'b'}" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["plan", *sizes, *paths, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["nvme_bytes"] == 6 * 2**30
