"""What the first training micro-step keeps for backward.

Note [What a step keeps]
~~~~~~~~~~~~~~~~~~~~~~~~
Where the saved-tensor net is in place for that step anyway (weights are paged, activations are brought away), it sees
every tensor that autograd saves. Storages count, each once and for as long as it lives (a small view of a large one,
such as a row of a data set, counts for itself): so several forwards and backwards of one step (a GAN's) count as the
most that was kept at a time. Weights and buffers of the model are there anyhow and do not count. Recomputed modules
count with the inputs that they keep.

Where nothing is hooked, nothing is hooked for this either, since hooks of saved tensors would refuse code that
``torch.func`` transforms. Then what the memory in use has grown by between the beginning of the step and its backward
is counted, as one sum: on CUDA what the allocator has lent, on a CPU the pages of the process. The latter is rounded
by whatever else the process did meanwhile.

All of it ends with the first step; nothing is left behind that later steps would have to ask.

A later run of the same model is measured again if its first step is of another kind (:func:`kind_of`): then it may keep
something else. Where memory's growth counts, it counts less then: pages that an earlier run has left are used again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from lightning_zinf.engine.spans import span_of
from lightning_zinf.memory.machine import process_bytes
from lightning_zinf.memory.streams import module_of

Kind = tuple[object, ...]
"""What a kind of training step is: see :func:`kind_of`."""


def kind_of(root: nn.Module, batch: Any, *settings: object) -> Kind | None:
    """Return what tells apart the training steps of one model under the same options that may keep different amounts.

    Args:
        root: The model, of which it matters which parameters learn and which modules are in training mode.
        batch: What the step is given, of which shapes and dtypes matter.
        settings: What else matters.

    Returns:
        Something to compare with that of another step; None if the batch has no tensors by which steps could be told.
    """
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not tensors:
        return None
    shapes = [(x.numel() if x.is_nested else tuple(x.shape), x.dtype) for x in tensors]
    learns, training = (p.requires_grad for p in root.parameters()), (m.training for m in root.modules())
    return tuple(shapes), tuple(learns), tuple(training), settings


class StepProfile:
    """Measures a training step.

    Args:
        device: Where compute runs.
        unit: Returns the index of the unit that computes now.
        staying: Returns the storages that stay in memory anyhow: their ``_cdata``.

    Attributes:
        seen: Whether a forward and its backward have been measured.
        saved: Bytes kept by each unit, at the moment when all of them were the most.
        staying: Those of them that stayed on the device.
    """

    def __init__(self, device: torch.device, unit: Callable[[], int], staying: Callable[[], set[int]]) -> None:
        self.seen = False
        self.saved: dict[int, int] = {}
        self.staying: dict[int, int] = {}
        self._device = device
        self._unit = unit
        self._find_staying = staying
        self._anyhow: set[int] | None = None
        self._live: dict[tuple[int, int, int, bool], tuple[StorageWeakRef, int, int]] = {}
        self._before: int | None = None
        self._hooked = False
        self._forward = False

    def begin(self, *, hooked: bool) -> None:
        """A training step begins.

        Args:
            hooked: Whether :meth:`saw` will be told of what autograd saves.
        """
        self._hooked, self._forward, self._before = hooked, True, None if hooked else self._used()
        self._anyhow = None

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]  # else it traces the weak reference
    def saw(self, tensor: Tensor, *, away: bool) -> None:
        """Autograd saves a tensor that is no gathered weight; ``away`` if it is brought away."""
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.device != self._device or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return
        storage = tensor.untyped_storage()
        if self._anyhow is None:
            self._anyhow = self._find_staying()
        start, stop = span_of(tensor) if tensor.numel() else (0, 0)
        if 2 * (stop - start) >= storage.nbytes():
            start, stop = 0, storage.nbytes()
        key = (storage._cdata, start, stop, away)
        if key not in self._live and storage._cdata not in self._anyhow:
            self._live[key] = (StorageWeakRef(storage), stop - start, self._unit())

    def forward_ended(self) -> None:
        """A backward is about to begin."""
        if not self._forward:
            return
        if self._before is not None:
            self._keep({-1: max(0, self._used() - self._before)}, {})
        else:
            self._look()

    def backward_ended(self) -> None:
        """A backward is over."""
        if self._forward:
            self.seen = True
            # What was brought away has gone with it; of what stayed, a graph that is kept may still have some.
            self._live = {k: v for k, v in self._live.items() if not k[-1] and not v[0].expired()}

    def _look(self) -> None:
        saved: dict[int, int] = {}
        staying: dict[int, int] = {}
        for (*_, away), (storage, nbytes, unit) in self._live.items():
            if away or not storage.expired():
                saved[unit] = saved.get(unit, 0) + nbytes
                staying[unit] = staying.get(unit, 0) + (0 if away else nbytes)
        self._keep(saved, staying)

    def _keep(self, saved: dict[int, int], staying: dict[int, int]) -> None:
        if sum(saved.values()) >= sum(self.saved.values()):
            self.saved, self.staying = saved, staying

    def _used(self) -> int:
        module = module_of(self._device)
        return process_bytes() if module is None else int(module.memory_allocated(self._device))
