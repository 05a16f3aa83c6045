"""Ranks for the tests: processes that stay, so that starting Python and torch is paid once for each world size."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = timedelta(seconds=30)
"""Longest time that a collective of a test may take."""


class RankFailed(AssertionError):
    """A call raised on some rank."""


class Pool:
    """``size`` processes with a gloo process group.

    Args:
        size: Number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        context = mp.get_context("spawn")
        self._pipes = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self._store.port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Have every rank call ``function(rank, size, *args)``, which must be importable there."""
        for pipe in self._pipes:
            pipe.send((function, args))

    def results(self, timeout: float = 120.0) -> list[tuple[str, Any]]:
        """Return ``("ok", value)`` or ``("error", traceback)`` of each rank."""
        found: list[tuple[str, Any]] = []
        for rank, pipe in enumerate(self._pipes):
            try:
                found.append(pipe.recv() if pipe.poll(timeout) else ("error", f"rank {rank} does not answer"))
            except EOFError:
                found.append(("error", f"rank {rank} has died"))
        return found

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Return what ``function(rank, size, *args)`` returns on each rank.

        Raises:
            RankFailed: With the tracebacks, if it raises anywhere. The pool is of no use then.
        """
        self.start(function, *args)
        found = self.results(timeout)
        if any(kind == "error" for kind, _ in found):
            self.close()
            raise RankFailed("\n\n".join(f"rank {r}: {v}" for r, (kind, v) in enumerate(found) if kind == "error"))
        return [value for _, value in found]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


_POOLS: dict[int, Pool] = {}


def pool(size: int) -> Pool:
    """Return ranks that are alive."""
    if size not in _POOLS or not _POOLS[size].alive:
        _POOLS[size] = Pool(size)
    return _POOLS[size]


def run(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what ``function(rank, size, *args)`` returns on each rank; one rank is this process."""
    return [function(0, 1, *args)] if size == 1 else pool(size).run(function, *args)


def close_all() -> None:
    for running in _POOLS.values():
        running.close()
    _POOLS.clear()


def _serve(rank: int, size: int, port: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    # What torchrun sets: Lightning then starts no processes itself.
    os.environ.update(TORCHELASTIC_RUN_ID="tests", GROUP_RANK="0", LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("ok", function(rank, size, *args)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
