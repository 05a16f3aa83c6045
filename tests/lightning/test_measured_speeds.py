"""The speeds of some steps of a run are measured, and planes and rings change places once if that is faster."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from lightning_cases import assert_same, loader, net, trainer, weights, zinf
from plan_cases import FAST, SLOW, Deep, engine, resident
from torch import Tensor

from lightning_zinf import MemoryConfig, OverlapConfig
from lightning_zinf.engine.speeds import STEPS, WARM_UP
from lightning_zinf.memory.planner.speeds import Speeds


@pytest.mark.parametrize("speeds", [SLOW, FAST], ids=["slow disk", "fast disk"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_a_plan_is_made_once_more_with_measured_speeds(
    speeds: Speeds,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On a slow disk planes take the place of rings, with the same bits; on a fast one all stays where it is."""
    reference, module = net(Deep), net(Deep)
    settings = {"max_epochs": 5, **options}
    trainer(tmp_path, "nvme", **settings).fit(reference, loader())
    monkeypatch.setattr("lightning_zinf.engine.speeds.speeds_of", lambda *_: speeds)
    memory = MemoryConfig(host_bytes=3 * sum(p.nbytes for p in module.parameters()))
    seen: list[tuple[int, int]] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            context = engine(module).context
            seen.append((resident(module), sum(n for _, _, n in context.pages())))

    logger = CSVLogger(tmp_path, name="run")
    with caplog.at_level(logging.INFO):
        running = trainer(tmp_path, zinf("auto", memory=memory), logger=logger, callbacks=[Watch()], **settings)
        running.fit(module, loader())
    assert_same(weights(module), weights(reference))
    assert engine(module).counters.trace is None
    assert engine(module).probe is None
    plan = engine(module).plan
    assert plan.machine.rates.nvme_read == speeds.nvme_read
    kept = json.loads((Path(logger.log_dir) / "zinf_plan.json").read_text())
    assert kept == json.loads(json.dumps(plan.told()))
    assert kept["step"]["seconds"] > 0
    every = options.get("accumulate_grad_batches", 1)
    moved = (WARM_UP + STEPS + 1) * every  # the first step after those that were measured
    if speeds is FAST:
        assert len(set(seen)) == 1
    else:
        assert any("as the speeds measured in this run suggest" in m for m in caplog.messages)
        assert set(seen[: moved + 1]) == {seen[0]}
        assert set(seen[moved + 1 :]) == {seen[-1]}
        assert seen[-1][0] > seen[0][0]
        assert seen[-1][1] < seen[0][1]
    gradients = sum(b.weight_bytes for b in plan.decision.buffers)
    assert all(planes + rings + gradients <= memory.host_bytes for planes, rings in seen)


def test_real_speeds_are_measured(tmp_path: Path) -> None:
    module = net(Deep)
    memory = MemoryConfig(host_bytes=3 * sum(p.nbytes for p in module.parameters()))
    trainer(tmp_path, zinf("auto", memory=memory), max_epochs=2).fit(module, loader())
    rates = engine(module).plan.machine.rates
    assert rates.nvme_mixed is not None
    assert rates.flops is not None
    assert rates.adam is not None
    assert engine(module).plan.prediction is not None


@pytest.mark.parametrize("steps", [2, WARM_UP + STEPS + 2])
def test_a_run_that_looks_for_a_learning_rate_first(steps: int, tmp_path: Path) -> None:
    """What the search was too short to measure is measured by the run after it, whose files have all of it."""
    module, logger = net(Deep), CSVLogger(tmp_path, name="run")
    memory = MemoryConfig(host_bytes=3 * sum(p.nbytes for p in module.parameters()))
    known: list[bool] = []

    class Watch(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            plan = engine(module).plan
            known.append(plan.model.profiled and plan.prediction is not None)

    callbacks = [LearningRateFinder(num_training_steps=steps, early_stop_threshold=None, update_attr=False), Watch()]
    strategy = zinf("auto", memory=memory)
    used = trainer(tmp_path, strategy, max_epochs=2, logger=logger, callbacks=callbacks)
    used.fit(module, loader())
    assert known == [steps > WARM_UP + STEPS]  # of the run; the search has no callbacks but its own
    plan = engine(module).plan
    assert plan.model.profiled
    assert plan.prediction is not None
    kept = json.loads((Path(logger.log_dir) / "zinf_plan.json").read_text())
    assert kept == json.loads(json.dumps(plan.told()))


def test_evaluations_between_the_measured_steps_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = net(Deep)
    found: list[tuple[int, int, list[tuple[int, int]]]] = []

    def noted(events: Any, begin: int, end: int, steps: int, evaluations: Any) -> Speeds:
        found.append((begin, end, list(evaluations)))
        return FAST

    monkeypatch.setattr("lightning_zinf.engine.speeds.speeds_of", noted)
    memory = MemoryConfig(host_bytes=3 * sum(p.nbytes for p in module.parameters()))
    used = trainer(tmp_path, zinf("auto", memory=memory), max_epochs=2, val_check_interval=1)
    used.fit(module, loader(), loader(2))
    ((begin, end, evaluations),) = found
    assert len(evaluations) == STEPS
    moments = [begin, *(moment for span in evaluations for moment in span), end]
    assert moments == sorted(set(moments))


@pytest.mark.parametrize("place", ["device", "nvme", "turned off"])
def test_nothing_is_recorded_where_speeds_decide_nothing(place: str, tmp_path: Path) -> None:
    module = net(Deep)
    strategy = zinf(place)
    if place == "turned off":
        memory = MemoryConfig(host_bytes=3 * sum(p.nbytes for p in module.parameters()))
        strategy = zinf("auto", memory=memory, overlap=OverlapConfig(replan=False))

    class Watch(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            assert engine(module).counters.trace is None
            assert engine(module).probe is None

    trainer(tmp_path, strategy, max_epochs=2, callbacks=[Watch()]).fit(module, loader())


def test_an_exception_ends_the_recording(tmp_path: Path) -> None:
    class Fails(Deep):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            if self.global_step == WARM_UP + 1:
                assert engine(self).counters.trace is not None
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    module = net(Fails)
    memory = MemoryConfig(host_bytes=3 * sum(p.nbytes for p in module.parameters()))
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(tmp_path, zinf("auto", memory=memory)).fit(module, loader())
    assert engine(module).counters.trace is None
    assert engine(module).probe is None
