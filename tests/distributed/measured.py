"""What ranks do whose first training step keeps more than there is room for."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
from lightning_cases import loader, net, trainer
from plan_cases import Deep, engine
from torch.utils.data import DataLoader

import lightning_zinf
from lightning_zinf import strategy_plan
from lightning_zinf.engine import partition
from lightning_zinf.engine import speeds as probing
from lightning_zinf.engine.profile import StepProfile
from lightning_zinf.memory.planner import Plan, make_plan
from lightning_zinf.memory.planner.speeds import Speeds


class Watch(pl.Callback):
    """Notes the tiers of all planes, and the bytes that this rank keeps in memory, at every step."""

    def __init__(self) -> None:
        self.tiers: list[list[tuple[str, str]]] = []
        self.held: list[int] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        buffers = [b for u in engine(module).units for b in u.buffers]
        self.tiers.append([(b.params_tier, b.state_tier) for b in buffers])
        self.held.append(sum(n for _, _, tier, n in engine(module).plan.residency() if tier != "nvme"))


def fit_measured(
    rank: int, size: int, folder: Path, options: dict[str, Any], free: int | None, keeps: list[int] | None
) -> dict[str, Any]:
    """Fit; ``keeps`` is what each rank's first step keeps for backward, and ``free`` what memory has for all."""
    before = partition.free_host_bytes, partition.free_device_bytes, StepProfile.backward_ended
    try:
        if free is not None:
            partition.free_host_bytes = partition.free_device_bytes = lambda *_: free  # type: ignore[assignment]
        if keeps is not None:

            def backward_ended(self: StepProfile) -> None:
                before[2](self)
                self.saved = {0: keeps[rank]}

            StepProfile.backward_ended = backward_ended  # type: ignore[method-assign]
        model, watch = net(Deep), Watch()
        strategy = lightning_zinf.ZinfStrategy() if free is not None else lightning_zinf.ZinfStrategy(stage=2)
        running = trainer(folder, strategy, devices=size, max_epochs=2, callbacks=[watch], **options)
        running.fit(model, loader(12))
        plan = engine(model).plan
        return {
            "weights": lightning_zinf.full_state_dict(model),
            "tiers": watch.tiers,
            "held": watch.held,
            "plan": plan.told(),
            "fits": plan.fits,
        }
    finally:
        partition.free_host_bytes, partition.free_device_bytes, StepProfile.backward_ended = before  # type: ignore[method-assign]


def fit_with_batches(rank: int, size: int, folder: Path, sizes: list[list[int]]) -> list[int]:
    """Fit once for each list of batch sizes, by rank; return the samples of the batch that each plan goes by."""
    model, samples = net(Deep), []
    for by_rank in sizes:
        data = DataLoader(loader(12).dataset, batch_size=by_rank[rank])
        running = trainer(folder, "nvme", devices=size, limit_train_batches=2, use_distributed_sampler=False)
        running.fit(model, data)
        samples.append(engine(model).plan.options.batch)
    return samples


class Breaks(Deep):
    """Raises on rank 1 alone, after the forward of its second step, until it is mended."""

    broken = True

    def on_before_backward(self, loss: Any) -> None:
        if self.broken and self.global_rank == 1 and self.trainer.global_step == 1:
            raise RuntimeError("broken on purpose")


def fit_again_within(rank: int, size: int, folder: Path, budget: int) -> tuple[list[str], list[bool], bool]:
    """Fit until rank 1 breaks, and again; return what each fit said and left, and whether speeds were measured."""
    model, said, between = net(Breaks), ["", ""], []
    for number in range(2):
        strategy = lightning_zinf.ZinfStrategy(memory=lightning_zinf.MemoryConfig(host_bytes=budget))
        try:
            trainer(folder, strategy, devices=size, max_epochs=5).fit(model, loader(12))
        except Exception as error:
            said[number] = f"{type(error).__name__}: {error}"
        between.append(engine(model).between_steps)
        model.broken = False
    return said, between, engine(model).plan.prediction is not None


def plan_apart(rank: int, size: int, folder: Path, budget: int, shares: list[float | None]) -> tuple[str, bool]:
    """Fit within a budget until speeds are known, by which each rank plans with a share for rings of its own.

    Args:
        rank: This rank.
        size: Number of ranks.
        folder: For files.
        budget: Bytes for planes and rings.
        shares: Of the budget, by rank; None stays with what there is.

    Returns:
        What was said, and whether all planes are where they were before the first step.
    """

    def best_rings(plan: Plan) -> Plan:
        share = shares[rank]
        return plan if share is None else make_plan(plan.model, plan.machine, plan.options, rings=share)

    model, watch, said = net(Deep), Watch(), ""
    strategy = lightning_zinf.ZinfStrategy(memory=lightning_zinf.MemoryConfig(host_bytes=budget))
    with mock.patch.object(strategy_plan, "best_rings", best_rings):
        try:
            trainer(folder, strategy, devices=size, max_epochs=5, callbacks=[watch]).fit(model, loader(12))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    buffers = [b for u in engine(model).units for b in u.buffers]
    return said, watch.tiers[0] == [(b.params_tier, b.state_tier) for b in buffers]


def fit_with_speeds(
    rank: int, size: int, folder: Path, options: dict[str, Any], budget: int | None, speeds: list[Speeds]
) -> dict[str, Any]:
    """Fit within a budget; ``speeds`` is what each rank measures."""
    before = probing.speeds_of
    try:
        probing.speeds_of = lambda *_: speeds[rank]  # type: ignore[assignment]
        model, watch = net(Deep), Watch()
        strategy = lightning_zinf.ZinfStrategy(stage=2)
        if budget is not None:
            strategy = lightning_zinf.ZinfStrategy(memory=lightning_zinf.MemoryConfig(host_bytes=budget))
        running = trainer(folder, strategy, devices=size, max_epochs=5, callbacks=[watch], **options)
        running.fit(model, loader(12))
        found = engine(model)
        return {
            "weights": lightning_zinf.full_state_dict(model),
            "tiers": watch.tiers,
            "rates": found.plan.told()["machine"]["rates"],
            "rings": found.plan.told()["rings"],
            "pages": found.context.pages(),
        }
    finally:
        probing.speeds_of = before
