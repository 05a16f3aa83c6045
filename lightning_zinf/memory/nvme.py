"""The NVMe tier: preallocated files on one or several drives, and extents in them."""

from __future__ import annotations

import functools
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_zinf.config import IOConfig
from lightning_zinf.layout import SHARD_ALIGNMENT, round_up
from lightning_zinf.memory.slots import Ticket
from lightning_zinf.memory.stripes import cut, share
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.ops import File, IOEngine
from lightning_zinf.ops import Ticket as FileTicket

_RAM_BACKED = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Volume:
    """Files that were reserved together, one in each folder, with stripes over them.

    Attributes:
        files: The files, in the order of the folders.
        size: Bytes of all of them that extents may take.
    """

    files: tuple[File, ...]
    size: int


@dataclass(frozen=True)
class Extent:
    """A piece of a volume: ``nbytes`` from ``offset``, both multiples of 4096, and what lies there.

    It reads as zeros until it is written to, unless it is used ``again``: then as what somebody else has left there.
    """

    volume: Volume
    offset: int
    nbytes: int
    name: str = ""
    again: bool = False


class StripedTicket:
    """A request in flight on several drives: it is done when all of it is.

    Args:
        tickets: Of its pieces, each with the nanoseconds that it was submitted after the first.
    """

    def __init__(self, tickets: Sequence[tuple[int, FileTicket]]) -> None:
        self._tickets = tickets

    def wait(self, timeout: float | None = None) -> int:
        """Wait until all pieces are done, and return the bytes transferred.

        Raises:
            OSError: A piece failed; all of them are at rest. The first one's error, which names the file.
            TimeoutError: Not done in time. The request goes on.
        """
        end = None if timeout is None else time.monotonic() + timeout
        nbytes = 0
        late: OSError | None = None
        failed: OSError | None = None
        for _, ticket in self._tickets:
            try:
                nbytes += ticket.wait(None if end is None else max(0.0, end - time.monotonic()))
            except TimeoutError as error:
                late = late or error
            except OSError as error:
                failed = failed or error
        if (wrong := late or failed) is not None:
            raise wrong
        return nbytes

    def done(self) -> bool:
        """Whether all pieces are done, well or badly."""
        return all(ticket.done() for _, ticket in self._tickets)

    @property
    def elapsed(self) -> int:
        """Nanoseconds from submission to completion of the last piece, or until now."""
        return max(after + ticket.elapsed for after, ticket in self._tickets)


class OutOfDate:
    """Stands for the read of a shard that could not be written: it fails with what the write failed with.

    Args:
        written: The write.
        name: Whose shard, for the message.
    """

    def __init__(self, written: Ticket, name: str) -> None:
        self._written = written
        self._name = name

    def wait(self, timeout: float | None = None) -> int:
        """Raise what the write failed with.

        Raises:
            OSError: Always, with the errno and the file of the write.
        """
        try:
            return self._written.wait(timeout)
        except OSError as error:
            raise type(error)(
                error.errno,
                f"{error.strerror}: the weights of {self._name!r} could not be written, so those on NVMe are out of "
                "date and are not read: mend the drive, or give another nvme_path, and go on from a checkpoint",
                error.filename,
            ) from error

    def done(self) -> bool:
        """Whether the write is done, which it is."""
        return self._written.done()


class NvmeStore:
    """Extents on local drives, read and written asynchronously past the page cache.

    Files are preallocated, so a full disk is an error before training and never in its midst, and unlinked as soon as
    they are open, so a crash leaves nothing behind. With several folders extents are striped over them; each has an
    I/O engine of its own, so that a drive that is slow for a moment holds back its own requests only.

    Args:
        folders: Folder or folders for the files; made if missing.
        io: How to read and write.
        counters: Where bytes are counted.
        chunk_bytes: Least size of a volume that is made because the ones before are full.

    Raises:
        OSError: If a folder cannot be made or written to.
        ValueError: If two folders are the same.
    """

    def __init__(
        self,
        folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        io: IOConfig,
        counters: Counters,
        chunk_bytes: int = SHARD_ALIGNMENT,
    ) -> None:
        several = [folders] if isinstance(folders, (str, os.PathLike)) else folders
        self.folders = tuple(Path(folder) for folder in several)
        self._chunk_bytes = chunk_bytes
        self._io = io
        self._counters = counters
        for folder in self.folders:
            _check_folder(folder)
        _check_different(self.folders)
        self.engines = tuple(
            IOEngine(threads=io.threads, queue_depth=io.queue_depth, block_bytes=io.block_bytes, backend=io.backend)
            for _ in self.folders
        )
        self.volumes: list[Volume] = []
        self.allocated_bytes = 0
        self._free_from = 0
        self._released: list[Extent] = []  # no two of them adjacent

    def reserve(self, nbytes: int) -> None:
        """Preallocate a volume that the next ``nbytes`` of extents will lie in.

        Raises:
            OSError: If a drive has not that much room, with the numbers.
        """
        nbytes = round_up(max(nbytes, SHARD_ALIGNMENT), SHARD_ALIGNMENT)
        files: list[File] = []
        try:
            for number, folder in enumerate(self.folders):
                own = share(nbytes, number, len(self.folders), self._io.block_bytes)
                files.append(self._file(folder, max(own, SHARD_ALIGNMENT), nbytes))
        except BaseException:
            for file in files:
                file.close()
            raise
        self.volumes.append(Volume(tuple(files), nbytes))
        self._free_from = 0

    def _file(self, folder: Path, nbytes: int, whole: int) -> File:
        try:
            file = File(folder / f"zinf-{os.getpid()}-{len(self.volumes)}.state", nbytes, direct=self._io.direct)
        except OSError as error:
            paths = len(self.folders)
            part = f", its share of {whole / 2**30:.2f} GiB over {paths} paths" if paths > 1 else ""
            raise type(error)(
                error.errno,
                f"{error.strerror}: nvme_path={str(folder)!r} must hold {nbytes / 2**30:.2f} GiB of training state"
                f"{part}: free some space, give another nvme_path, or offload less (offload_params, "
                "offload_optimizer, offload_activations)",
                error.filename,
            ) from error
        if self._io.direct and not file.direct and not self.volumes:
            warnings.warn(
                f"{str(folder)!r} has no direct I/O, so the page cache is used and drained as we go; "
                "reads and writes will be slower and use more memory for a while.",
                stacklevel=2,
            )
        return file

    def allocate(self, nbytes: int, name: str = "", *, again: bool = False) -> Extent:
        """Return an extent of ``nbytes``, reserving a volume for it if none has room.

        Args:
            nbytes: Size, which is rounded up to a multiple of 4096.
            name: What lies there, for traces.
            again: Prefer the first room that was given back and is large enough. What it reads as is not known then.

        Raises:
            OSError: If another volume is needed and a drive has no room for it.
        """
        nbytes = round_up(nbytes, SHARD_ALIGNMENT)
        if again and (room := next((e for e in self._released if e.nbytes >= nbytes), None)) is not None:
            self._released.remove(room)
            if room.nbytes > nbytes:
                rest = replace(room, offset=room.offset + nbytes, nbytes=room.nbytes - nbytes)
                self._released.append(rest)
            self.allocated_bytes += nbytes
            return replace(room, nbytes=nbytes, name=name)
        if not self.volumes or self._free_from + nbytes > self.volumes[-1].size:
            self.reserve(max(nbytes, self._chunk_bytes))
        extent = Extent(self.volumes[-1], self._free_from, nbytes, name)
        self._free_from += nbytes
        self.allocated_bytes += nbytes
        return extent

    def release(self, extent: Extent) -> None:
        """Take an extent back, for those who allocate with ``again``. Nothing may be under way there."""
        self.allocated_bytes -= extent.nbytes
        start, stop = extent.offset, extent.offset + extent.nbytes
        for other in [e for e in self._released if e.volume is extent.volume]:
            if other.offset + other.nbytes == start or other.offset == stop:
                start, stop = min(start, other.offset), max(stop, other.offset + other.nbytes)
                self._released.remove(other)
        self._released.append(Extent(extent.volume, start, stop - start, again=True))

    def read(self, extent: Extent, tensor: Tensor, offset: int = 0, counters: Counters | None = None) -> Ticket:
        """Start to fill ``tensor`` from ``offset`` bytes into ``extent``; other threads count for themselves."""
        self._check(extent, tensor, offset)
        (counters or self._counters).nvme_read_bytes += tensor.nbytes
        trace = self._counters.trace
        submit = functools.partial(self._submit, "read", extent, tensor, offset)
        return submit() if trace is None else trace.request("nvme_read", extent.name, tensor.nbytes, submit)

    def write(self, extent: Extent, tensor: Tensor, offset: int = 0) -> Ticket:
        """Start to write ``tensor`` at ``offset`` bytes into ``extent``."""
        self._check(extent, tensor, offset)
        self._counters.nvme_write_bytes += tensor.nbytes
        trace = self._counters.trace
        submit = functools.partial(self._submit, "write", extent, tensor, offset)
        return submit() if trace is None else trace.request("nvme_write", extent.name, tensor.nbytes, submit)

    def _submit(self, operation: Literal["read", "write"], extent: Extent, tensor: Tensor, offset: int) -> Ticket:
        files = extent.volume.files
        pieces = cut(extent.offset + offset, tensor.nbytes, len(files), self._io.block_bytes)
        starts = [e.read if operation == "read" else e.write for e in self.engines]
        if len(pieces) == 1:
            (piece,) = pieces
            return starts[piece.file](files[piece.file], piece.offset, tensor)
        memory, begin = tensor.detach().view(-1).view(torch.uint8), time.perf_counter_ns()
        tickets: list[tuple[int, FileTicket]] = []
        for piece in pieces:
            part, after = memory[piece.start : piece.start + piece.nbytes], time.perf_counter_ns() - begin
            tickets.append((after, starts[piece.file](files[piece.file], piece.offset, part)))
        return StripedTicket(tickets)

    def traffic(self) -> list[tuple[int, int]]:
        """Return the bytes read and written in each folder, by requests that are done."""
        return [(engine.bytes_read, engine.bytes_written) for engine in self.engines]

    def close(self) -> None:
        """Finish what is under way and give the space back."""
        for engine in self.engines:
            engine.close()
        for volume in self.volumes:
            for file in volume.files:
                file.close()
        self.volumes.clear()
        self._released.clear()

    @staticmethod
    def _check(extent: Extent, tensor: Tensor, offset: int) -> None:
        assert 0 <= offset <= extent.nbytes - tensor.nbytes, (offset, tensor.nbytes, extent.nbytes)


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(
            error.errno,
            f"nvme_path cannot be used ({error.strerror}): give a folder on a local disk that can be "
            "written to, with nvme_path=... or the environment variable ZINF_NVME_PATH",
            str(folder),
        ) from error
    kind = file_system_of(folder)
    if kind in _RAM_BACKED:
        warnings.warn(
            f"nvme_path={str(folder)!r} is a RAM-backed file system ({kind}): what is offloaded there stays "
            "in memory. Give a folder on a disk with nvme_path=... or ZINF_NVME_PATH.",
            stacklevel=2,
        )


def _check_different(folders: Sequence[Path]) -> None:
    for number, folder in enumerate(folders):
        if any(folder.samefile(other) for other in folders[:number]):
            raise ValueError(f"nvme_path names the folder {str(folder)!r} twice: give each drive's folder once")


def file_system_of(path: Path) -> str:
    """Return the type of the file system that ``path`` lies on, or "" where that cannot be told."""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""
    target, best, kind = os.path.realpath(path), "", ""
    for line in mounts:
        fields = line.split()
        point = fields[1].encode().decode("unicode_escape")
        if (target == point or target.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind
