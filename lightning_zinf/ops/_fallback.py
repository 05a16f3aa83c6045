"""What the compiled extension gives for I/O and host memory, in plain Python: slow, and only where it is missing.

Note. The classes here stand in for those of ``lightning_zinf._ext`` behind ``io.py`` and ``memory.py``, with the same
arguments and errors. Everything goes through the page cache, which is told to forget what was transferred.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import threading
import time
import warnings
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError

import torch

_NO_DATA = getattr(errno, "ENODATA", errno.EIO)
_counter = itertools.count()


def warn_missing(error: ImportError) -> None:
    """Say once, loudly, that the extension is missing."""
    warnings.warn(
        f"lightning-zinf runs WITHOUT its compiled extension ({error}): file I/O goes through Python threads and the "
        "page cache, slower and with more memory. Build it with a C++17 compiler: "
        "`pip install --force-reinstall --no-deps .` in a checkout.",
        UserWarning,
        stacklevel=2,
    )


class File:
    """See ``lightning_zinf.ops.io.File``."""

    direct = False
    ram_backed = False
    alignment = 4096

    def __init__(
        self, path: str, size: int | None, create: bool, unlink: bool, direct: bool, preallocate: bool, writable: bool
    ) -> None:
        self.path = path
        self.writable = writable or create
        self._fixed_size = size if create else None
        self._in_flight = 0
        self._idle = threading.Condition()
        self.closed = True  # until all is well: nobody else shall close what a failure here has closed
        if create:
            name = f"{path}.tmp{os.getpid()}-{next(_counter)}-{time.time_ns()}" if unlink else path
            self.fd = self._call("create", os.open, name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                if unlink:
                    os.unlink(name)
                self._allocate(size or 0, preallocate)
            except BaseException:
                os.close(self.fd)
                if not unlink:
                    os.unlink(name)
                raise
        else:
            flags = os.O_RDWR if writable else os.O_RDONLY
            operation = "open for reading and writing" if writable else "open for reading"
            self.fd = self._call(operation, os.open, path, flags | os.O_CLOEXEC)
            found = os.fstat(self.fd).st_size
            if size is not None and found < size:
                os.close(self.fd)
                raise self._error(_NO_DATA, "open", f"expected {size} bytes, the file has {found}")
        self.closed = False

    def _error(self, code: int, operation: str, detail: str = "") -> OSError:
        return OSError(code, f"{os.strerror(code)}: {operation}" + (f" ({detail})" if detail else ""), self.path)

    def _call(self, operation: str, function, *args, detail: str = ""):  # type: ignore[no-untyped-def]
        try:
            return function(*args)
        except OSError as error:
            raise self._error(error.errno or errno.EIO, operation, detail) from None

    def _allocate(self, size: int, preallocate: bool) -> None:
        if size == 0:
            return
        info = os.fstatvfs(self.fd)
        available = (info.f_bfree if os.geteuid() == 0 else info.f_bavail) * info.f_frsize
        numbers = f"needs {size} bytes, {available} bytes available"
        if preallocate and info.f_blocks and available < size:
            raise self._error(errno.ENOSPC, "allocate", numbers)
        if preallocate and hasattr(os, "posix_fallocate"):
            self._call("allocate", os.posix_fallocate, self.fd, 0, size, detail=numbers)
        else:
            self._call("set size", os.ftruncate, self.fd, size, detail=numbers)

    @property
    def size(self) -> int:
        """Bytes now."""
        if self.closed:
            raise ValueError(f"size on a closed file: {self.path}")
        return os.fstat(self.fd).st_size

    def enter(self, operation: str, offset: int, length: int) -> None:
        """Count a request in."""
        if operation == "write" and not self.writable:
            raise ValueError(f"write on a file opened for reading only: {self.path}")
        if operation == "write" and self._fixed_size is not None and offset + length > self._fixed_size:
            raise ValueError(
                f"write at offset {offset}, length {length} bytes ends past the file's fixed size of "
                f"{self._fixed_size} bytes: {self.path}"
            )
        with self._idle:
            if self.closed:
                raise ValueError(f"{operation} on a closed file: {self.path}")
            self._in_flight += 1

    def leave(self) -> None:
        """Count a request out."""
        with self._idle:
            self._in_flight -= 1
            self._idle.notify_all()

    def fsync(self) -> None:
        """Make it last."""
        self.enter("fsync", 0, 0)
        try:
            self._call("fsync", os.fsync, self.fd)
        finally:
            self.leave()

    def close(self) -> None:
        """Wait, then close."""
        with self._idle:
            was_closed, self.closed = self.closed, True
            self._idle.wait_for(lambda: self._in_flight == 0)
        if not was_closed:
            os.close(self.fd)

    def __del__(self) -> None:
        if not getattr(self, "closed", True):
            os.close(self.fd)


class IOTicket:
    """See ``lightning_zinf.ops.io.Ticket``."""

    def __init__(self, operation: str, file: File, offset: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self.future: Future[int] = Future()
        self._what = f"{operation} of {file.path} at offset {offset}, length {nbytes} bytes"
        self._submitted = time.perf_counter_ns()
        self._pid = os.getpid()
        self.finished: int | None = None

    def wait(self, timeout: float | None) -> int:
        """Wait and raise, or return the bytes."""
        if not self.future.done() and self._pid != os.getpid():
            raise ValueError(f"this ticket was made before a fork and belongs to the parent process: {self._what}")
        try:
            return self.future.result(timeout)
        except FutureTimeoutError:
            raise TimeoutError(f"{self._what} not done after {self.elapsed // 1_000_000} ms") from None

    def done(self) -> bool:
        """Tell without waiting."""
        return self.future.done()

    @property
    def elapsed(self) -> int:
        """Nanoseconds."""
        return (self.finished or time.perf_counter_ns()) - self._submitted


class IOEngine:
    """See ``lightning_zinf.ops.io.IOEngine``."""

    backend = "python"
    backend_reason = "the compiled extension is missing"

    def __init__(self, threads: int, queue_depth: int, block_bytes: int, backend: str) -> None:
        if backend not in ("auto", "threads", "io_uring"):
            raise ValueError(f"backend must be 'auto', 'threads' or 'io_uring', not {backend!r}")
        if backend == "io_uring":
            raise ValueError(f"backend io_uring is not available: {self.backend_reason}")
        if block_bytes % 4096 or block_bytes > 1 << 30:
            raise ValueError("block_bytes must be a multiple of 4096, at most 1 GiB")
        self._threads = threads
        self._block_bytes = block_bytes
        self._lock = threading.Lock()
        self.closed = False
        self.in_flight = self.bytes_read = self.bytes_written = 0
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._pool = ThreadPoolExecutor(self._threads, "zinf-io")

    def read(self, file: File, offset: int, data: int, nbytes: int, owner: torch.Tensor) -> IOTicket:
        """Start a read."""
        return self._submit("read", file, offset, nbytes, owner)

    def write(self, file: File, offset: int, data: int, nbytes: int, owner: torch.Tensor) -> IOTicket:
        """Start a write."""
        return self._submit("write", file, offset, nbytes, owner)

    def _submit(self, operation: str, file: File, offset: int, nbytes: int, owner: torch.Tensor) -> IOTicket:
        if self._pid != os.getpid():
            self._lock, self.in_flight = threading.Lock(), 0
            self._start()
        if self.closed:
            raise ValueError(f"{operation} on a closed engine: {file.path}")
        file.enter(operation, offset, nbytes)
        ticket = IOTicket(operation, file, offset, nbytes)
        with self._lock:
            self.in_flight += 1
        view = owner.detach().flatten().view(torch.uint8).numpy().data
        self._pool.submit(self._run, ticket, operation, file, offset, view)
        return ticket

    def _run(self, ticket: IOTicket, operation: str, file: File, offset: int, view: memoryview) -> None:
        failure: BaseException | None = None
        try:
            for start in range(0, len(view), self._block_bytes):
                _transfer(operation, file, offset + start, view[start : start + self._block_bytes])
        except BaseException as error:
            failure = error
        file.leave()
        with self._lock:
            self.in_flight -= 1
            if failure is None and operation == "read":
                self.bytes_read += len(view)
            elif failure is None:
                self.bytes_written += len(view)
        ticket.finished = time.perf_counter_ns()
        if failure is None:
            ticket.future.set_result(len(view))
        else:
            ticket.future.set_exception(failure)

    def close(self) -> None:
        """Wait, then end the threads."""
        self.closed = True
        if self._pid == os.getpid():
            self._pool.shutdown(wait=True)


def _transfer(operation: str, file: File, offset: int, view: memoryview) -> None:
    start = 0
    while start < len(view):
        rest = view[start:]
        code = 0
        try:
            if operation == "read":
                count = os.preadv(file.fd, [rest], offset + start)
            else:
                count = os.pwritev(file.fd, [rest], offset + start)
        except BlockingIOError:
            time.sleep(0.001)
            continue
        except OSError as error:
            count, code = 0, error.errno or errno.EIO
        if count == 0:
            end = operation == "read" and not code
            code = code or (_NO_DATA if end else errno.EIO)
            message = f"{os.strerror(code)}: {operation} at offset {offset + start}, length {len(rest)} bytes"
            raise OSError(code, message + (" (past the end of the file)" if end else ""), file.path)
        start += count
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fd, offset, len(view), os.POSIX_FADV_DONTNEED)


_mappings: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()


def host_alloc(nbytes: int, huge_pages: bool) -> torch.Tensor:
    """Map memory of its own. (A tensor, where the extension gives a DLPack capsule: torch takes both.)"""
    try:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"cannot map {nbytes} bytes ({nbytes >> 20} MiB) of host memory: {error}") from None
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(mapping, dtype=torch.uint8)
    _mappings[tensor.data_ptr()] = mapping
    return tensor


def host_release_pages(data: int, nbytes: int) -> int:
    """Give whole pages back; -1 if they are not ours."""
    for start, mapping in list(_mappings.items()):
        if start <= data and data + nbytes <= start + len(mapping):
            first = -(-(data - start) // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (data + nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                mapping.madvise(mmap.MADV_DONTNEED, first, last - first)
            return max(0, last - first)
    return -1
