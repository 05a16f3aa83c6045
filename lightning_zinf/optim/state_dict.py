"""Optimizer state in torch.optim's own layout: out of the engine, and back in.

So an optimizer that was saved here is resumed by any other strategy, and the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_zinf.memory.machine import check_room

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer
    from lightning_zinf.optim.binding import OptimizerBinding


def optimizer_state_dict(binding: OptimizerBinding) -> dict[str, Any]:
    """Return an optimizer's state in torch.optim's layout, on the CPU.

    With several ranks, all of them must call it, and all get the whole state.
    """
    engine = binding.engine
    params = owned_params(binding.optimizer)
    number = {id(p): i for i, p in enumerate(params)}
    check_room(
        sum(4 * len(binding.rule.planes(g)) * p.numel() for g in binding.optimizer.param_groups for p in g["params"]),
        "the optimizer's state",
    )
    state: dict[int, dict[str, Tensor]] = {}
    for unit in engine.units:
        wanted = [b for b in unit.buffers if _entries(binding, b, number)]
        if not wanted:
            continue
        with engine.loaded(unit):
            for buffer in wanted:
                _collect(binding, buffer, number, state)
    return {"state": dict(sorted(state.items())), "param_groups": _packed_groups(binding.optimizer, number)}


def optimizer_rest(binding: OptimizerBinding) -> dict[str, Any]:
    """Return an optimizer's state in torch.optim's layout without the tensors of a parameter's shape."""
    if any(update.changes_rest for buffer in binding.buffers() for update in buffer.pending):
        binding.engine.flush()
    params = owned_params(binding.optimizer)
    number = {id(p): i for i, p in enumerate(params)}
    state = {
        number[id(buffer.origins[j].param)]: rest
        for buffer in binding.buffers()
        for j, (rest, _) in _entries(binding, buffer, number).items()
    }
    return {"state": dict(sorted(state.items())), "param_groups": _packed_groups(binding.optimizer, number)}


def _packed_groups(optimizer: torch.optim.Optimizer, number: Mapping[int, int]) -> list[dict[str, Any]]:
    return [
        {**{k: v for k, v in group.items() if k != "params"}, "params": [number[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]


def _collect(binding: OptimizerBinding, buffer: FlatBuffer, number: dict[int, int], state: dict[int, Any]) -> None:
    """Put the states of a buffer's parameters into ``state``, by their numbers."""
    entries = _entries(binding, buffer, number)
    # The same on all ranks, which gather the planes together.
    planes = {name: _views(buffer, name) for name in sorted({name for _, own in entries.values() for name in own})}
    for j, (rest, own) in entries.items():
        origin = buffer.origins[j]
        entry = state.setdefault(number[id(origin.param)], {})
        entry.update(rest)  # equal in all tiles of a parameter
        for name in own:
            if origin.whole:
                entry[name] = planes[name][j].clone()
                continue
            if name not in entry:
                entry[name] = torch.zeros(origin.shape, dtype=planes[name][j].dtype)
            origin.put(entry[name], planes[name][j])


def _entries(
    binding: OptimizerBinding, buffer: FlatBuffer, number: dict[int, int]
) -> dict[int, tuple[dict[str, Any], tuple[str, ...]]]:
    """Return what the rule says of those of a buffer's parameters that have state."""
    found = {j: binding.rule.entry(buffer, j) for j, o in enumerate(buffer.origins) if id(o.param) in number}
    return {j: entry for j, entry in found.items() if entry is not None}


def load_optimizer_state_dict(binding: OptimizerBinding, state_dict: Mapping[str, Any]) -> None:
    """Load optimizer state in torch.optim's layout.

    Raises:
        ValueError: If the groups or shapes do not match the optimizer's.
    """
    optimizer, engine = binding.optimizer, binding.engine
    saved = state_dict["param_groups"]
    _check_groups(optimizer, saved)
    engine.flush()
    ids = [i for group in saved for i in group["params"]]
    states = {id(p): state_dict["state"].get(i) or {} for i, p in zip(ids, owned_params(optimizer), strict=True)}
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for unit in engine.units:
        for buffer in unit.buffers:
            if any(id(o.param) in states for o in buffer.origins):
                _load_buffer(binding, buffer, states, groups)
    for group, packed in zip(optimizer.param_groups, saved, strict=True):
        group.update({k: v for k, v in packed.items() if k not in ("params", "param_names")})


def _load_buffer(
    binding: OptimizerBinding,
    buffer: FlatBuffer,
    states: Mapping[int, Mapping[str, Any]],
    groups: Mapping[int, dict[str, Any]],
) -> None:
    indices = [j for j, o in enumerate(buffer.origins) if id(o.param) in states]
    names = sorted({name for j in indices for name in binding.rule.planes(groups[id(buffer.origins[j].param)])})
    buffer.need_planes(tuple(names))
    buffer.before_change()
    planes = {name: _read(buffer, name) for name in names}
    first, end = buffer.shard_range
    parts = {index: (offset, low, numel) for index, offset, low, numel in buffer.layout.overlaps(first, end)}
    for j in indices:
        name, origin = buffer.names[j], buffer.origins[j]
        entry, group = states[id(origin.param)], groups[id(origin.param)]
        binding.rule.restore(buffer, j, entry, group)
        for plane in binding.rule.planes(group):
            value = entry.get(plane)
            if value is not None and tuple(value.shape) != origin.shape:
                raise ValueError(
                    f"optimizer state {plane!r} of parameter {name!r} has shape {tuple(value.shape)}, but the "
                    f"parameter has shape {origin.shape}"
                )
            if j in parts:
                offset, low, numel = parts[j]
                view = planes[plane][low - first : low - first + numel]
                origin.cut(value, offset, view) if value is not None else view.zero_()
    assert buffer.state is not None, buffer
    for plane in names:
        buffer.state.write(plane, planes[plane])


def _read(buffer: FlatBuffer, plane: str) -> Tensor:
    shard = buffer.read_plane(plane)
    assert shard is not None, buffer
    return shard


def _views(buffer: FlatBuffer, plane: str) -> list[Tensor]:
    flat = buffer.whole_plane(plane)
    assert flat is not None, buffer
    return list(buffer.views_of(flat.cpu()))


def _check_groups(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    ours = [len(g["params"]) for g in optimizer.param_groups]
    theirs = [len(g["params"]) for g in saved]
    if ours != theirs:
        raise ValueError(
            f"the saved optimizer has param groups of {theirs} parameters, this one of {ours}: build the optimizer "
            "as it was when the state was saved"
        )


def owned_params(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters of an optimizer in the order of torch's state dict."""
    return [p for group in optimizer.param_groups for p in group["params"]]
