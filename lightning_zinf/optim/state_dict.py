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
    from lightning_zinf.optim.binding import OptimizerBinding

_MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_state_dict(binding: OptimizerBinding) -> dict[str, Any]:
    """Return an optimizer's state in torch.optim's layout, on the CPU.

    With several ranks, all of them must call it, and all get the whole state.
    """
    engine = binding.engine
    params = owned_params(binding.optimizer)
    number = {id(p): i for i, p in enumerate(params)}
    check_room(8 * sum(p.numel() for p in params), "the optimizer's state")
    state: dict[int, dict[str, Tensor]] = {}
    for unit in engine.units:
        wanted = [b for b in unit.buffers if any(id(p) in number and s for p, s in zip(b.params, b.steps, strict=True))]
        if not wanted:
            continue
        with engine.loaded(unit):
            for buffer in wanted:
                planes = {m: _views(buffer, m) for m in _MOMENTS}
                for j, (param, step) in enumerate(zip(buffer.params, buffer.steps, strict=True)):
                    if id(param) in number and step:
                        entry = {"step": torch.tensor(float(step))}
                        entry.update({m: planes[m][j].clone() for m in _MOMENTS})
                        state[number[id(param)]] = entry
    groups = []
    for group in binding.optimizer.param_groups:
        packed = {k: v for k, v in group.items() if k != "params"}
        packed["params"] = [number[id(p)] for p in group["params"]]
        groups.append(packed)
    return {"state": dict(sorted(state.items())), "param_groups": groups}


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
    states = {id(p): state_dict["state"].get(i) for i, p in zip(ids, owned_params(optimizer), strict=True)}
    for unit in engine.units:
        for buffer in unit.buffers:
            if buffer.trained and any(id(p) in states for p in buffer.params):
                _load_buffer(buffer, states)
    for group, packed in zip(optimizer.param_groups, saved, strict=True):
        group.update({k: v for k, v in packed.items() if k not in ("params", "param_names")})


def _load_buffer(buffer: Any, states: Mapping[int, Mapping[str, Any] | None]) -> None:
    planes = {m: buffer.read_plane(m) for m in _MOMENTS}
    first, end = buffer.shard_range
    parts = {index: (offset, low, numel) for index, offset, low, numel in buffer.layout.overlaps(first, end)}
    for j, (name, param) in enumerate(zip(buffer.names, buffer.params, strict=True)):
        if id(param) not in states:
            continue
        entry = states[id(param)] or {}
        buffer.steps[j] = int(entry.get("step", 0))
        for moment in _MOMENTS:
            value = entry.get(moment)
            if value is not None and tuple(value.shape) != tuple(param.shape):
                raise ValueError(
                    f"optimizer state {moment!r} of parameter {name!r} has shape {tuple(value.shape)}, but the "
                    f"parameter has shape {tuple(param.shape)}"
                )
            if j in parts:
                offset, low, numel = parts[j]
                view = planes[moment][low - first : low - first + numel]
                view.copy_(value.reshape(-1)[offset : offset + numel]) if value is not None else view.zero_()
    for moment in _MOMENTS:
        buffer.state.write(moment, planes[moment])


def _views(buffer: Any, plane: str) -> list[Tensor]:
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
