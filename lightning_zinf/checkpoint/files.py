"""The files of a checkpoint, read and written with checksums.

safetensors is a length of 8 bytes, a JSON header and the data. Headers are padded with spaces so that data starts at a
multiple of 4096, which the format allows; the stock library reads these files.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_zinf.checkpoint.folder import Folder, named
from lightning_zinf.checkpoint.manifest import BLOCK_BYTES, CheckpointError, FileInfo
from lightning_zinf.ops import crc32

ALIGNMENT = 4096
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    # Of buffers only: what autograd trains is above.
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100 * 2**20
_VERIFY_THREADS = 4
"""Blocks of a local file that are compared with their checksums at once."""
_VERIFY_BYTES = 1 << 20
"""Bytes that are read at a time for that: they are still in the cache when they are summed up."""


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type,unused-ignore]


class Writer:
    """Writes a file from its beginning, with a checksum for each block.

    Args:
        folder: Where.
        name: Its name.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        self._name = name
        self._folder = folder
        self._file: BinaryIO = open(folder.at(name), "wb") if folder.local else folder.fs.open(folder.at(name), "wb")  # noqa: SIM115
        self._nbytes = 0
        self._crcs: list[int] = []

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(content)
        while view:
            into = self._nbytes % BLOCK_BYTES
            part = view[: BLOCK_BYTES - into]
            if into == 0:
                self._crcs.append(0)
            self._crcs[-1] = crc32(part, self._crcs[-1])
            self._file.write(part)
            self._nbytes += len(part)
            view = view[len(part) :]

    def finish(self) -> FileInfo:
        """Have everything on disk."""
        if self._folder.local:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        return FileInfo(self._name, self._nbytes, tuple(self._crcs))

    def abandon(self) -> None:
        """Close and remove the file, whatever state it is in."""
        with contextlib.suppress(OSError):  # a full disk says so again
            self._file.close()
        self._folder.remove([self._name])


def header(tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the beginning of a safetensors file for tensors that follow in this order.

    Args:
        tensors: ``(dtype, shape)`` by name.
        metadata: Goes to ``__metadata__``.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = DTYPES[dtype].itemsize
        for size in shape:
            nbytes *= size
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


class Reader:
    """Reads tensors, or parts of them, of a safetensors file.

    Args:
        folder: Where.
        info: The file, as the manifest has it.

    Raises:
        CheckpointError: If the file is missing, has another size, or its header does not make sense.
    """

    def __init__(self, folder: Folder, info: FileInfo) -> None:
        self.where = f"{folder.url}/{info.path}"
        self._info = info
        self._local = folder.local
        try:
            self._file: Any = (
                open(folder.at(info.path), "rb", buffering=0)  # noqa: SIM115
                if folder.local
                else folder.fs.open(folder.at(info.path), "rb")
            )
        except FileNotFoundError:
            raise CheckpointError(f"{self.where} is missing: the checkpoint is not complete") from None
        try:
            size = self._file.seek(0, os.SEEK_END)
            if size != info.nbytes:
                raise CheckpointError(f"{self.where} has {size} bytes instead of {info.nbytes}: it was cut off")
            self.tensors, self._start = self._read_header(size)
        except BaseException:
            self._file.close()
            raise

    def _read_header(self, size: int) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], int]:
        try:
            (length,) = struct.unpack("<Q", self._bytes(0, 8))
            if length > min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes")
            found: dict[str, tuple[str, tuple[int, ...], int]] = {}
            for name, entry in json.loads(self._bytes(8, length)).items():
                if name == "__metadata__":
                    continue
                shape, (low, high) = tuple(entry["shape"]), entry["data_offsets"]
                nbytes = DTYPES[entry["dtype"]].itemsize
                for extent in shape:
                    if not isinstance(extent, int) or extent < 0:
                        raise ValueError(f"shape {shape} of {name!r}")
                    nbytes *= extent
                if not 0 <= low <= high <= size - 8 - length or high - low != nbytes:
                    raise ValueError(f"offsets {low} and {high} of {name!r}")
                found[name] = (entry["dtype"], shape, low)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
            raise CheckpointError(f"{self.where} has a damaged header: {type(error).__name__}: {error}") from None
        return found, 8 + length

    def _bytes(self, offset: int, count: int) -> bytearray:
        content = bytearray(count)
        self._fill(offset, memoryview(content))
        return content

    def _fill(self, offset: int, view: memoryview) -> None:
        """Read bytes; those of a local file from several threads at once."""
        if not self._local:
            self._file.seek(offset)
        while view:
            try:
                if self._local:
                    count = os.preadv(self._file.fileno(), [view], offset)
                else:
                    count = self._file.readinto(view)
            except OSError as error:
                raise named(error, self.where) from error
            if not count:
                raise CheckpointError(f"{self.where} ends at byte {offset}, before its time")
            offset += count
            view = view[count:]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the elements ``[start, stop)`` of a tensor, flat.

        Raises:
            CheckpointError: If the tensor is not there or too short.
        """
        stop = math.prod(self._tensor(name)[1]) if stop is None else stop
        found = torch.empty(max(0, stop - start), dtype=self.dtype(name))
        self.fill(name, start, found)
        return found

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Fill a contiguous CPU tensor of the right dtype with the elements of a tensor from ``start`` on.

        Raises:
            CheckpointError: If the tensor is not there or too short.
        """
        _, shape, low = self._tensor(name)
        numel, stop = math.prod(shape), start + out.numel()
        if not 0 <= start <= stop <= numel:
            raise CheckpointError(f"{self.where}: tensor {name!r} has {numel} elements, but {stop} are needed")
        assert out.dtype == self.dtype(name), (out.dtype, name)
        if out.numel():
            self._fill(self._start + low + start * out.element_size(), raw_bytes(out))

    def _tensor(self, name: str) -> tuple[str, tuple[int, ...], int]:
        if name not in self.tensors:
            raise CheckpointError(f"{self.where} has no tensor {name!r}, which the manifest promises")
        return self.tensors[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor.

        Raises:
            CheckpointError: If the tensor is not there.
        """
        return DTYPES[self._tensor(name)[0]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.tensors[name][1]

    def verify(self) -> None:
        """Compare every block with its checksum.

        Raises:
            CheckpointError: With the first block that is damaged.
        """
        expected = self._info.crc32
        with ThreadPoolExecutor(_VERIFY_THREADS if self._local else 1, "zinf-verify") as pool:
            for number, crc in enumerate(pool.map(self._block_sum, range(len(expected)))):
                if crc != expected[number]:
                    raise CheckpointError(_damaged(self.where, number))

    def _block_sum(self, number: int) -> int:
        at, crc = number * BLOCK_BYTES, 0
        end = min(at + BLOCK_BYTES, self._info.nbytes)
        if self._local and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), at, end - at, os.POSIX_FADV_WILLNEED)
        room = memoryview(bytearray(min(_VERIFY_BYTES, end - at)))
        while at < end:
            view = room[: min(len(room), end - at)]
            self._fill(at, view)
            crc, at = crc32(view, crc), at + len(view)
        return crc

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _damaged(where: str, block: int) -> str:
    return (
        f"{where} is damaged: block {block} (bytes {block * BLOCK_BYTES} to {(block + 1) * BLOCK_BYTES - 1}) does not "
        "have the checksum that the manifest has"
    )


def verified(folder: Folder, info: FileInfo) -> bytes:
    """Return a whole file that has its checksums.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    where = f"{folder.url}/{info.path}"
    try:
        content = folder.read(info.path)
    except FileNotFoundError:
        raise CheckpointError(f"{where} is missing: the checkpoint is not complete") from None
    if len(content) != info.nbytes:
        raise CheckpointError(f"{where} has {len(content)} bytes instead of {info.nbytes}: it was cut off")
    for number, expected in enumerate(info.crc32):
        if crc32(memoryview(content)[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]) != expected:
            raise CheckpointError(_damaged(where, number))
    return content


def write_safetensors(folder: Folder, name: str, tensors: Mapping[str, Tensor]) -> FileInfo:
    """Write whole tensors."""
    writer = Writer(folder, name)
    try:
        writer.write(header({n: (NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()}))
        for tensor in tensors.values():
            writer.write(raw_bytes(tensor.detach().cpu().resolve_conj().contiguous()))
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise
