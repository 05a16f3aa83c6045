"""How much memory is free here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from lightning_zinf.memory.streams import module_of

_STACK = 8 * 2**20
"""What a thread's stack takes where its size is not limited, as glibc has it."""
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_host_bytes() -> int:
    """Return the bytes of host memory that this process can still take under its cgroup and RLIMIT_DATA."""
    free = [_meminfo(), *_cgroup(), *_rlimit()]
    return max(0, min(free))


def stack_bytes(threads: int) -> int:
    """Return the bytes of RLIMIT_DATA that the stacks of further threads will take; 0 where there is no such limit.

    A stack is memory that the limit counts in full and that is hardly used.
    """
    try:
        import resource

        if resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY:
            return 0
        size = resource.getrlimit(resource.RLIMIT_STACK)[0]
        return threads * (_STACK if size == resource.RLIM_INFINITY else size)
    except ImportError:
        return 0


def check_room(nbytes: int, what: str) -> None:
    """Raise MemoryError, with the numbers, if ``nbytes`` are not free in host memory."""
    free = free_host_bytes()
    if nbytes > free:
        raise MemoryError(
            f"{what} take {nbytes / 2**30:.2f} GiB as a whole, but only {free / 2**30:.2f} GiB of host memory are "
            "free: turn whole-file checkpoints off (Trainer(enable_checkpointing=False)) or save on a machine with "
            "more memory"
        )


def free_device_bytes(device: torch.device) -> int:
    """Return the free bytes of an accelerator's memory; of host memory for a CPU.

    What torch's allocator has taken and not lent (a model before this one had it, say) is free too.
    """
    module = module_of(device)
    if module is None:
        return free_host_bytes()
    reserved = getattr(module, "memory_reserved", module.memory_allocated)
    return int(module.mem_get_info(device)[0] + reserved(device) - module.memory_allocated(device))


def free_disk_bytes(folder: str | os.PathLike[str]) -> int:
    """Return the free bytes of the disk that a folder lies on, or will lie on once it is made."""
    path = Path(folder).absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    return shutil.disk_usage(there).free


def _meminfo() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _cgroup() -> list[int]:
    for limit_file, used_file in _CGROUPS:
        try:
            limit, used = Path(limit_file).read_text().strip(), int(Path(used_file).read_text())
        except (OSError, ValueError):
            continue
        if limit.isdigit() and int(limit) < 1 << 60:
            return [int(limit) - used]
    return []


def _rlimit() -> list[int]:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
        if limit == resource.RLIM_INFINITY:
            return []
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmData:"):
                return [limit - int(line.split()[1]) * 1024]
    except (ImportError, OSError):
        pass
    return []


def process_bytes() -> int:
    """Return the bytes of memory that this process has pages of; 0 where that cannot be told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
