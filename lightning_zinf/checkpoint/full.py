"""Whole state dicts, as torch and Lightning have them.

Weights are the float32 masters, so what is saved here loads under any other strategy, and the other way round. Units
are read one after the other, but the result is whole: its size is the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_zinf.memory.machine import check_room

if TYPE_CHECKING:
    from lightning_zinf.engine.engine import Engine


def full_state_dict(engine: Engine, keep: bool = True, plane: str | None = None) -> dict[str, Tensor]:
    """Return ``module.state_dict()`` with every master weight whole, on the CPU.

    Tied entries share one tensor. Buffers are copies. With several ranks, all of them must call it.

    Args:
        engine: The model's engine.
        keep: If False, only help the other ranks to get theirs, and return an empty dict.
        plane: Return this plane of state in the place of the masters, for parameters that have it.

    Raises:
        MemoryError: If the weights do not fit into the free host memory, with the numbers.
    """
    if keep:
        check_room(sum(4 * b.layout.numel for u in engine.units for b in u.buffers), "the model's weights")
    masters: dict[int, Tensor] = {}
    for unit in engine.units:
        with engine.loaded(unit):
            for buffer in unit.buffers:
                other = None if plane is None else buffer.whole_plane(plane)
                if not keep:
                    continue
                flat = (buffer.read_master() if other is None else other).cpu()
                for origin, view in zip(buffer.origins, buffer.views_of(flat), strict=True):
                    if origin.whole:
                        masters[id(origin.param)] = view.to(buffer.view_dtype, copy=True)
                        continue
                    if id(origin.param) not in masters:
                        masters[id(origin.param)] = torch.empty(origin.shape, dtype=buffer.view_dtype)
                    origin.put(masters[id(origin.param)], view)
    if not keep:
        return {}
    state = engine.root.state_dict(keep_vars=True)
    for name, value in state.items():
        if id(value) in masters:
            state[name] = masters[id(value)]
        elif isinstance(value, Tensor):
            state[name] = value.detach().cpu().clone()
    return state


def load_full_state_dict(engine: Engine, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    """Load a whole state dict, unit by unit, as ``module.load_state_dict`` would.

    Returns:
        What ``load_state_dict`` returns: missing and unexpected keys.

    Raises:
        RuntimeError: As ``load_state_dict`` does, for keys and shapes that do not match.
    """
    engine.flush()
    try:
        return engine.root.load_state_dict(state_dict, strict=strict)
    finally:
        engine.replaced()


def load_plane(engine: Engine, plane: str, state_dict: Mapping[str, Tensor]) -> None:
    """Fill a plane of state, for buffers that have it, from whole tensors by the names of the parameters.

    Raises:
        KeyError: If a parameter is missing.
        ValueError: If a tensor has another shape than the parameter.
    """
    engine.flush()
    for unit in engine.units:
        for buffer in unit.buffers:
            shard = buffer.read_plane(plane)
            if shard is None:
                continue
            buffer.before_change(plane)
            first, end = buffer.shard_range
            for index, offset, low, numel in buffer.layout.overlaps(first, end):
                name, origin = buffer.names[index], buffer.origins[index]
                value = state_dict[name]
                if tuple(value.shape) != origin.shape:
                    raise ValueError(
                        f"{name!r} has shape {tuple(value.shape)} in the checkpoint, but the parameter has shape "
                        f"{origin.shape}"
                    )
                origin.cut(value, offset, shard[low - first : low - first + numel])
            assert buffer.state is not None, buffer
            buffer.state.write(plane, shard)
