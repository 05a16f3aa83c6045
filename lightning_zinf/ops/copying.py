"""Copies of tensors in host memory, many at once, at the speed of the memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Tensor

from lightning_zinf.ops import kernels

__all__ = ["copy_all"]


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy tensors into others, on the threads of the kernels and without the GIL.

    Autograd's version counters do not see the change.

    Args:
        pairs: Where to, and from where: contiguous tensors in host memory, of one dtype and as many elements. What is
            written must not overlap anything else.

    Raises:
        TypeError: A pair has two dtypes.
        ValueError: A tensor is not contiguous or not in host memory, or a pair has two sizes.
    """
    table = array("q")
    for index, (to, source) in enumerate(pairs):
        numel = source.numel()
        from_at = kernels._check(f"pairs[{index}][1]", source, source.dtype, None)
        to_at = kernels._check(f"pairs[{index}][0]", to, source.dtype, numel)
        table.extend((to_at, from_at, source.nbytes))
    if kernels._ext is None:
        for to, source in pairs:
            to.detach().copy_(source.detach())
        return
    kernels._ext.copy_regions(table.buffer_info()[0], len(pairs))
