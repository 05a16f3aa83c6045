"""The saved-tensor net: autograd never holds a slot.

Note [Saved-tensor net]
~~~~~~~~~~~~~~~~~~~~~~~
While a paged model computes, every tensor that autograd saves and that lies in a slot is packed as (buffer, geometry),
and refilled from the buffer in backward. So slots can be reused between forward and backward, whatever module saved a
view of a weight. In normal runs the pre-backward hooks have brought the unit back before anything is unpacked; a refill
that has to fetch is counted.

Only the innermost pair of saved-tensor hooks applies, so tensors that are not ours are passed to the pair that was
there before us (a user's ``save_on_cpu`` around the step, say).

A weight that was updated or changed in place between forward and backward is refused, as autograd's version counter
would. Autograd leaves that check to hooks for all that they pack, so what stays is checked here too. What the engine
brings away (``activations.py``) is packed as it says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lightning_zinf.engine.activations import Away, Offload
from lightning_zinf.engine.profile import StepProfile

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer


Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


@dataclass(slots=True)
class _Packed:
    """A saved view of a buffer's weights."""

    buffer: FlatBuffer
    index: int
    version: tuple[int, int]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(slots=True)
class _Kept:
    """A tensor that stays where it is."""

    tensor: Tensor
    version: int


@dataclass(slots=True)
class _Foreign:
    """Somebody else's packed tensor."""

    packed: Any
    unpack: Callable[[Any], Tensor]


class Pager(Protocol):
    """What the net needs of the engine."""

    def buffer_at(self, storage: int) -> FlatBuffer | None:
        """Return the paged buffer whose slot has this storage, if any."""

    def refill(self, buffer: FlatBuffer) -> Tensor:
        """Make the buffer's unit resident for backward and return the flat weights."""


class SavedTensorNet:
    """Saved-tensor hooks around the computation of a paged model.

    Args:
        pager: The engine.

    Attributes:
        offload: Brings away what is worth it, if anything.
        profile: Is told of what is saved, while a step is measured.
    """

    def __init__(self, pager: Pager) -> None:
        self._pager = pager
        self.offload: Offload | None = None
        self.profile: StepProfile | None = None
        self._open: list[Any] = []

    def enter(self) -> None:
        """Put the hooks in place."""
        pack = functools.partial(self._pack, _outer_hooks())
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, self._unpack)
        hooks.__enter__()
        self._open.append(hooks)

    def exit(self) -> None:
        """Take the hooks away that were put in place last."""
        self._open.pop().__exit__(None, None, None)

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]  # else versions are constants for it
    def _pack(self, outer: Hooks | None, tensor: Tensor) -> Any:
        buffer = self._pager.buffer_at(tensor.untyped_storage()._cdata)
        if buffer is not None:
            offset = int(tensor.storage_offset())
            index = buffer.index_at(offset * tensor.dtype.itemsize // buffer.compute_dtype.itemsize)
            version = buffer.version_of(index)
            return _Packed(buffer, index, version, tensor.size(), tensor.stride(), offset, tensor.dtype)
        away = None if self.offload is None else self.offload.pack(tensor)
        if self.profile is not None:
            self.profile.saw(tensor, away=away is not None)
        if away is not None:
            return away
        return _Kept(tensor, tensor._version) if outer is None else _Foreign(outer[0](tensor), outer[1])

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _Kept):
            if packed.tensor._version != packed.version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"a {packed.tensor.dtype} tensor of shape {tuple(packed.tensor.shape)} is at version "
                    f"{packed.tensor._version}; expected version {packed.version} instead. If it is the input of a "
                    "module that activation_checkpointing computes again, have that module not change its input"
                )
            return packed.tensor
        if isinstance(packed, _Foreign):
            return packed.unpack(packed.packed)
        if isinstance(packed, Away):
            assert self.offload is not None
            return self.offload.unpack(packed)
        buffer = packed.buffer
        flat = self._pager.refill(buffer)
        _compare(packed, buffer.version_of(packed.index))
        if packed.dtype != flat.dtype:
            flat = flat.view(packed.dtype)
        return flat.as_strided(packed.size, packed.stride, packed.offset)


def _compare(packed: _Packed, now: tuple[int, int]) -> None:
    """Refuse weights that are not what they were in forward.

    Raises:
        RuntimeError: With the parameter's name.
    """
    name = packed.buffer.names[packed.index]
    (updates_then, changes_then), (updates, changes) = packed.version, now
    if updates != updates_then:
        raise RuntimeError(
            f"backward needs weights of {packed.buffer.name!r} as they were in forward, but they were updated in "
            f"between ({name!r} was at version {updates_then} then, and is at {updates} now): call backward before "
            "optimizer.step(), or run forward again"
        )
    if changes != changes_then:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: parameter "
            f"{name!r} is at version {changes}; expected version {changes_then} instead. Change it before forward or "
            "after backward"
        )


def _outer_hooks() -> Hooks | None:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks if hooks else None
