"""Activations between forward and backward: which are computed again, and which are brought away.

Note [Offloading what autograd saves]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
The saved-tensor net asks here about every tensor that autograd saves and that is no gathered weight. What is worth it
goes to the store (host memory or NVMe), and autograd keeps a ticket. With activation checkpointing only inputs of
recomputed units are worth it, which are what lives long; without, every saved tensor of enough bytes.

Storages are what is kept, each once: two views of one storage, a tensor that is saved by two operators, the output of a
unit and the input of the next share a copy as long as the storage lives and its version is the same. The counter of
versions has to be the same one, too: what ``unsafe_chunk`` returns (in an LSTM) shares memory, but each piece is
changed under a counter of its own. So a tensor without memory that shares the counter is kept beside the copy. A small
view of a large storage (a row of a data set) is kept by itself. Not brought away: weights and buffers of the model,
which stay in memory anyhow, and what is saved while backward is running, which is about to be used.

What was brought away is as it was when autograd saved it, so changing such a tensor in place does no harm. One that
stays is refused if it was changed, as autograd does (see ``net.py``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_zinf.config import PartitionConfig
from lightning_zinf.engine.context import EngineContext
from lightning_zinf.engine.recompute import RecomputedForward, Steps
from lightning_zinf.engine.spans import span_of
from lightning_zinf.engine.units import Unit
from lightning_zinf.memory.activation_room import Saved
from lightning_zinf.memory.activations import ActivationStore
from lightning_zinf.memory.link import DeviceLink
from lightning_zinf.memory.nvme import NvmeStore

STAGING_BYTES = 256 * 2**20
"""Host memory that activations pass through to and from NVMe, unless ``memory.activation_bytes`` says otherwise."""


_MANY = 4096
"""Storages that are known before those that are gone are looked for."""


@dataclass(slots=True)
class Away:
    """A saved tensor whose bytes are in the store."""

    saved: Saved
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(slots=True)
class _Known:
    """A piece of a storage and its like in the store; the reference keeps its address from being given to another."""

    storage: StorageWeakRef
    version: int
    counter: Tensor
    saved: weakref.ref[Saved]

    @classmethod
    def of(cls, tensor: Tensor, saved: Saved) -> _Known:
        """Return what is to be known of a tensor."""
        counter = tensor.detach()
        counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return cls(StorageWeakRef(tensor.untyped_storage()), tensor._version, counter, weakref.ref(saved))

    def like(self, tensor: Tensor) -> Saved | None:
        """Return where the bytes of a tensor are that has the same storage address, if they are the same."""
        if self.version != tensor._version or self.storage.expired():
            return None
        with _unsafe_preserve_version_counter(tensor):
            torch.autograd.graph.increment_version(tensor)
            same = self.counter._version == tensor._version
        return self.saved() if same else None


class Offload:
    """Brings saved tensors away, and back in backward.

    Args:
        store: Where to.
        device: The device that compute uses.
        min_bytes: What has fewer stays.
        only_inputs: Bring away only what is saved within :meth:`inputs`.
        staying: Returns the storages that stay in memory anyhow: their ``_cdata``.
        in_backward: Whether autograd is running a graph on this thread.
    """

    def __init__(
        self,
        store: ActivationStore,
        device: torch.device,
        *,
        min_bytes: int,
        only_inputs: bool,
        staying: Callable[[], set[int]],
        in_backward: Callable[[], bool],
    ) -> None:
        self.store = store
        self._device = device
        self._min_bytes = min_bytes
        self._only_inputs = only_inputs
        self._find_staying = staying
        self._staying: set[int] | None = None
        self._in_backward = in_backward
        self._saving_inputs = False
        self._known: dict[tuple[int, int, int], _Known] = {}
        self._back: dict[int, _Known] = {}
        self._many = _MANY

    @contextmanager
    def inputs(self) -> Iterator[None]:
        """While this is open, inputs of a unit are saved."""
        before, self._saving_inputs = self._saving_inputs, True
        try:
            yield
        finally:
            self._saving_inputs = before

    def pack(self, tensor: Tensor) -> Away | None:
        """Bring a saved tensor away; return None if it should stay."""
        if not self._plain(tensor):
            return None
        storage = tensor.untyped_storage()
        itemsize, address = tensor.dtype.itemsize, storage._cdata
        back = self._back[address].like(tensor) if address in self._back else None
        if back is not None:
            return Away(back, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        if self._in_backward() or (self._only_inputs and not self._saving_inputs):
            return None
        start, stop = span_of(tensor)
        if 2 * (stop - start) >= storage.nbytes():
            start, stop = 0, storage.nbytes()
        if stop - start < self._min_bytes or address in self._stays():
            return None
        saved = self._put(tensor, address, start, stop)
        return Away(
            saved, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()) - start // itemsize
        )

    def unpack(self, away: Away) -> Tensor:
        """Return a saved tensor."""
        with torch.no_grad():
            found = self.store.get(away.saved)
            self._back[found.untyped_storage()._cdata] = _Known.of(found, away.saved)
            itemsize = away.dtype.itemsize
            whole = found[: found.numel() // itemsize * itemsize].view(away.dtype)
            return whole.as_strided(away.size, away.stride, away.offset)

    def look_again(self) -> None:
        """Other storages than before may stay in memory anyhow."""
        self._staying = None

    def forget(self) -> None:
        """Forget about storages that are no longer in the store."""
        self._known = {k: v for k, v in self._known.items() if v.saved() is not None and not v.storage.expired()}
        self._back = {k: v for k, v in self._back.items() if v.saved() is not None and not v.storage.expired()}
        self._many = max(_MANY, 2 * len(self._known))

    def _plain(self, tensor: Tensor) -> bool:
        """Whether bytes and geometry are all there is to a tensor."""
        return (
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.layout is torch.strided
            and tensor.device == self._device
            and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
            and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            and tensor.numel() > 0
        )

    def _stays(self) -> set[int]:
        if self._staying is None:
            self._staying = self._find_staying()
        return self._staying

    def _put(self, tensor: Tensor, address: int, start: int, stop: int) -> Saved:
        key = address, start, stop
        known = self._known.get(key)
        saved = None if known is None else known.like(tensor)
        if saved is not None:
            return saved
        storage = tensor.untyped_storage()
        if len(self._known) >= self._many:
            self.forget()
        with torch.no_grad():
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, start, (stop - start,))  # type: ignore[call-overload,unused-ignore]
            saved = self.store.put(flat, tensor)
        self._known[key] = _Known.of(tensor, saved)
        return saved


class Activations:
    """What an engine does with activations.

    Args:
        modules: The modules to recompute in backward.
        steps: The engine.
        offload: Brings saved tensors away; None if they stay.
    """

    def __init__(self, modules: Sequence[nn.Module], steps: Steps, offload: Offload | None) -> None:
        self.offload = offload
        self.recomputed = [RecomputedForward(m, steps) for m in modules]

    def after_backward(self, *, failed: bool) -> None:
        """Give back what a backward is done with.

        Raises:
            OSError: Activations could not be written.
        """
        if self.offload is None:
            return
        self.offload.forget()
        if failed:
            self.offload.store.after_exception()
        else:
            self.offload.store.end_of_backward()

    def remove(self) -> None:
        """Leave the modules as they were."""
        for forward in self.recomputed:
            forward.remove()


def open_store(config: PartitionConfig, context: EngineContext, free_host: int) -> ActivationStore | None:
    """Return where activations go, or None if they stay; the context closes it.

    Args:
        config: How the model is partitioned.
        context: The engine's.
        free_host: Free bytes of host memory.

    Raises:
        OSError: If the NVMe folder cannot be used.
    """
    where, budget = config.offload_activations, config.memory.activation_bytes
    if where == "none" or (where == "cpu" and context.aliased):  # host memory is where they are
        return None
    nvme = NvmeStore(config.nvme_paths, config.io, context.counters) if where == "nvme" else None
    link = None if context.aliased else DeviceLink(context.device, context.counters)
    budget = min(STAGING_BYTES, free_host // 8) if budget is None else budget
    context.activations = ActivationStore(budget, context.allocate_host, context.counters, nvme, link)
    return context.activations


def staying_storages(root: nn.Module, units: Sequence[Unit]) -> set[int]:
    """Return the storages of weights and buffers that stay in memory anyhow."""
    found = {b.untyped_storage()._cdata for b in root.buffers() if b.layout is torch.strided}
    return found | {b.storage_key() for u in units for b in u.buffers if b.persistent}
