"""Data-parallel training as it is supposed to be, serially, in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from models import Case
from oracle import Plain, Recipe, Result, autocast
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """How ranks train together.

    Attributes:
        world: Number of ranks.
        stage: ZeRO stage.
        shard: Number of ranks that share one copy of the model.
    """

    world: int
    stage: int = 3
    shard: int | None = None


def mean(grads: list[Tensor], shard: int) -> Tensor:
    """Sum in rank order in float32, within each copy of the model and then over copies, and divide."""
    sums = []
    for start in range(0, len(grads), shard):
        total = grads[start].float().clone()
        for grad in grads[start + 1 : start + shard]:
            total += grad
        sums.append(total)
    total = sums[0]
    for other in sums[1:]:
        total += other
    return total * (1.0 / len(grads))


def train_together(case: Case, precision: str, recipe: Recipe, setting: Setting) -> Result:
    """Train a model of the zoo; losses are rank 0's. Micro-batch ``m`` of rank ``r`` is batch ``m * world + r``."""
    plain = Plain(case.oracle(case.make(), precision), precision, recipe)
    world, shard = setting.world, setting.shard or setting.world
    losses: list[float] = []
    for step in range(recipe.steps):
        local: list[dict[str, Tensor]] = [{} for _ in range(world)]
        sums: dict[str, Tensor] = {}
        for micro in range(recipe.accumulate):
            for rank in range(world):
                number = (step * recipe.accumulate + micro) * world + rank
                with autocast(precision):
                    loss = case.loss(plain.model, case.batch(number), number) / recipe.accumulate
                if rank == 0:
                    losses.append(float(loss.detach()))
                loss.backward()
                for name, param in plain.params.items():
                    if param.grad is None:
                        continue
                    if setting.stage == 1 and name in local[rank]:
                        local[rank][name] = local[rank][name].float() + param.grad
                    else:
                        local[rank][name] = param.grad.clone()
                    param.grad = None
            if setting.stage > 1:
                _reduce(plain, local, shard, sums)
                local = [{} for _ in range(world)]
        if setting.stage == 1:
            _reduce(plain, local, shard, sums)
        for name, total in sums.items():
            plain.masters[name].grad = total
        plain.step()
    return plain.result(losses)


def _reduce(plain: Plain, local: list[dict[str, Tensor]], shard: int, sums: dict[str, Tensor]) -> None:
    for name, param in plain.params.items():
        found = [grads.get(name) for grads in local]
        if all(grad is None for grad in found):
            continue
        grads = [torch.zeros_like(param) if grad is None else grad for grad in found]
        total = mean(grads, shard)
        sums[name] = total if name not in sums else sums[name] + total
