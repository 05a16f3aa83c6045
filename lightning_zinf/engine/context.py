"""What the engine shares with its buffers: rings, stores, counters and the way to the device."""

from __future__ import annotations

import functools
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_zinf.comm.group import Collectives
from lightning_zinf.config import Tier
from lightning_zinf.layout import FlatLayout
from lightning_zinf.memory.activations import ActivationStore
from lightning_zinf.memory.nvme import NvmeStore
from lightning_zinf.memory.pool import LentBlocks
from lightning_zinf.memory.slots import Slot, SlotRing
from lightning_zinf.memory.state import NvmeState, ResidentState, State
from lightning_zinf.memory.streams import module_of
from lightning_zinf.memory.tiles import TileRing
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.ops import host_empty
from lightning_zinf.ops.memory import host_pinned


class EngineContext:
    """Shared by the engine and its buffers.

    Args:
        device: Where compute runs.
        counters: The engine's counters.
        aliased: Whether host and device are one memory. ``None`` means: if the device is the CPU. Tests pass False to
            run the code of an accelerator with memory of its own on a CPU.
        comm: The collectives, or None if there is one rank.
        stage: What is partitioned over ranks.
    """

    def __init__(
        self,
        device: torch.device,
        counters: Counters,
        aliased: bool | None = None,
        comm: Collectives | None = None,
        stage: int = 3,
    ) -> None:
        self.comm = comm
        self.stage = stage
        self.shards = 1 if comm is None else comm.ranks.shard_size
        self.shard_rank = 0 if comm is None else comm.ranks.shard_rank
        self.device = device
        self.counters = counters
        self.aliased = device.type == "cpu" if aliased is None else aliased
        self.fault: Callable[[list[Any], bool], None] = _nobody
        self.computing: Callable[[], bool] = _never
        self.updates_soon: Callable[[Any], bool] = _not_soon
        self.retire: Callable[[Any], None] = _nobody
        self.norms_ahead = False  # gradients are to be summed as they are complete, see squares.py
        self.changes = 0
        self.last_change = ""
        self._ring: SlotRing | None = None
        self._staging: SlotRing | None = None
        self._tiles: TileRing | None = None
        self._nvme: NvmeStore | None = None
        self._spill: SlotRing | None = None
        self.activations: ActivationStore | None = None
        self.spare_copies: list[Tensor] = []  # host memory that a snapshot used, for the next one
        self._scratch: dict[torch.dtype, Tensor] = {}
        self.leaving_bytes = 0  # of what is copied from the device, as much as may be under way beside the newest
        self._leaving: deque[tuple[Any, Tensor]] = deque()
        self._lent = LentBlocks()
        self._layouts: dict[tuple[Any, ...], FlatLayout] = {}
        self._module = module_of(device)
        # One for each direction: weights on their way up must not wait behind gradients that are still computed.
        self._copy_stream = None if self._module is None else self._module.Stream(device)
        self._down_stream = None if self._module is None else self._module.Stream(device)

    def note_change(self, name: str, checksum: int) -> None:
        """Note that code outside of compute changed weights, to be compared with what other ranks changed."""
        if self.comm is not None:
            self.changes = zlib.crc32(f"{name} {checksum}".encode(), self.changes)
            self.last_change = name

    def layout_of(self, shapes: Sequence[tuple[int, ...]], itemsize: int) -> FlatLayout:
        """Return the layout of these shapes; equal ones are one object, so that slots can share their views."""
        key = (tuple(shapes), itemsize)
        if key not in self._layouts:
            self._layouts[key] = FlatLayout.build(shapes, itemsize, self.shards)
        return self._layouts[key]

    # ------------------------------------------------------------------ parts that only some plans need

    @property
    def ring(self) -> SlotRing:
        """Slots on the device for gathered weights."""
        assert self._ring is not None
        return self._ring

    @property
    def staging(self) -> SlotRing:
        """Slots on the host that weights pass through between NVMe and an accelerator."""
        assert self._staging is not None
        return self._staging

    @property
    def tiles(self) -> TileRing:
        """Staging for optimizer state."""
        assert self._tiles is not None
        return self._tiles

    @property
    def nvme(self) -> NvmeStore:
        """The NVMe tier."""
        assert self._nvme is not None
        return self._nvme

    @property
    def spills(self) -> bool:
        """Whether gradients rest on NVMe between backward and the update."""
        return self._spill is not None

    @property
    def spill(self) -> SlotRing:
        """Staging for gradients on their way to NVMe and back."""
        assert self._spill is not None
        return self._spill

    @property
    def has_nvme(self) -> bool:
        """Whether anything lives on NVMe."""
        return self._nvme is not None or (self.activations is not None and self.activations.nvme is not None)

    @property
    def keeps_planes_on_nvme(self) -> bool:
        """Whether there are files for planes."""
        return self._nvme is not None

    @property
    def has_ring(self) -> bool:
        """Whether there are slots on the device."""
        return self._ring is not None

    @property
    def has_staging(self) -> bool:
        """Whether there are slots on the host."""
        return self._staging is not None

    @property
    def has_tiles(self) -> bool:
        """Whether there is staging for state."""
        return self._tiles is not None

    def install(
        self,
        *,
        ring: SlotRing | None = None,
        staging: SlotRing | None = None,
        tiles: TileRing | None = None,
        nvme: NvmeStore | None = None,
        spill: SlotRing | None = None,
    ) -> None:
        """Put the parts in that the plan needs; what is not given stays as it is."""
        self._ring = ring or self._ring
        self._staging = staging or self._staging
        self._tiles = tiles or self._tiles
        self._nvme = nvme or self._nvme
        self._spill = spill or self._spill

    def pages(self) -> list[tuple[str, str, int]]:
        """Return ``(what, tier, bytes)`` of the memory that pages pass through."""
        rows: list[tuple[str, str, int]] = []
        if self._ring is not None:
            rows.append(("slots for gathered weights", "host" if self.aliased else "device", self._ring.budget))
        if self._staging is not None:
            rows.append(("staging for weights", "host", self._staging.budget))
        if self._tiles is not None:
            rows.append(("staging for state", "host", self._tiles.nbytes))
        if self._spill is not None:
            rows.append(("staging for gradients", "host", self._spill.budget))
        if self.activations is not None and self.activations.nvme is not None:
            rows.append(("staging for activations", "host", self.activations.budget))
        return rows

    def drain(self) -> None:
        """Wait for everything under way to NVMe."""
        for part in (self._tiles, self._ring, self._staging, self._spill, self.activations):
            if part is not None:
                part.drain()

    def close(self) -> None:
        """Finish what is under way and give everything back."""
        try:
            try:
                self.drain()
            finally:
                if self._module is not None:
                    self._module.synchronize(self.device)  # copies from and to memory that goes now
        finally:
            self._leaving.clear()
            self._lent.forget()
            if self._nvme is not None:
                self._nvme.close()
            if self.activations is not None:
                self.activations.close()
            self.activations = None
            self.spare_copies = []
            self._nvme = self._ring = self._staging = self._tiles = self._spill = None

    def new_state(self, numel: int, planes: tuple[str, ...], tier: Tier, name: str) -> State:
        """Return zeroed state of ``numel`` elements on ``tier``, of the buffer ``name``."""
        if tier == "nvme" and planes:
            return NvmeState(numel, planes, self.nvme, self.tiles, self.counters, f"{name}/state")
        allocate = self.allocate_device if tier == "device" and not self.aliased else self.allocate_unpinned
        return ResidentState(numel, planes, allocate)

    # ------------------------------------------------------------------ memory

    def scratch(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return host memory for ``numel`` elements that is reused by the next call for this dtype."""
        nbytes = numel * dtype.itemsize
        memory = self._scratch.get(dtype)
        if memory is None or memory.numel() < nbytes:
            self._scratch[dtype] = memory = host_empty(nbytes)
        return memory[:nbytes].view(dtype)

    def drop_scratch(self) -> None:
        """Give the memory of :meth:`scratch` back."""
        self._scratch.clear()

    def allocate_host(self, nbytes: int) -> Tensor:
        """Return ``nbytes`` of zeroed, page-aligned host memory, pinned if a device will copy from or to it."""
        return host_empty(nbytes) if self.device.type == "cpu" else host_pinned(nbytes, self.device.type)

    def allocate_unpinned(self, nbytes: int) -> Tensor:
        """Return ``nbytes`` of zeroed, page-aligned host memory that only the host and the disk use."""
        return host_empty(nbytes)

    def lend_host(self, nbytes: int) -> Tensor:
        """Return ``nbytes`` of host memory as :meth:`allocate_host` does, not zeroed, that comes and goes every step.

        It may be lent to somebody else as soon as no tensor has it any more.
        """
        return self._lent.lend(nbytes, self.allocate_host)

    def allocate_device(self, nbytes: int) -> Tensor:
        """Return ``nbytes`` of zeroed memory on the device.

        Raises:
            MemoryError: The device has not that much; the message has the numbers.
        """
        if self.device.type == "cpu":
            return host_empty(nbytes)
        try:
            # Slots must stay ordinary tensors: what is allocated under inference_mode would break the next fit.
            with torch.inference_mode(False):
                return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"{self.device} has no {nbytes} bytes left for weights and state that are to be there: allow less with "
                f"memory.device_bytes, or keep activations elsewhere (activation_checkpointing, offload_activations). "
                f"{error}"
            ) from error

    # ------------------------------------------------------------------ copies (not verified on a GPU yet)

    def upload(self, host: Tensor, slot: Slot, device: Tensor, name: str) -> EventTicket | None:
        """Copy ``host`` to ``device``, after whoever used that memory before has finished.

        Args:
            host: From where.
            slot: The slot that the weights are in, which ``device`` lies in as a rule.
            device: To where.
            name: What it is, for traces.

        Returns:
            A ticket to wait for before ``host`` is changed, or None if the copy is done.
        """
        self.counters.host_to_device_bytes += host.nbytes
        trace = self.counters.trace
        if trace is None:
            return self._upload(host, slot, device)
        return trace.request("h2d", name, host.nbytes, functools.partial(self._upload, host, slot, device))

    def _upload(self, host: Tensor, slot: Slot, device: Tensor) -> EventTicket | None:
        with torch.no_grad():
            if self._module is None or self._copy_stream is None:
                device.copy_(host)
                return None
            compute = self._module.current_stream(self.device)
            # The event tells when those are done that used the slot before it was given back. It says nothing of what
            # was queued since then, nor of other memory.
            event, slot.event = slot.event, None
            if event is None or device.untyped_storage()._cdata != slot.memory.untyped_storage()._cdata:
                self._copy_stream.wait_stream(compute)
            else:
                self._copy_stream.wait_event(event)
            with self._module.stream(self._copy_stream):
                device.copy_(host, non_blocking=True)
                done = self._module.Event()
                done.record(self._copy_stream)
            compute.wait_event(done)
            ticket = EventTicket(done, host, host.nbytes)
            slot.writes = [t for t in slot.writes if not (isinstance(t, EventTicket) and t.done())]
            slot.writes.append(ticket)
            return ticket

    def download(self, device: Tensor, host: Tensor, name: str) -> EventTicket | None:
        """Copy ``device`` to ``host``, which is ``name``; return a ticket to wait for, or None if it is done.

        The caller need not keep ``device``, but must not change it before it has waited.
        """
        self.counters.device_to_host_bytes += device.nbytes
        trace = self.counters.trace
        if trace is None:
            return self._download(device, host)
        return trace.request("d2h", name, device.nbytes, functools.partial(self._download, device, host))

    def _download(self, device: Tensor, host: Tensor) -> EventTicket | None:
        with torch.no_grad():
            if self._module is None or self._down_stream is None:
                host.copy_(device)
                return None
            # That has waited for uploads, so none of them still reads the memory that is written here.
            self._down_stream.wait_stream(self._module.current_stream(self.device))
            with self._module.stream(self._down_stream):
                host.copy_(device, non_blocking=True)
                done = self._module.Event()
                done.record(self._down_stream)
            self._keep_until(done, device)
            return EventTicket(done, host, device.nbytes)

    def _keep_until(self, done: Any, device: Tensor) -> None:
        """Keep what is copied from the device until it has been copied, and wait where that gets too much.

        (``record_stream`` would leave the memory to the allocator, which does not use it again before the host has
        seen the copy end, and knows no bound.)
        """
        self._leaving.append((done, device))
        nbytes = sum(tensor.nbytes for _, tensor in self._leaving)
        while len(self._leaving) > 1 and nbytes > self.leaving_bytes:
            event, tensor = self._leaving.popleft()
            event.synchronize()
            nbytes -= tensor.nbytes
        self.drop_left()

    def drop_left(self) -> None:
        """Let go of what has been copied from the device."""
        while self._leaving and self._leaving[0][0].query():
            self._leaving.popleft()

    def mark_used(self, slot: Slot) -> None:
        """Note on the compute stream that whoever used ``slot`` is done with it."""
        if self._module is not None:
            slot.event = self._module.Event()
            slot.event.record(self._module.current_stream(self.device))
            self.drop_left()


def _never() -> bool:
    return False


def _not_soon(_: Any) -> bool:
    return False


def _nobody(*_: Any) -> None:
    raise RuntimeError("this parameter belongs to another engine: call its dissolve() before partitioning again")


@dataclass
class EventTicket:
    """A copy on a stream; keeps its host memory alive until it is waited for."""

    event: Any
    keep: Tensor | None = field(repr=False)
    nbytes: int

    def wait(self, timeout: float | None = None) -> int:
        """Block until the copy is done."""
        self.event.synchronize()
        self.keep = None
        return self.nbytes

    def done(self) -> bool:
        """Whether the copy is done."""
        return bool(self.event.query())
