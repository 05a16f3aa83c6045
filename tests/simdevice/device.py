"""``torch.sim``: what ``torch.cuda`` is for CUDA, as far as it is needed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from simdevice.build import library

_lib: Any = None


def load() -> None:
    """Compile the library if need be, and load it: that registers the device."""
    global _lib
    if _lib is not None:
        return
    lib = ctypes.CDLL(str(library()))
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "set_delays": (None, [ctypes.c_uint64, ctypes.c_int64, ctypes.c_int64]),
        "jobs": (ctypes.c_uint64, []),
        "current_stream": (ctypes.c_int64, []),
        "set_stream": (None, [ctypes.c_int64]),
        "synchronize": (None, []),
        "allocated": (ctypes.c_int64, []),
        "peak": (ctypes.c_int64, []),
        "capacity": (ctypes.c_int64, []),
        "reset_peak": (None, []),
        "set_capacity": (None, [ctypes.c_int64]),
        "pin": (None, [ctypes.c_size_t, ctypes.c_size_t]),
        "unpin": (ctypes.c_bool, [ctypes.c_size_t]),
        "pinned_bytes": (ctypes.c_int64, []),
        "reports": (ctypes.c_void_p, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, f"sim_{name}")
        function.restype, function.argtypes = result, arguments
    _lib = lib


# ---------------------------------------------------------------------- what the engine and Lightning use

Event = torch.Event


class Stream(torch.Stream):
    """A stream of the simulated device."""

    def __new__(cls, device: Any = None, priority: int = 0) -> Any:
        return torch.Stream(device="sim:0")


def current_stream(device: Any = None) -> torch.Stream:
    return torch.Stream(
        stream_id=_lib.sim_current_stream(),
        device_index=0,
        device_type=int(torch._C._autograd.DeviceType.PrivateUse1),
    )


@contextmanager
def stream(other: torch.Stream) -> Iterator[None]:
    before = _lib.sim_current_stream()
    _lib.sim_set_stream(other.stream_id)
    try:
        yield
    finally:
        _lib.sim_set_stream(before)


def synchronize(device: Any = None) -> None:
    _lib.sim_synchronize()


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def set_device(device: Any) -> None:
    pass


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16]


def is_bf16_supported() -> bool:
    return True


def memory_allocated(device: Any = None) -> int:
    return int(_lib.sim_allocated())


def max_memory_allocated(device: Any = None) -> int:
    return int(_lib.sim_peak())


def reset_peak_memory_stats(device: Any = None) -> None:
    _lib.sim_reset_peak()


def mem_get_info(device: Any = None) -> tuple[int, int]:
    return int(_lib.sim_capacity() - _lib.sim_allocated()), int(_lib.sim_capacity())


def empty_cache() -> None:
    pass


# Random numbers are the CPU's: operators run there.


def manual_seed(seed: int) -> None:
    pass


manual_seed_all = manual_seed


def _is_in_bad_fork() -> bool:
    return False


def get_rng_state(device: Any = None) -> Tensor:
    return torch.get_rng_state()


def set_rng_state(state: Tensor, device: Any = None) -> None:
    torch.set_rng_state(state)


def host_register(pointer: int, nbytes: int) -> None:
    """Let copies from and to this host memory run asynchronously."""
    _lib.sim_pin(pointer, nbytes)


def host_unregister(pointer: int) -> None:
    assert _lib.sim_unpin(pointer), "this memory is not registered"


# ---------------------------------------------------------------------- for tests


def set_delays(seed: int, compute: int = 0, copy: int = 0) -> None:
    """Delay each job by up to so many microseconds from here on."""
    _lib.sim_set_delays(seed, compute, copy)


def jobs() -> int:
    """Return how many operators and copies have run."""
    return int(_lib.sim_jobs())


def pinned_bytes() -> int:
    return int(_lib.sim_pinned_bytes())


def set_capacity(nbytes: int) -> None:
    _lib.sim_set_capacity(nbytes)


def reports() -> list[str]:
    """Return what was found to be wrong since the last call, once all that was submitted has run."""
    _lib.sim_synchronize()
    text = _lib.sim_reports()
    lines = ctypes.string_at(text).decode().splitlines()
    _libc.free(text)
    return lines


_libc = ctypes.CDLL(None)
_libc.free.argtypes = [ctypes.c_void_p]
