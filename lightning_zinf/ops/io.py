"""Asynchronous file I/O of tensors: files past the page cache, an engine that moves bytes, tickets to wait on.

Note. Requests go to the compiled extension, whose own threads (or the kernel's io_uring) carry them out without the
GIL. Several requests may be in flight on one file as long as they do not overlap where one of them writes. Offsets,
lengths and addresses need no alignment, but only whole blocks of ``File.alignment`` bytes go directly between memory
and drive: align what is big. Without the extension the same classes run on ``os.preadv`` and ``os.pwritev`` in Python
threads, after one warning.
"""

from __future__ import annotations

import importlib
import os
from types import TracebackType
from typing import Any, Literal

import torch

__all__ = ["File", "IOEngine", "Ticket"]

_native: Any
try:
    _native = importlib.import_module("lightning_zinf._ext")
except ImportError as _error:
    from lightning_zinf.ops import _fallback as _native

    _native.warn_missing(_error)


class File:
    """An open file that an :class:`IOEngine` reads and writes.

    Args:
        path: Where. It stays in error messages, whether or not the file has a name.
        size: Size in bytes. With ``create`` it becomes the file's fixed size, and a write past it is refused; None
            makes an empty file that grows. Without ``create``: the bytes the file must have at least, or None.
        create: Make a new file. False opens an existing one.
        unlink: A created file has no name (or loses it at once), so that it vanishes with its last user, crash or not.
            Existing files are never removed.
        direct: Go past the page cache where the file system can (see :attr:`direct`).
        preallocate: Take the space of a created file now, so that a full disk shows here and not at a later write.
            Where a file system cannot, only the room left is checked.
        writable: Open an existing file for writing too. Created files are always writable.

    Raises:
        OSError: The file cannot be created or opened; it has ``errno`` and ``filename``. Of the subclasses,
            FileExistsError with ``create`` and not ``unlink``. No space (ENOSPC): the message has the bytes needed and
            available, and nothing is left behind. Shorter than ``size``: ENODATA.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int | None = None,
        *,
        create: bool = True,
        unlink: bool = True,
        direct: bool = True,
        preallocate: bool = True,
        writable: bool = True,
    ) -> None:
        if size is not None and size < 0:
            raise ValueError(f"size must not be negative: {size} ({os.fspath(path)!r})")
        self._native = _native.File(os.fspath(path), size, create, unlink, direct, preallocate, writable)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, writable: bool = False, direct: bool = True, size: int | None = None
    ) -> File:
        """Open an existing file, by default for reading only.

        Raises:
            OSError: As the constructor.
        """
        return cls(path, size, create=False, unlink=False, direct=direct, writable=writable)

    @property
    def path(self) -> str:
        """The path given at construction."""
        path: str = self._native.path
        return path

    @property
    def size(self) -> int:
        """Size in bytes, now.

        Raises:
            ValueError: The file is closed.
        """
        size: int = self._native.size
        return size

    @property
    def direct(self) -> bool:
        """Whether whole blocks go past the page cache.

        May turn False at the first transfer, on file systems that accept O_DIRECT and do not mean it.
        """
        direct: bool = self._native.direct
        return direct

    @property
    def ram_backed(self) -> bool:
        """Whether the file lies in memory (tmpfs, ramfs): nothing is offloaded by writing there."""
        ram_backed: bool = self._native.ram_backed
        return ram_backed

    @property
    def writable(self) -> bool:
        """Whether writes are accepted."""
        writable: bool = self._native.writable
        return writable

    @property
    def alignment(self) -> int:
        """Bytes of a block: what offsets and lengths should be multiples of to go directly."""
        alignment: int = self._native.alignment
        return alignment

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        closed: bool = self._native.closed
        return closed

    def fsync(self) -> None:
        """Wait until all that was written, by finished requests, is on stable storage.

        Raises:
            OSError: The drive reports an error.
            ValueError: The file is closed.
        """
        self._native.fsync()

    def close(self) -> None:
        """Wait for the requests in flight, then close. Safe to repeat."""
        self._native.close()

    def __enter__(self) -> File:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.size} bytes, {'direct' if self.direct else 'buffered'}"
        return f"File({self.path!r}, {state})"


class Ticket:
    """A request in flight. It may be dropped: the request goes on, and the tensor lives until it is done."""

    __slots__ = ("_native",)

    def __init__(self, native: Any) -> None:
        self._native = native

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the request is done, and return the bytes transferred. May be called again.

        Args:
            timeout: Seconds to wait at most; None waits on.

        Raises:
            OSError: The request failed; all of its pieces are at rest. Has ``errno`` and ``filename``, and the
                operation, offset and length that failed in the message. A read past the end of the file: ENODATA.
            TimeoutError: Not done in time. The request goes on.
            ValueError: The ticket comes from the parent of this forked process.
        """
        nbytes: int = self._native.wait(timeout)
        return nbytes

    def done(self) -> bool:
        """Whether the request is done, well or badly. Never blocks."""
        done: bool = self._native.done()
        return done

    @property
    def elapsed(self) -> int:
        """Nanoseconds from submission to completion, or until now."""
        elapsed: int = self._native.elapsed
        return elapsed

    @property
    def nbytes(self) -> int:
        """Bytes asked for."""
        nbytes: int = self._native.nbytes
        return nbytes

    def __repr__(self) -> str:
        return f"Ticket({self.nbytes} bytes, {'done' if self.done() else 'in flight'})"


class IOEngine:
    """Carries out reads and writes in the background.

    After a fork the child may use the engine: its first request starts new threads. Tickets from before the fork stay
    with the parent.

    Args:
        threads: Blocking transfers at a time, with the backend "threads".
        queue_depth: Transfers in flight, with the backend "io_uring".
        block_bytes: Large requests are cut at multiples of this; a multiple of 4096.
        backend: "threads" always works; "io_uring" needs a kernel that allows it; "auto" chooses, and
            :attr:`backend_reason` tells why.

    Raises:
        ValueError: An argument is out of range, or "io_uring" is not available.
    """

    def __init__(
        self,
        threads: int = 8,
        queue_depth: int = 64,
        block_bytes: int = 1 << 20,
        backend: Literal["auto", "threads", "io_uring"] = "auto",
    ) -> None:
        for name, value in (("threads", threads), ("queue_depth", queue_depth), ("block_bytes", block_bytes)):
            if value < 1:
                raise ValueError(f"{name} must be positive: {value}")
        self._native = _native.IOEngine(threads, queue_depth, block_bytes, backend)

    def read(self, file: File, offset: int, tensor: torch.Tensor) -> Ticket:
        """Start to fill ``tensor`` with the bytes of ``file`` from ``offset`` on.

        The tensor must not be used until the ticket is done. Autograd's version counter does not see the change.

        Args:
            file: Where to read.
            offset: First byte.
            tensor: A contiguous CPU tensor of any dtype; its own memory is filled.

        Raises:
            ValueError: A tensor not contiguous or not on the CPU, a negative offset, a closed file or engine.
            TypeError: Not a :class:`File`, not a tensor, or a sparse one.
        """
        return Ticket(self._native.read(*_checked("read", file, offset, tensor)))

    def write(self, file: File, offset: int, tensor: torch.Tensor) -> Ticket:
        """Start to write the bytes of ``tensor`` to ``file`` from ``offset`` on.

        The tensor must not change until the ticket is done. Done means handed to the drive, in general not more:
        :meth:`File.fsync` makes it last.

        Args:
            file: Where to write.
            offset: First byte.
            tensor: A contiguous CPU tensor of any dtype.

        Raises:
            ValueError: As :meth:`read`; also a file not writable, or the end past the fixed size of a created file.
            TypeError: As :meth:`read`.
        """
        return Ticket(self._native.write(*_checked("write", file, offset, tensor)))

    def close(self) -> None:
        """Wait for all requests, then end the threads. Safe to repeat; also happens at the interpreter's exit."""
        self._native.close()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        closed: bool = self._native.closed
        return closed

    @property
    def backend(self) -> str:
        """The backend in use: "threads", "io_uring", or "python" without the extension."""
        backend: str = self._native.backend
        return backend

    @property
    def backend_reason(self) -> str:
        """Why this backend, in one line."""
        reason: str = self._native.backend_reason
        return reason

    @property
    def in_flight(self) -> int:
        """Requests not done yet."""
        in_flight: int = self._native.in_flight
        return in_flight

    @property
    def bytes_read(self) -> int:
        """Bytes of all reads that succeeded."""
        nbytes: int = self._native.bytes_read
        return nbytes

    @property
    def bytes_written(self) -> int:
        """Bytes of all writes that succeeded."""
        nbytes: int = self._native.bytes_written
        return nbytes

    def __enter__(self) -> IOEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"IOEngine(backend={self.backend!r}, in_flight={self.in_flight})"


def _checked(operation: str, file: File, offset: int, tensor: torch.Tensor) -> tuple[Any, int, int, int, torch.Tensor]:
    """Return what the extension takes: file, offset, address, bytes, and who owns the memory."""
    if not isinstance(file, File):
        raise TypeError(f"{operation}: file must be a lightning_zinf File, not {type(file).__name__}")
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{operation} of {file.path!r}: expected a tensor, not {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{operation} of {file.path!r}: expected a dense tensor, not {tensor.layout}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{operation} of {file.path!r}: the tensor is on {tensor.device}, not on the CPU")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{operation} of {file.path!r}: the tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} "
            "is not contiguous"
        )
    if offset < 0:
        raise ValueError(f"{operation} of {file.path!r}: offset must not be negative: {offset}")
    return file._native, offset, tensor.data_ptr(), tensor.nbytes, tensor
