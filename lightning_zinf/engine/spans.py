"""Which bytes of its storage a tensor lies in."""

from __future__ import annotations

from torch import Tensor


def span_of(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of its storage that a strided tensor lies in, and the end of its last."""
    first = int(tensor.storage_offset())
    last = first + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return first * tensor.dtype.itemsize, (last + 1) * tensor.dtype.itemsize
