"""CRC-32, the checksum of blocks of checkpoints, and that of two strings from those of each.

The extension computes it with carry-less products where the CPU has them, many times faster than zlib's tables, and
without the GIL. Without the extension it is zlib's own; the values are the same.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lightning_zinf.ops import kernels, reference

__all__ = ["crc32", "crc32_combine"]


def crc32(content: bytes | bytearray | memoryview | Tensor, crc: int = 0) -> int:
    """Return the CRC-32 of bytes, as ``zlib.crc32`` does.

    Args:
        content: Bytes, or a contiguous tensor in host memory, of any dtype and shape.
        crc: The checksum of what comes before them.

    Raises:
        ValueError: The tensor is not contiguous or not in host memory.
    """
    if isinstance(content, Tensor):
        if not content.is_cpu or not content.is_contiguous():
            raise ValueError(
                f"expected a contiguous tensor in host memory, got strides {content.stride()} on {content.device}"
            )
        address, nbytes = content.data_ptr(), content.nbytes
    else:
        array = np.frombuffer(content, dtype=np.uint8)  # which is how Python tells the address of any buffer
        address, nbytes = array.ctypes.data, array.nbytes
    if kernels._ext is None:
        return reference.crc32(content, crc)
    return int(kernels._ext.crc32(crc, address, nbytes))


def crc32_combine(first: int, second: int, nbytes: int) -> int:
    """Return the CRC-32 of two byte strings, one after the other.

    Args:
        first: CRC-32 of the first.
        second: CRC-32 of the second.
        nbytes: Length of the second.
    """
    if kernels._ext is None:
        return reference.crc32_combine(first, second, nbytes)
    return int(kernels._ext.crc32_combine(first, second, nbytes))
