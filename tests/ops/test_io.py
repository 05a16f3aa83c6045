"""The I/O engine against a model in memory, on every backend, and the ways it may fail."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_zinf.ops import _fallback, io
from lightning_zinf.ops.io import File, IOEngine

BLOCK = 8192  # small, so that small requests have many pieces
BACKENDS = ["threads", "io_uring", "python"]
COMPILED = io._native is not _fallback


@contextmanager
def make_engine(backend: str, **options: int) -> Iterator[IOEngine]:
    with pytest.MonkeyPatch.context() as patch:
        if backend == "python":
            patch.setattr(io, "_native", _fallback)
        elif not COMPILED:
            pytest.skip("the compiled extension is missing")
        try:
            engine = IOEngine(backend="auto" if backend == "python" else backend, **({"block_bytes": BLOCK} | options))
        except ValueError as error:
            if backend != "io_uring" or "not available" not in str(error):
                raise
            pytest.skip(str(error))
        with engine:
            assert engine.backend == backend
            yield engine


@pytest.fixture(params=BACKENDS)
def engine(request: pytest.FixtureRequest) -> Iterator[IOEngine]:
    with make_engine(request.param) as engine:
        yield engine


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# A step fills the file with cuts; each stretch between two cuts is written, read, or left alone.
CUTS = st.lists(
    st.one_of(st.integers(0, 30).map(lambda block: 4096 * block), st.integers(0, 4096 * 30)), min_size=1, max_size=12
)
STEPS = st.lists(st.tuples(CUTS, st.integers(0, 3**12 - 1), st.integers(0, 64)), min_size=1, max_size=5)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_requests_match_a_model(backend: str, direct: bool) -> None:
    @settings(max_examples=40, deadline=None)
    @given(size=st.integers(1, 4096 * 30), steps=STEPS)
    def check(size: int, steps: list[tuple[list[int], int, int]]) -> None:
        model = torch.zeros(size, dtype=torch.uint8)
        with File(Path(folder) / "file", size, direct=direct) as file:
            for seed, (cuts, choices, shift) in enumerate(steps):
                ends = sorted({cut for cut in cuts if cut < size} | {0, size})
                memory = random_bytes(size + shift, seed)[shift:]
                tickets, reads = [], []
                for index, (start, end) in enumerate(itertools.pairwise(ends)):
                    choice = choices // 3**index % 3
                    part = memory[start:end]
                    if choice == 0:
                        model[start:end] = part
                        tickets.append((engine.write(file, start, part), end - start))
                    elif choice == 1:
                        tickets.append((engine.read(file, start, part), end - start))
                        reads.append((start, end, part))
                for ticket, nbytes in tickets:
                    assert ticket.wait(60) == nbytes
                for start, end, part in reads:
                    assert torch.equal(part, model[start:end])
            seen = torch.empty_like(model)
            engine.read(file, 0, seen).wait(60)
            assert torch.equal(seen, model)

    with make_engine(backend) as engine, tempfile.TemporaryDirectory() as folder:
        check()
        assert engine.in_flight == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_any_dtype_and_shape(engine: IOEngine, tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(6000).reshape(20, 300).to(dtype)
    with File(tmp_path / "file", tensor.nbytes) as file:
        assert engine.write(file, 0, tensor).wait() == tensor.nbytes
        seen = torch.empty_like(tensor)
        ticket = engine.read(file, 0, seen)
        assert ticket.wait() == ticket.nbytes == tensor.nbytes
        assert ticket.done()
        assert 0 < ticket.elapsed < 60e9
    assert torch.equal(seen, tensor)
    assert engine.bytes_read == engine.bytes_written == tensor.nbytes


def test_scalar_and_empty(engine: IOEngine, tmp_path: Path) -> None:
    with File(tmp_path / "file", 4096) as file:
        assert engine.write(file, 8, torch.tensor(2.5)).wait() == 4
        seen = torch.zeros(())
        engine.read(file, 8, seen).wait()
        assert seen == 2.5
        assert engine.read(file, 0, torch.empty(0)).wait() == 0


@pytest.mark.parametrize("size", [65536, 65000])
def test_read_past_the_end(engine: IOEngine, tmp_path: Path, size: int) -> None:
    with File(tmp_path / "file", size) as file:
        tensor = torch.ones(size + 1, dtype=torch.uint8)
        ticket = engine.read(file, 0, tensor)
        for _ in range(2):
            with pytest.raises(OSError, match=r"read at offset \d+, length \d+ bytes") as caught:
                ticket.wait()
            assert caught.value.errno == errno.ENODATA
            assert caught.value.filename == str(tmp_path / "file")
        with pytest.raises(OSError, match="past the end"):
            engine.read(file, 1 << 40, torch.empty(5)).wait()
        assert engine.read(file, 0, tensor[:size]).wait() == size
        assert engine.bytes_read == size


def test_write_past_the_fixed_size(engine: IOEngine, tmp_path: Path) -> None:
    with File(tmp_path / "file", 8192) as file, pytest.raises(ValueError, match="fixed size of 8192 bytes"):
        engine.write(file, 4097, torch.zeros(4096, dtype=torch.uint8))


def test_growing_file(engine: IOEngine, tmp_path: Path) -> None:
    data = random_bytes(20000)
    with File(tmp_path / "file", unlink=False) as file:
        assert file.size == 0
        engine.write(file, 5, data).wait()
        file.fsync()
        assert file.size == 20005
    assert (tmp_path / "file").read_bytes()[5:] == data.numpy().tobytes()


def test_bad_arguments(engine: IOEngine, tmp_path: Path) -> None:
    with File(tmp_path / "file", 4096) as file:
        for bad, kind, text in [
            (torch.zeros(4, 4).t()[1:], ValueError, "not contiguous"),
            (torch.zeros(4, device="meta"), ValueError, "is on meta"),
            (torch.zeros(4).to_sparse(), TypeError, "dense"),
            ([1, 2], TypeError, "expected a tensor, not list"),
        ]:
            for call in (engine.read, engine.write):
                with pytest.raises(kind, match=text):
                    call(file, 0, bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="must not be negative"):
            engine.read(file, -1, torch.zeros(4))
        with pytest.raises(TypeError, match="must be a lightning_zinf File"):
            engine.read("file", 0, torch.zeros(4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"threads": 0}, "threads"),
        ({"queue_depth": 0}, "queue_depth"),
        ({"block_bytes": 5000}, "multiple of 4096"),
        ({"backend": "libaio"}, "backend must be"),
    ],
)
def test_bad_options(options: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        IOEngine(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size"):
        File("file", -1)


def test_missing_file_and_folder(engine: IOEngine, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="open for reading") as caught:
        File.open(tmp_path / "none")
    assert caught.value.filename == str(tmp_path / "none")
    for unlink in (True, False):
        with pytest.raises(FileNotFoundError, match="create"):
            File(tmp_path / "none" / "file", 4096, unlink=unlink)


def test_existing_files(engine: IOEngine, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10000)
    with pytest.raises(FileExistsError):
        File(path, 4096, unlink=False)
    with pytest.raises(OSError, match="expected 10001 bytes, the file has 10000"):
        File.open(path, size=10001)
    with File.open(path) as file, pytest.raises(ValueError, match="reading only"):
        engine.write(file, 0, torch.zeros(4))
    with File.open(path, writable=True) as file:
        assert file.size == 10000
        engine.write(file, 9998, torch.full((4,), ord("y"), dtype=torch.uint8)).wait()
    assert path.read_bytes() == b"x" * 9998 + b"yyyy"


def test_nothing_is_left_behind(engine: IOEngine, tmp_path: Path) -> None:
    with File(tmp_path / "file", 8192) as file:
        engine.write(file, 0, torch.zeros(2048)).wait()
        assert list(tmp_path.iterdir()) == []
        assert file.path == str(tmp_path / "file")
    for unlink in (True, False):
        with pytest.raises(OSError, match=r"needs \d+ bytes, \d+ bytes available") as caught:
            File(tmp_path / "file", 1 << 60, unlink=unlink)
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert list(tmp_path.iterdir()) == []


def test_closed(engine: IOEngine, tmp_path: Path) -> None:
    file = File(tmp_path / "file", 1 << 22)
    data = random_bytes(1 << 22)
    tickets = [engine.write(file, at, data[at : at + 65536]) for at in range(0, 1 << 22, 65536)]
    file.close()  # waits
    assert sum(ticket.wait(0) for ticket in tickets if ticket.done() or ticket.wait()) == 1 << 22
    file.close()
    assert file.closed
    assert "closed" in repr(file)
    for use in (lambda: engine.read(file, 0, data), file.fsync, lambda: file.size):
        with pytest.raises(ValueError, match="closed file"):
            use()
    engine.close()
    engine.close()
    assert engine.closed
    with File(tmp_path / "other", 4096) as other, pytest.raises(ValueError, match="closed engine"):
        engine.read(other, 0, torch.empty(4))


def test_dropped_tickets(engine: IOEngine, tmp_path: Path) -> None:
    nbytes, count = 300_000, 40
    with File(tmp_path / "file", nbytes * count, unlink=False) as file:
        alive = []
        for index in range(count):
            data = random_bytes(nbytes, index)
            alive.append(weakref.ref(data))
            engine.write(file, nbytes * index, data)
            del data
        engine.close()
        gc.collect()
        assert [ref for ref in alive if ref() is not None] == []
    expected = b"".join(random_bytes(nbytes, index).numpy().tobytes() for index in range(count))
    assert (tmp_path / "file").read_bytes() == expected


def test_wait_with_timeout(engine: IOEngine, tmp_path: Path) -> None:
    data = random_bytes(32 << 20)
    with File(tmp_path / "file", 4 * data.nbytes) as file:
        tickets = [engine.write(file, index * data.nbytes, data) for index in range(4)]
        with pytest.raises(TimeoutError, match=r"write of .* not done after \d+ ms"):
            tickets[-1].wait(0)
        assert "in flight" in repr(tickets[-1])
        assert tickets[-1].wait(60) == data.nbytes
        for ticket in tickets:
            ticket.wait()
        assert engine.in_flight == 0


def test_many_tickets_from_several_threads(engine: IOEngine, tmp_path: Path) -> None:
    nbytes, count, failures = 5000, 200, []
    with File(tmp_path / "file", nbytes * count * 4) as file:

        def work(rank: int) -> None:
            data = random_bytes(nbytes * count, rank).reshape(count, nbytes)
            base = rank * data.nbytes
            for ticket in [engine.write(file, base + index * nbytes, data[index]) for index in range(count)]:
                ticket.wait()
            seen = torch.empty_like(data)
            for ticket in [engine.read(file, base + index * nbytes, seen[index]) for index in range(count)]:
                ticket.wait()
            if not torch.equal(seen, data):
                failures.append(rank)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_no_direct_io(engine: IOEngine) -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm here")
    data = random_bytes(100_001)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, File(Path(folder) / "file", data.nbytes) as file:
        assert not file.direct
        assert file.ram_backed or engine.backend == "python"
        engine.write(file, 0, data).wait()
        seen = torch.empty_like(data)
        engine.read(file, 0, seen).wait()
        assert torch.equal(seen, data)


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    point = tmp_path / "small"
    point.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs takes root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", point], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield point
    subprocess.run(["umount", "-l", point], check=True)


def test_full_disk(engine: IOEngine, small_tmpfs: Path) -> None:
    for unlink in (True, False):
        with pytest.raises(OSError, match="needs 4194304 bytes, 1048576 bytes available") as caught:
            File(small_tmpfs / "file", 4 << 20, unlink=unlink)
        assert caught.value.errno == errno.ENOSPC
    assert list(small_tmpfs.iterdir()) == []
    with File(small_tmpfs / "file", 4 << 20, preallocate=False) as file:
        with pytest.raises(OSError, match="write at offset") as caught:
            engine.write(file, 0, torch.zeros(4 << 20, dtype=torch.uint8)).wait()
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(small_tmpfs / "file")
