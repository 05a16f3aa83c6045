"""Keep the C heap from holding on to memory while a large model is built.

Note [The heap]
~~~~~~~~~~~~~~~
glibc serves large blocks by mmap and gives them back when they are freed, but only up to the first free of one;
then it raises the threshold, to 32 MiB in the end, and serves them from the heap, where one small object above a freed
block keeps it from the system. Building a model piece by piece and freeing the pieces leaves a heap several times as
large as what is in use. So while a model is built the threshold is fixed at 1 MiB, and afterwards set to where glibc
itself would have taken it, since training reuses its blocks and should not fault their pages in at every step.

On other C libraries nothing is done.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_WHILE_BUILDING = 2**20
_AFTERWARDS = 32 * 2**20


@functools.cache
def _glibc() -> Any:
    try:
        library = ctypes.CDLL("libc.so.6")
        return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
    except OSError:
        return None


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Serve blocks of 1 MiB and more apart from the heap, so that freeing them gives memory back."""
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_M_MMAP_THRESHOLD, _WHILE_BUILDING)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_THRESHOLD, _AFTERWARDS)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * _AFTERWARDS)
        library.malloc_trim(0)
