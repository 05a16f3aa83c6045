"""Writing one rank's shard while training goes on: threads that take pieces of a snapshot to their place in a file.

Note [Streams]
~~~~~~~~~~~~~~
Where each plane lies in the file is known before the first byte, so a local file takes pieces in any order, past the
page cache, straight from the memory that has them. Checksums are of blocks of the file, which come in parts then:
CRC-32 is linear, so the parts' checksums are combined at the end. Files elsewhere are written from their beginning.

What is in memory beside the planes is one piece for each thread, and the snapshot's copies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lightning_zinf.checkpoint.files import Writer, raw_bytes
from lightning_zinf.checkpoint.folder import Folder
from lightning_zinf.checkpoint.manifest import BLOCK_BYTES, FileInfo
from lightning_zinf.config import IOConfig
from lightning_zinf.engine.snapshot import Snapshot, Work
from lightning_zinf.memory.nvme import NvmeStore
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.ops import File, IOEngine, crc32, crc32_combine, host_empty

THREADS = 4
"""Pieces under way at once in a local file."""


class Destination(Protocol):
    """A file that is being written."""

    threads: int
    in_order: bool

    def put(self, at: int, content: Tensor) -> None:
        """Write a contiguous CPU tensor's bytes from byte ``at`` on."""

    def finish(self) -> FileInfo:
        """Have everything on disk."""

    def abandon(self) -> None:
        """Close and remove the file, whatever state it is in."""


class LocalFile:
    """A file of a known size that takes its content in any order, from several threads.

    Args:
        folder: Where.
        name: Its name.
        nbytes: Its size.
        io: How to write.

    Raises:
        OSError: If there is not that much room, with the numbers.
    """

    threads = THREADS
    in_order = False

    def __init__(self, folder: Folder, name: str, nbytes: int, io: IOConfig) -> None:
        self._name = name
        self._path = Path(folder.at(name))
        self._nbytes = nbytes
        self._sums = BlockSums(nbytes)
        self._file = File(self._path, nbytes, unlink=False, direct=io.direct)
        self._engine = IOEngine(
            threads=THREADS, queue_depth=io.queue_depth, block_bytes=io.block_bytes, backend=io.backend
        )

    def put(self, at: int, content: Tensor) -> None:
        """See :class:`Destination`."""
        ticket = self._engine.write(self._file, at, content)
        try:
            self._sums.add(at, raw_bytes(content))
        finally:
            ticket.wait()

    def finish(self) -> FileInfo:
        """See :class:`Destination`."""
        self._file.fsync()
        self._close()
        return FileInfo(self._name, self._nbytes, self._sums.blocks())

    def abandon(self) -> None:
        """See :class:`Destination`."""
        self._close()
        self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        self._engine.close()
        self._file.close()


class RemoteFile:
    """A file on any file system, written from its beginning.

    Args:
        folder: Where.
        name: Its name.
    """

    threads = 1
    in_order = True

    def __init__(self, folder: Folder, name: str) -> None:
        self._writer = Writer(folder, name)
        self._at = 0

    def put(self, at: int, content: Tensor) -> None:
        """See :class:`Destination`."""
        assert at == self._at, (at, self._at)
        self._writer.write(raw_bytes(content))
        self._at += content.nbytes

    def finish(self) -> FileInfo:
        """See :class:`Destination`."""
        return self._writer.finish()

    def abandon(self) -> None:
        """See :class:`Destination`."""
        self._writer.abandon()


class BlockSums:
    """Checksums of the blocks of a file whose content comes in any order, from several threads.

    Args:
        nbytes: Size of the file.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._parts: dict[int, list[tuple[int, int, int]]] = {}
        self._lock = threading.Lock()

    def add(self, at: int, content: memoryview) -> None:
        """Take in the bytes from byte ``at`` on."""
        while content:
            part = content[: BLOCK_BYTES - at % BLOCK_BYTES]
            crc = crc32(part)
            with self._lock:
                self._parts.setdefault(at // BLOCK_BYTES, []).append((at, len(part), crc))
            at += len(part)
            content = content[len(part) :]

    def blocks(self) -> tuple[int, ...]:
        """Return the checksum of every block; all bytes must have been there."""
        found = []
        for number in range(-(-self._nbytes // BLOCK_BYTES)):
            at, crc = number * BLOCK_BYTES, 0
            for start, nbytes, other in sorted(self._parts[number]):
                assert start == at, (start, at)
                at, crc = at + nbytes, crc32_combine(crc, other, nbytes)
            assert at == min(self._nbytes, (number + 1) * BLOCK_BYTES), at
            found.append(crc)
        return tuple(found)


def stream(snapshot: Snapshot, into: Destination, nvme: NvmeStore | None) -> Counters:
    """Write every piece of a snapshot to its place.

    Args:
        snapshot: The snapshot; the place of a plane is its first byte in the file.
        into: The file.
        nvme: Where planes lie that are not in memory.

    Returns:
        What was read from NVMe.

    Raises:
        OSError: If a piece cannot be read or written; the snapshot is over then.
    """
    failures: list[BaseException] = []
    counters = [Counters() for _ in range(into.threads)]

    def run(own: Counters) -> None:
        try:
            _carry(snapshot, into, nvme, own)
        except BaseException as failure:
            failures.append(failure)
            snapshot.stop()

    helpers = [threading.Thread(target=run, args=(own,), name="zinf-save", daemon=True) for own in counters[1:]]
    for helper in helpers:
        helper.start()
    run(counters[0])
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
    total = Counters()
    for own in counters:
        total.nvme_read_bytes += own.nvme_read_bytes
    return total


def _carry(snapshot: Snapshot, into: Destination, nvme: NvmeStore | None, counters: Counters) -> None:
    memory = torch.empty(0, dtype=torch.uint8)
    while (work := snapshot.take()) is not None:
        piece = work.piece
        if piece.extent is not None:
            assert nvme is not None
            for ticket in work.held.tickets:
                ticket.wait()
            memory = memory if memory.numel() >= piece.nbytes else host_empty(piece.nbytes)
            content = memory[: piece.nbytes]
            nvme.read(piece.extent, content, piece.offset, counters).wait()
            snapshot.done_with_source(work)
            into.put(work.at, content)
        else:
            into.put(work.at, _in_host_memory(work))
            snapshot.done_with_source(work)


def _in_host_memory(work: Work) -> Tensor:
    if work.copy is not None:
        return work.copy[: work.piece.nbytes]
    assert work.piece.memory is not None
    return work.piece.memory.detach().cpu()


def destination(folder: Folder, name: str, nbytes: int, io: IOConfig) -> Destination:
    """Begin a file."""
    return LocalFile(folder, name, nbytes, io) if folder.local else RemoteFile(folder, name)


def write_shard(
    snapshot: Snapshot, head: bytes, nbytes: int, begin: Callable[[int], Destination], nvme: NvmeStore | None
) -> tuple[FileInfo, Counters]:
    """Write a file of a header and the planes of a snapshot.

    Args:
        snapshot: The planes, with their first bytes in the file.
        head: The header.
        nbytes: Size of the file.
        begin: Begins a file of a size.
        nvme: Where planes lie that are not in memory.

    Raises:
        OSError: If it cannot be written; then it is removed.
    """
    into = begin(nbytes)
    try:
        into.put(0, torch.frombuffer(bytearray(head), dtype=torch.uint8))
        moved = stream(snapshot, into, nvme)
        if snapshot.over:
            raise InterruptedError("saving was given up")
        return into.finish(), moved
    except BaseException:
        into.abandon()
        raise


def places(head: bytes, sizes: Sequence[Mapping[str, int]]) -> tuple[list[dict[str, int]], int]:
    """Return the first byte of each plane of each buffer in a file, and the file's size.

    Args:
        head: The file's header.
        sizes: Bytes of each plane, for each buffer, in the order of the file.
    """
    at, found = len(head), []
    for planes in sizes:
        own: dict[str, int] = {}
        for plane, nbytes in planes.items():
            own[plane] = at
            at += nbytes
        found.append(own)
    return found, at
