"""Runs whose gradients rest on NVMe, and whose plan is made again: bits, the budget, and where gradients rest stay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning_cases import assert_same, loader, net, trainer, weights, zinf
from plan_cases import SLOW, Deep, engine, free, resident

from lightning_zinf import MemoryConfig
from lightning_zinf.engine import partition
from lightning_zinf.engine.engine import Engine
from lightning_zinf.engine.spilled import SpilledGradients
from lightning_zinf.memory.planner import Plan

OPTIONS: list[dict[str, Any]] = [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}]


class Many(Deep):
    depth = 32


class Watch(pl.Callback):
    """Notes before each micro-batch how much of the planes is in memory, and how much pages pass through."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.seen.append((resident(module), sum(n for _, _, n in engine(module).context.pages())))
        buffers = [b for u in engine(module).units for b in u.buffers if b.trained]
        assert all(isinstance(b.gradients, SpilledGradients) for b in buffers)


def little_memory(monkeypatch: pytest.MonkeyPatch, precision: str, share: float) -> int:
    """Have so much host memory free, as a share of all gradients, with a model that was built in pages."""
    nbytes = int(share * sum(p.numel() for p in net(Many).parameters()) * (4 if precision == "32-true" else 2))
    free(monkeypatch, nbytes)
    monkeypatch.setattr(partition, "_present_bytes", lambda *_: 0)
    return nbytes


def begun(folder: Path, strategy: Any, settings: dict[str, Any]) -> Plan:
    """Return what a run with these settings begins with."""
    module = net(Many)
    trainer(folder, strategy, **{**settings, "fast_dev_run": 1}).fit(module, loader())
    return engine(module).plan


def ended(module: Any, logger: Any, before: Plan) -> Plan:
    """Return the plan that a run ended with, which is stored and has gradients where they were."""
    plan = engine(module).plan
    assert plan.decision.spill == before.decision.spill > 0
    assert plan.decision.spilled == before.decision.spilled
    kept = json.loads((Path(logger.log_dir) / "zinf_plan.json").read_text())
    assert kept == json.loads(json.dumps(plan.told()))
    assert kept["rings"]["gradients"] == plan.decision.spill
    return plan


@pytest.mark.parametrize(("precision", "options"), list(zip(["32-true", "bf16-mixed"], OPTIONS, strict=True)))
def test_planes_make_room_for_activations(
    precision: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, module, logger = net(Many), net(Many), CSVLogger(tmp_path, name="run")
    settings = {"precision": precision, "max_epochs": 2, **options}
    trainer(tmp_path, "nvme", **settings).fit(reference, loader())

    available = little_memory(monkeypatch, precision, 1.2)
    before = begun(tmp_path, zinf("auto"), settings)
    host = before.tiers[0]
    assert before.size.gradients + before.decision.slots + before.decision.tiles.nbytes > available
    planes = sum(n for _, _, tier, n in before.residency() if tier != "nvme")
    activations = host.available - host.needed + planes // 2  # what is free, and half of the planes that are in memory
    plain, watch = Engine.measured, Watch()

    def measured(self: Engine, samples: int) -> Any:
        kept = plain(self, samples)
        return None if kept is None else replace(kept, saved={"": activations})

    monkeypatch.setattr(Engine, "measured", measured)
    trainer(tmp_path, zinf("auto"), logger=logger, callbacks=[watch], **settings).fit(module, loader())
    assert_same(weights(module), weights(reference))
    plan = ended(module, logger, before)
    assert plan.fits
    items = {i.what: i.nbytes for i in plan.items if i.tier == "host"}
    assert sorted(set(watch.seen)) == sorted({watch.seen[0], watch.seen[-1]})
    assert watch.seen[-1][0] < watch.seen[0][0] == planes
    assert sum(watch.seen[-1]) + items["gradients of a unit"] + activations <= available


@pytest.mark.parametrize("options", OPTIONS)
def test_speeds_change_rings(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow disk planes take the place of rings, which is not much here, so that any gain is to be worth it."""
    reference, module, logger = net(Many), net(Many), CSVLogger(tmp_path, name="run")
    settings = {"max_epochs": 3 if options else 2, **options}  # 9 or 12 steps, of which the first 6 are measured
    trainer(tmp_path, "nvme", **settings).fit(reference, loader())

    memory = MemoryConfig(host_bytes=little_memory(monkeypatch, "32-true", 1.0))
    before, watch = begun(tmp_path, zinf("auto", memory=memory), settings), Watch()
    monkeypatch.setattr("lightning_zinf.engine.speeds.speeds_of", lambda *_: SLOW)
    monkeypatch.setattr("lightning_zinf.memory.planner.speeds.WORTH", 1.0)
    running = trainer(tmp_path, zinf("auto", memory=memory), logger=logger, callbacks=[watch], **settings)
    running.fit(module, loader())
    assert_same(weights(module), weights(reference))
    plan = ended(module, logger, before)
    assert plan.decision.rings != before.decision.rings
    assert watch.seen[-1][0] > watch.seen[0][0]
    assert watch.seen[-1][1] < watch.seen[0][1]
    largest = max(i.nbytes for i in plan.items if i.what == "gradients of a unit")
    assert all(planes + rings + largest <= memory.host_bytes for planes, rings in watch.seen)
