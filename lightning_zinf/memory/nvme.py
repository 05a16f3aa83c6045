"""The NVMe tier: preallocated files and extents in them."""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lightning_zinf.config import IOConfig
from lightning_zinf.layout import SHARD_ALIGNMENT, round_up
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.ops import File, IOEngine, Ticket

_RAM_BACKED = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Extent:
    """A piece of a file: ``nbytes`` from ``offset``, both multiples of 4096."""

    file: File
    offset: int
    nbytes: int


class NvmeStore:
    """Extents on a local disk, read and written asynchronously past the page cache.

    Files are preallocated, so a full disk is an error before training and never in its midst, and unlinked as soon as
    they are open, so a crash leaves nothing behind.

    Args:
        folder: Folder for the files; made if missing.
        io: How to read and write.
        counters: Where bytes are counted.
        chunk_bytes: Least size of a file that is made because the ones before are full.

    Raises:
        OSError: If the folder cannot be made or written to.
    """

    def __init__(
        self, folder: str | os.PathLike[str], io: IOConfig, counters: Counters, chunk_bytes: int = SHARD_ALIGNMENT
    ) -> None:
        self.folder = Path(folder)
        self._chunk_bytes = chunk_bytes
        self._io = io
        self._counters = counters
        self._check_folder()
        self.engine = IOEngine(
            threads=io.threads, queue_depth=io.queue_depth, block_bytes=io.block_bytes, backend=io.backend
        )
        self.files: list[File] = []
        self.allocated_bytes = 0
        self._free_from = 0

    def reserve(self, nbytes: int) -> None:
        """Preallocate a file that the next ``nbytes`` of extents will lie in.

        Raises:
            OSError: If the disk has not that much room, with the numbers.
        """
        nbytes = round_up(max(nbytes, SHARD_ALIGNMENT), SHARD_ALIGNMENT)
        try:
            file = File(self.folder / f"zinf-{os.getpid()}-{len(self.files)}.state", nbytes, direct=self._io.direct)
        except OSError as error:
            error.add_note(
                f"nvme_path={str(self.folder)!r} must hold {nbytes / 2**30:.2f} GiB of training state: free some "
                "space, give another nvme_path, or offload less (offload_params / offload_optimizer)."
            ) if hasattr(error, "add_note") else None
            raise
        if self._io.direct and not file.direct and not self.files:
            warnings.warn(
                f"{str(self.folder)!r} has no direct I/O, so the page cache is used and drained as we go; "
                "reads and writes will be slower and use more memory for a while.",
                stacklevel=2,
            )
        self.files.append(file)
        self._free_from = 0

    def allocate(self, nbytes: int) -> Extent:
        """Return the next extent of ``nbytes``, reserving a file for it if none has room."""
        nbytes = round_up(nbytes, SHARD_ALIGNMENT)
        if not self.files or self._free_from + nbytes > self.files[-1].size:
            self.reserve(max(nbytes, self._chunk_bytes))
        extent = Extent(self.files[-1], self._free_from, nbytes)
        self._free_from += nbytes
        self.allocated_bytes += nbytes
        return extent

    def read(self, extent: Extent, tensor: Tensor, offset: int = 0, counters: Counters | None = None) -> Ticket:
        """Start to fill ``tensor`` from ``offset`` bytes into ``extent``; other threads count for themselves."""
        self._check(extent, tensor, offset)
        (counters or self._counters).nvme_read_bytes += tensor.nbytes
        return self.engine.read(extent.file, extent.offset + offset, tensor)

    def write(self, extent: Extent, tensor: Tensor, offset: int = 0) -> Ticket:
        """Start to write ``tensor`` at ``offset`` bytes into ``extent``."""
        self._check(extent, tensor, offset)
        self._counters.nvme_write_bytes += tensor.nbytes
        return self.engine.write(extent.file, extent.offset + offset, tensor)

    def close(self) -> None:
        """Finish what is under way and give the space back."""
        self.engine.close()
        for file in self.files:
            file.close()
        self.files.clear()

    @staticmethod
    def _check(extent: Extent, tensor: Tensor, offset: int) -> None:
        assert 0 <= offset <= extent.nbytes - tensor.nbytes, (offset, tensor.nbytes, extent.nbytes)

    def _check_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise type(error)(
                error.errno,
                f"nvme_path cannot be used ({error.strerror}): give a folder on a local disk that can be "
                "written to, with nvme_path=... or the environment variable ZINF_NVME_PATH",
                str(self.folder),
            ) from error
        kind = file_system_of(self.folder)
        if kind in _RAM_BACKED:
            warnings.warn(
                f"nvme_path={str(self.folder)!r} is a RAM-backed file system ({kind}): what is offloaded there stays "
                "in memory. Give a folder on a disk with nvme_path=... or ZINF_NVME_PATH.",
                stacklevel=2,
            )


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
