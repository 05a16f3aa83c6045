"""Exact byte counters and reported times of the engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from lightning_zinf.monitor.trace import Stage, Trace, span

_STAGES: dict[str, tuple[Stage, str]] = {
    "stall_read_seconds": ("wait", "read"),
    "stall_write_seconds": ("wait", "write"),
    "stall_gather_seconds": ("wait", "gather"),
    "update_seconds": ("update", ""),
}
"""What a trace calls the times that are counted."""


@dataclass
class Counters:
    """What moved, how often, and what the computation waited for.

    Bytes are exact and may be asserted; seconds are only ever reported. Who sets ``trace`` has every event recorded.

    Attributes:
        nvme_read_bytes: Bytes read from NVMe, padding included.
        nvme_write_bytes: Bytes written to NVMe, padding included.
        host_to_device_bytes: Bytes copied from host memory to the accelerator.
        device_to_host_bytes: Bytes copied from the accelerator to host memory.
        all_gather_bytes: Bytes of the buffers that were gathered from all ranks: whole buffers, padding included.
        reduce_scatter_bytes: Bytes of the buffers that were reduced over all ranks, in the dtype they were sent in.
        all_reduce_bytes: Bytes of shards that were reduced over the copies of the model (hybrid sharding).
        broadcast_bytes: Bytes sent from rank 0 to all.
        activation_write_bytes: Bytes of activations that were brought to host memory or NVMe, padding included; what
            goes to NVMe is part of ``nvme_write_bytes`` too.
        activation_read_bytes: Bytes of activations that were brought back, padding included.
        activation_reused_bytes: Bytes of activations that were still in staging memory when they were wanted.
        reused_bytes: Bytes of weights that a gather found still in their slot and did not read again.
        gathers: Times that a unit became resident.
        faults: Uses of a released parameter that no hook had foreseen.
        refills: Saved tensors whose unit had to be fetched again in backward; 0 in normal runs.
        orphaned_slots: Slots left to code that still held a view of them when they were needed.
        overcommits: Times that the page budget had to be exceeded.
        updates: Optimizer updates applied to a buffer.
        norm_ahead_bytes: Bytes of gradients whose squares were summed as they were complete.
        norm_bytes: Bytes of gradients whose squares were summed when a norm was asked for.
        stall_read_seconds: Time that the computation waited for reads of weights or state.
        stall_write_seconds: Time that it waited for a slot or tile whose write was under way.
        stall_gather_seconds: Time that it waited for weights of other ranks, or for their gradients.
        update_seconds: Time spent in optimizer updates of offloaded state.
    """

    nvme_read_bytes: int = 0
    nvme_write_bytes: int = 0
    host_to_device_bytes: int = 0
    device_to_host_bytes: int = 0
    all_gather_bytes: int = 0
    reduce_scatter_bytes: int = 0
    all_reduce_bytes: int = 0
    broadcast_bytes: int = 0
    activation_write_bytes: int = 0
    activation_read_bytes: int = 0
    activation_reused_bytes: int = 0
    reused_bytes: int = 0
    gathers: int = 0
    faults: int = 0
    refills: int = 0
    orphaned_slots: int = 0
    overcommits: int = 0
    updates: int = 0
    norm_ahead_bytes: int = 0
    norm_bytes: int = 0
    stall_read_seconds: float = 0.0
    stall_write_seconds: float = 0.0
    stall_gather_seconds: float = 0.0
    update_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.trace: Trace | None = None

    @contextmanager
    def timed(self, name: str, what: str = "") -> Iterator[None]:
        """Add the time spent inside to the counter ``name``.

        Args:
            name: Which.
            what: Name for the trace: of the buffer.
        """
        start = time.perf_counter()
        try:
            if self.trace is None:
                yield
            else:
                stage, kind = _STAGES[name]
                with span(self, stage, what or kind):
                    yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)

    def snapshot(self) -> dict[str, float]:
        """Return a copy of every counter."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def since(self, before: dict[str, float]) -> dict[str, float]:
        """Return how much each counter grew since ``before``, an earlier :meth:`snapshot`."""
        return {name: value - before.get(name, 0) for name, value in self.snapshot().items()}
