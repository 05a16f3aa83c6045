"""From checkpoints of DeepSpeed to sharded ones, without deepspeed and without a whole file in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_zinf.checkpoint.deepspeed_files import DeepSpeedCheckpoint, Place
from lightning_zinf.checkpoint.folder import Folder
from lightning_zinf.checkpoint.foreign import Progress, write_converted
from lightning_zinf.checkpoint.manifest import ITEMSIZES, Buffer, CheckpointError, Param

_OWN = {
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "skipped_steps",
    "global_steps",
    "global_samples",
    "dp_world_size",
    "mp_world_size",
    "ds_config",
    "ds_version",
    "checkpoint_parallel_dimensions",
    "sparse_tensor_module_names",
    "num_experts",
    "ds_autoep_layers",
    "autoep_layers",
    "universal_checkpoint_info",
    "autoep_tp_folding",
}
"""Entries of the model's file that are DeepSpeed's; all others came from the user, or from Lightning."""
_LAYOUT = "2.5.0"
"""Lightning's version whose layout is written where none is known; later ones read it."""


def from_deepspeed(
    path: str | os.PathLike[str], out: str | os.PathLike[str], progress: Progress = lambda nbytes: None
) -> list[str]:
    """Write a sharded checkpoint from one of DeepSpeed, and return what the user should know of it.

    Weights are the float32 masters; the optimizer's state, buffers, frozen and tied parameters come along, and from a
    checkpoint of Lightning's DeepSpeedStrategy all that Lightning keeps. It reads pickles, in which only what
    DeepSpeed needs may be named.

    Args:
        path: The folder of the checkpoint.
        out: The folder to write.
        progress: Called with bytes as they are written.

    Raises:
        CheckpointError: If it is none, names code that it should not, or has parts that cannot be converted.
    """
    source = DeepSpeedCheckpoint(path)
    tied: dict[str, list[str]] = {}
    for name, other in source.shared.items():
        tied.setdefault(other, []).append(name)
    frozen = {n: v for n, v in source.frozen.items() if source.dtype(n) in ITEMSIZES}
    odd = {n: torch.cat(list(source.chunks(n, ""))).view(v.shape) for n, v in source.frozen.items() if n not in frozen}
    buffers = []
    for name, place in {**source.places, **frozen}.items():
        planes, dtype = {"weight": "F32"}, "F32"
        if name in frozen:
            planes["weight"] = dtype = source.dtype(name)
        elif isinstance(place, Place):
            planes.update(dict.fromkeys(source.planes(place.group), "F32"))
        shape = tuple(place.shape)
        param = Param((name, *tied.get(name, ())), shape, 0, dtype)
        buffers.append(Buffer(name, max(math.prod(shape), 1), planes, (param,)))
    saved = {n for b in buffers for p in b.params for n in p.names}
    others = {n: v for n, v in source.module.items() if isinstance(v, Tensor) and n not in saved | source.shared.keys()}
    others.update(odd)
    rest, notes = _rest(source)
    if extra := [n for n, v in source.module.items() if not isinstance(v, Tensor)]:
        notes.append(f"entries of the state dict that are no tensors are left out: {', '.join(extra)}")
    rest["optimizer_states"] = [_optimizer(source)]
    names = [n for n in source.module if n in saved or n in others]
    names += [n for n in saved if n not in source.module]
    write_converted(
        Folder(out),
        buffers,
        lambda buffer, plane: source.chunks(buffer.name, plane),
        others,
        names,
        [[n for group in _order(source) for n in group]],
        rest,
        progress,
    )
    return notes


def _order(source: DeepSpeedCheckpoint) -> list[list[str]]:
    """Return the names of each param group in the group's own order.

    Raises:
        CheckpointError: If the order is not known.
    """
    if source.stage == 3:
        return [[n for i in g["params"] for n in source.groups[i]] for g in source.base(0)["param_groups"]]
    position = {name: i for i, name in enumerate(source.module)}
    config = source.model.get("ds_config")
    found = []
    for names in map(list, source.groups):
        back = _undone(names, len(source.states))
        if isinstance(config, dict):
            found.append(back if (config.get("zero_optimization") or {}).get("round_robin_gradients") else names)
        elif sorted(names, key=position.__getitem__) in (names, back):
            found.append(sorted(names, key=position.__getitem__))
        else:
            raise CheckpointError(
                f"{source.folder} does not say whether round_robin_gradients was on (its ds_config is "
                f"{type(config).__name__}), so the order of the optimizer's parameters is not known"
            )
    return found


def _optimizer(source: DeepSpeedCheckpoint) -> dict[str, Any]:
    """Return the optimizer's state as ``torch.optim`` has it, less what is in planes."""
    number = {name: i for i, name in enumerate(n for names in _order(source) for n in names)}
    groups = []
    for group, names in zip(source.base(0)["param_groups"], _order(source), strict=True):
        kept = {k: v for k, v in group.items() if k not in ("params", "step")}
        groups.append({**kept, "params": [number[n] for n in names]})
    where = {n: g for g in source.base(0)["param_groups"] for i in g["params"] for n in source.groups[i]}
    state: dict[int, dict[str, Any]] = {}
    for name, place in source.places.items():
        planes, entry = source.planes(place.group), source.entry(place.group)
        if entry:
            rest = {k: v for k, v in entry.items() if k not in planes}
            if "step" not in rest and "step" in where[name]:
                rest["step"] = where[name]["step"]  # some optimizers count by group
            if "step" in rest:
                rest["step"] = torch.tensor(float(rest["step"]))
            state[number[name]] = rest
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def _rest(source: DeepSpeedCheckpoint) -> tuple[dict[str, Any], list[str]]:
    """Return what else Lightning keeps, and what the user should know of it."""
    given = {k: v for k, v in source.model.items() if k not in _OWN}
    if "pytorch-lightning_version" in given:
        return given, []
    steps = int(source.model["global_steps"]) - int(source.model.get("skipped_steps") or 0)
    notes = [f"Lightning did not write it: training goes on from optimizer step {steps}, at the start of the data"]
    if given:
        notes.append(f"the client state is left out: {', '.join(map(str, given))}")
    if source.model.get("lr_scheduler") is not None:
        notes.append("the scheduler's state is left out: it begins anew, from the learning rates that were saved")
    return _lightning_content(steps), notes


def _undone(names: Sequence[str], parts: int) -> list[str]:
    """Return the order that names had before they were dealt out to ``parts`` ranks in turn."""
    dealt = [i for part in range(parts) for i in range(part, len(names), parts)]
    return [name for _, name in sorted(zip(dealt, names, strict=True))]


def _lightning_content(steps: int) -> dict[str, Any]:
    """Return what Lightning needs to go on from a number of optimizer steps."""
    counts = {"ready": steps, "completed": steps}
    zero = {**counts, "started": steps}
    progress = {"step": {"total": counts, "current": counts}, "zero_grad": {"total": zero, "current": zero}}
    loop = {
        "state_dict": {},
        "epoch_loop.state_dict": {"_batches_that_stepped": steps},
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": progress},
    }
    return {
        "epoch": 0,
        "global_step": steps,
        "pytorch-lightning_version": _LAYOUT,
        "loops": {"fit_loop": loop, "validate_loop": {}, "test_loop": {}, "predict_loop": {}},
        "callbacks": {},
        "lr_schedulers": [],
    }
