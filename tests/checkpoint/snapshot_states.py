"""What a running engine has, and what a checkpoint has of it, in the same words."""

from __future__ import annotations

from pathlib import Path

import torch
from async_saves import contents
from driver import Session
from torch import Tensor

from lightning_zinf.checkpoint.save import placeholders, save
from lightning_zinf.optim.state_dict import optimizer_rest


def state_of(running: Session) -> dict[str, Tensor]:
    """Return what a checkpoint would have, read plane by plane while nothing else goes on."""
    result = running.result()
    order = [n for n, _ in running.model.named_parameters()]
    found = {n: result.masters[n] for n in order}
    found.update({f"{n}, {p}": v for n in order for p, v in sorted(result.planes.get(n, {}).items())})
    found.update({f"{n}, steps": torch.tensor(result.counts[n]) for n in order})
    return found


def saved_state(running: Session, path: Path) -> dict[str, Tensor]:
    """Return the same from a checkpoint."""
    every = contents(path)
    order = [n for n, _ in running.model.named_parameters()]
    moments = {k: v for k, v in every.items() if k.endswith((", exp_avg", ", exp_avg_sq", ", momentum_buffer"))}
    numbers = {id(p): i for i, p in enumerate(p for g in running.optimizer.param_groups for p in g["params"])}
    found = {n: every[n] for n in order}
    for name, param in running.model.named_parameters():
        number = numbers.get(id(param))
        steps = every.get(f"optimizer 0, parameter {number}, step", torch.tensor(0.0))
        found[f"{name}, steps"] = steps.to(torch.int64).reshape(())
        if steps:
            found.update({k: v for k, v in sorted(moments.items()) if k.startswith(f"{name}, ")})
    return found


def save_now(running: Session, path: Path, *, background: bool, copy_bytes: int) -> None:
    engine = running.engine
    checkpoint = {"state_dict": placeholders(engine), "optimizer_states": [optimizer_rest(running.binding)]}
    save(engine, checkpoint, path, [running.optimizer], {}, background=background, copy_bytes=copy_bytes)
