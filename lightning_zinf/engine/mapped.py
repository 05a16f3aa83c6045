"""Single tensors of a model under construction that memory has no room for.

Note [Mapped tensors]
~~~~~~~~~~~~~~~~~~~~~
The code that initialises a layer has its weight whole: it is made by ``torch.empty`` and then drawn in place. Where
that is more than memory may take, the memory is that of a file, mapped: any code runs on it as it would, with the same
values, and the kernel writes out what it has no room for. So such a weight stays an ordinary parameter until
partitioning takes its values, piece by piece.

The file has no name any more once it is mapped, so that nothing stays behind. Its space is allocated before, since to
write to a mapping when the disk is full kills the process.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_Fill = Callable[[Tensor], object]
_FILLS: dict[Any, _Fill | None] = {
    torch.empty: None,
    torch.zeros: None,  # as a new file reads
    torch.ones: lambda tensor: tensor.fill_(1),
    torch.rand: lambda tensor: tensor.uniform_(),
    torch.randn: lambda tensor: tensor.normal_(),
}


class LargeTensors(TorchFunctionMode):
    """Has large new tensors on the CPU lie in files, for as long as it is entered.

    Args:
        folders: Where the files go, in turn.
        limit: Bytes of a tensor that may lie in memory.
    """

    def __init__(self, folders: Sequence[str], limit: int) -> None:
        super().__init__()
        self._folders = folders
        self._limit = limit
        self._made: set[int] = set()

    def made(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in a file of this."""
        return tensor.data_ptr() in self._made and tensor.is_shared()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make the tensor, if it is a large one; else call ``func``."""
        kwargs = kwargs or {}
        if func in _FILLS and (shape := self._large(args, kwargs)) is not None:
            tensor = self._new(shape, kwargs.get("dtype") or torch.get_default_dtype())
            with torch.no_grad():
                if (fill := _FILLS[func]) is not None:
                    fill(tensor)
            return tensor.requires_grad_(bool(kwargs.get("requires_grad")))
        return func(*args, **kwargs)

    def _large(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
        """Return the shape that is asked for, if that is a plain tensor on the CPU beyond the limit."""
        if not set(kwargs) <= {"size", "dtype", "device", "requires_grad"}:
            return None
        size = kwargs.get("size", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
        if not all(isinstance(n, int) for n in size):
            return None
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        if math.prod(size) * dtype.itemsize <= self._limit:
            return None
        device = kwargs.get("device")
        device = torch.get_default_device() if device is None else torch.device(device)
        return tuple(size) if device.type == "cpu" else None

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        folder = self._folders[len(self._made) % len(self._folders)]
        numel = math.prod(shape)
        try:
            os.makedirs(folder, exist_ok=True)
            file, path = tempfile.mkstemp(prefix="zinf-large-", dir=folder)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file, 0, numel * dtype.itemsize)
                tensor = torch.from_file(path, shared=True, size=numel, dtype=dtype)
            finally:
                os.close(file)
                os.unlink(path)
        except OSError as error:
            raise OSError(
                error.errno,
                f"a tensor {shape} of {dtype} takes {numel * dtype.itemsize / 2**20:.1f} MiB, more than the "
                f"{self._limit / 2**20:.1f} MiB of one that may be in memory while the model is built, and a file in "
                f"{folder!r} cannot take it: {error.strerror}. Allow more with memory.host_bytes, or name a folder "
                "with room by nvme_path",
            ) from error
        self._made.add(tensor.data_ptr())
        return tensor.view(shape)
