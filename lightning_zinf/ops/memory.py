"""Host memory for large buffers: mapped on their own, page-aligned, pinned or given back page by page.

Note. torch's allocator takes memory from malloc: not aligned for direct I/O, not sure to return to the system. A tensor
from :func:`host_empty` owns a mapping of its own. It is an ordinary CPU tensor; the mapping goes when the last tensor
that views it goes.

Pinned memory has to be unpinned before its mapping goes: CUDA would go on to copy from and to the pages that were
there, whatever is mapped at that address next. So memory from :func:`host_pinned` does that by itself. And it is left
out of processes that are forked (the workers of a DataLoader), for which the kernel would have to copy every pinned
page at once.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import weakref
from contextlib import nullcontext
from typing import Any

import torch

__all__ = ["host_empty", "host_pinned", "is_pinned", "pin", "release_pages", "unpin"]

_MADV_DONTFORK, _MADV_DOFORK = 10, 11

_native: Any
try:
    _native = importlib.import_module("lightning_zinf._ext")
except ImportError:
    from lightning_zinf.ops import _fallback as _native

_pinned: dict[int, int] = {}  # start -> bytes, of what pin() registered
_others: dict[int, str] = {}  # start -> type of device, where that is not CUDA


def host_empty(nbytes: int, *, huge_pages: bool = True) -> torch.Tensor:
    """Return ``nbytes`` of host memory as a uint8 tensor whose first byte is page-aligned.

    Pages cost no memory until they are written to; before that they read as zeros.

    Args:
        nbytes: Size in bytes.
        huge_pages: From 2 MiB up, align to 2 MiB and ask for huge pages: fewer page faults and TLB misses, but memory
            is then taken 2 MiB at a time.

    Raises:
        MemoryError: The system refuses that many bytes; the message has the number.
        ValueError: ``nbytes`` is negative.
    """
    if nbytes < 0:
        raise ValueError(f"nbytes must not be negative: {nbytes}")
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(_native.host_alloc(nbytes, huge_pages))
    return tensor


def host_pinned(nbytes: int, device: str = "cuda") -> torch.Tensor:
    """Return host memory as :func:`host_empty` does, pinned for as long as a tensor has it.

    Where it cannot be pinned for that type of device it is not.

    Args:
        nbytes: Size in bytes.
        device: Type of the devices that copy from and to it.

    Raises:
        MemoryError: The system refuses that many bytes.
        RuntimeError: The driver refuses to pin them.
    """
    memory = host_empty(nbytes)
    if not pin(memory, device):
        return memory
    whole = (ctypes.c_uint8 * nbytes).from_address(memory.data_ptr())
    index = torch.cuda.current_device() if device == "cuda" else None
    end = weakref.finalize(whole, _let_go, memory, index, os.getpid())
    end.atexit = False  # CUDA is gone by then, or about to go
    return torch.frombuffer(whole, dtype=torch.uint8)


def _let_go(memory: torch.Tensor, device: int | None, process: int) -> None:
    """Unpin memory that nobody has any more, on whatever thread the last tensor on it has gone."""
    if process == os.getpid() and not sys.is_finalizing():
        with (
            nullcontext() if device is None else torch.cuda.device(device)
        ):  # else a thread that has used no device yet would open a context on the first
            unpin(memory)


def release_pages(tensor: torch.Tensor) -> int:
    """Give the memory of the whole pages inside ``tensor`` back to the system, and return the bytes given back.

    The tensor stays valid: its pages read as zeros and cost memory again when written to. Partial pages at its ends
    are left as they are.

    Raises:
        ValueError: Not contiguous, not inside memory from :func:`host_empty`, or pinned.
    """
    if not tensor.is_contiguous():
        raise ValueError("release_pages: the tensor is not contiguous")
    if tensor.nbytes == 0:
        return 0
    if is_pinned(tensor):
        raise ValueError("release_pages: the memory is pinned; unpin it first")
    released: int = _native.host_release_pages(tensor.data_ptr(), tensor.nbytes)
    if released < 0:
        raise ValueError(f"release_pages: these {tensor.nbytes} bytes are not inside memory from host_empty")
    return released


def is_pinned(tensor: torch.Tensor) -> bool:
    """Tell whether any byte of ``tensor`` lies in memory that :func:`pin` registered."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return any(start < begin + nbytes and begin < end for begin, nbytes in _pinned.copy().items())


def pin(tensor: torch.Tensor, device: str = "cuda") -> bool:
    """Lock the memory of ``tensor`` for direct access by devices of a type, so that copies run asynchronously.

    Of types other than CUDA their torch module has to have ``host_register(pointer, nbytes)``, which raises what goes
    wrong, and ``host_unregister(pointer)``.

    The caller must :func:`unpin` before the last tensor on that memory goes; :func:`host_pinned` sees to that itself.
    A child process that is forked does not have the memory.

    Returns:
        True if the memory is pinned now, False where there is no such device, or no way to pin memory for it.

    Raises:
        RuntimeError: The driver refuses; the message has the bytes.
        ValueError: Not contiguous, or pinned in part already.
    """
    if not tensor.is_contiguous():
        raise ValueError("pin: the tensor is not contiguous")
    register = _register_cuda if device == "cuda" else getattr(getattr(torch, device, None), "host_register", None)
    if tensor.nbytes == 0 or register is None or (device == "cuda" and not torch.cuda.is_available()):
        return False
    if _pinned.get(tensor.data_ptr()) == tensor.nbytes:
        return True
    if is_pinned(tensor):
        raise ValueError(f"pin: the {tensor.nbytes} bytes overlap memory that is pinned already")
    register(tensor.data_ptr(), tensor.nbytes)
    if device != "cuda":
        _others[tensor.data_ptr()] = device
    _pinned[tensor.data_ptr()] = tensor.nbytes
    _advise(tensor, _MADV_DONTFORK)
    return True


def unpin(tensor: torch.Tensor) -> None:
    """Undo :func:`pin` of this very tensor. Does nothing if it is not pinned.

    Raises:
        RuntimeError: CUDA refuses.
    """
    if _pinned.pop(tensor.data_ptr(), None) is None:
        return
    other = _others.pop(tensor.data_ptr(), None)
    if other is not None:
        getattr(torch, other).host_unregister(tensor.data_ptr())
    else:
        code = int(_cudart().cudaHostUnregister(tensor.data_ptr()))
        if code != 0:
            raise RuntimeError(f"cudaHostUnregister failed: {_describe(code)}")
    _advise(tensor, _MADV_DOFORK)


def _advise(tensor: torch.Tensor, advice: int) -> None:
    """Give the kernel advice about the whole pages inside a tensor. It may decline: then a fork takes longer."""
    page = os.sysconf("SC_PAGE_SIZE")
    start = -(-tensor.data_ptr() // page) * page
    nbytes = (tensor.data_ptr() + tensor.nbytes - start) // page * page
    if nbytes > 0:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), advice)


def _register_cuda(pointer: int, nbytes: int) -> None:
    code = int(_cudart().cudaHostRegister(pointer, nbytes, 1))  # 1: portable, for all devices
    if code != 0:
        raise RuntimeError(f"cudaHostRegister cannot pin {nbytes} bytes of host memory: {_describe(code)}")


def _cudart() -> Any:
    return torch.cuda.cudart()


def _describe(code: int) -> str:
    # The module knows the messages of its own enum; an unknown number must not hide the failure.
    cudart = _cudart()
    try:
        return str(cudart.cudaGetErrorString(cudart.cudaError(code)))
    except (TypeError, ValueError):
        return f"error {code}"
