"""The first training step is measured, the plan completed by it, and planes move if memory is short then."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning_cases import WIDTH, Net, assert_same, block, loader, net, trainer, weights, zinf
from plan_cases import Deep, engine, free, resident
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_zinf import MemoryConfig
from lightning_zinf.engine.engine import Engine
from lightning_zinf.memory.planner import Plan, make_plan

BATCH = 4


def kept_by(module: Any) -> int:
    """What autograd saves of a batch, by the layers' own arithmetic, in float32.

    The input of the first layer; of each block the output of tanh, which is the input of the next layer; of the loss
    the scaled head's difference, which ``pow`` saves. ``scale`` and weights are the model's own, and the product with
    it saves the head's output only if ``scale`` learns, which it does not.
    """
    return 4 * BATCH * (WIDTH + len(module.blocks) * WIDTH + 1)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_first_step_is_measured_by_unit(accumulate: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, logger = net(Deep), CSVLogger(tmp_path, name="run")
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, "nvme", logger=logger, accumulate_grad_batches=accumulate).fit(module, loader())
    plan = engine(module).plan
    assert plan.model.profiled
    assert plan.options.accumulate == accumulate
    kept = json.loads((Path(logger.log_dir) / "zinf_plan.json").read_text())
    assert kept == json.loads(json.dumps(plan.told()))
    measured = kept["activations_measured"]
    assert measured["samples"] == BATCH
    by_unit = {u["unit"]: u["saved"] for u in measured["units"]}
    assert sum(by_unit.values()) == kept_by(module)
    # A block saves the input of its Linear, which the first has of the batch, and the output of its Tanh.
    assert by_unit["blocks.0"] == 2 * 4 * BATCH * WIDTH
    assert {by_unit[f"blocks.{i}"] for i in range(1, 8)} == {4 * BATCH * WIDTH}
    assert {"what": "activations", "tier": "host", "nbytes": kept_by(module)} in kept["items"]
    (told,) = (m for m in caplog.messages if "the first training step kept" in m)
    assert "; with it a step needs: host " in told
    assert "\n" not in told  # the table is printed again only if something has moved
    assert engine(module).profile is None


class Manual(Net):
    """Two forwards and backwards in one step, one after the other, of which the second keeps less."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, pl.core.optimizer.LightningOptimizer)
        for part in (batch, batch[:2]):
            optimizer.zero_grad()
            self.manual_backward(self.loss(part))
            optimizer.step()


def test_what_is_kept_at_a_time_counts(tmp_path: Path) -> None:
    once, manual = net(), net(Manual)
    trainer(tmp_path, "nvme", limit_train_batches=2).fit(once, loader())
    trainer(tmp_path, "nvme", limit_train_batches=2).fit(manual, loader())
    saved = [sum(u.saved_bytes * BATCH for u in engine(m).plan.model.units) for m in (once, manual)]
    assert saved == [kept_by(once)] * 2


@pytest.mark.parametrize("limits", [{"limit_train_batches": 1}, {"max_steps": 1}])
def test_a_run_of_one_step(limits: dict[str, Any], tmp_path: Path) -> None:
    module, logger = net(), CSVLogger(tmp_path, name="run")
    trainer(tmp_path, "nvme", logger=logger, num_sanity_val_steps=2, **limits).fit(module, loader(), loader(4))
    kept = json.loads((Path(logger.log_dir) / "zinf_plan.json").read_text())
    assert sum(u["saved"] for u in kept["activations_measured"]["units"]) == kept_by(module)


def test_nothing_is_measured_in_a_trial_run(tmp_path: Path) -> None:
    module = net()
    trainer(tmp_path, "nvme", fast_dev_run=2).fit(module, loader(), loader(2))
    assert not engine(module).plan.model.profiled
    assert engine(module).profile is None


def test_a_second_fit_measures_nothing_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = net()
    trainer(tmp_path, "nvme").fit(module, loader())
    caplog.clear()
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, "nvme").fit(module, loader())
    assert not [m for m in caplog.messages if "the first training step kept" in m]


def test_a_second_fit_with_other_batches_is_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Activations and speeds, each once; what was free when the model was set up counts once as well."""
    module = net(Deep)
    memory = MemoryConfig(host_bytes=3 * sum(p.nbytes for p in module.parameters()))
    seen, free, told = [], [], []
    runs = [(BATCH, 1), (2 * BATCH, 1), (2 * BATCH, 1), (2 * BATCH, 2)]
    for size, every in runs:
        caplog.clear()
        data = DataLoader(loader(24).dataset, batch_size=size)
        with caplog.at_level(logging.INFO):
            trainer(tmp_path, zinf("auto", memory=memory), accumulate_grad_batches=every, max_epochs=every).fit(
                module, data
            )
        found = engine(module)
        assert found.plan.prediction is not None
        assert sum(u.saved_bytes * size for u in found.plan.model.units) == kept_by(module) * size // BATCH
        seen.append((found.plan.options.batch, found.plan.options.accumulate))
        assert found.profiled_for == found.probed_for
        free.append((found.plan.machine.host_bytes, found.plan.options.present))
        told.append(sum("the first training step kept" in m for m in caplog.messages))
    assert seen == runs
    assert len(set(free)) == 1
    assert told == [1, 1, 0, 1]


def test_what_the_root_keeps_counts_though_it_has_no_parameters(tmp_path: Path) -> None:
    class Rootless(Net):
        def __init__(self, lr: float = 1e-2) -> None:
            super().__init__(lr)
            self.head = block()  # large enough to be a unit of its own

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(x).sin())

    module = net(Rootless)
    trainer(tmp_path, "nvme").fit(module, loader())
    plan = engine(module).plan
    assert "" not in {u.name for u in plan.model.units}
    # The batch, what comes out of each tanh and of the sine, and the loss's difference, as wide as they are.
    items = {i.what: i.nbytes for i in plan.items}
    assert items["activations"] == 4 * BATCH * WIDTH * 6


def test_inputs_of_recomputed_units_count(tmp_path: Path) -> None:
    module = net(Deep)
    strategy = zinf("nvme", activation_checkpointing=True)
    trainer(tmp_path, strategy).fit(module, loader())
    plan = engine(module).plan
    items = {i.what: i.nbytes for i in plan.items if i.tier == "host"}
    # The input of each block and of the head, and the loss's difference; the last two are no blocks' inputs.
    assert items["inputs of recomputed units"] == 4 * BATCH * (8 * WIDTH + WIDTH + 1)


def test_what_stays_though_activations_are_offloaded_is_told_apart(tmp_path: Path) -> None:
    module = net(Deep)
    large = 4 * BATCH * WIDTH
    memory = MemoryConfig(activation_min_bytes=large)
    strategy = zinf("nvme", offload_activations="nvme", memory=memory)
    trainer(tmp_path, strategy).fit(module, loader())
    items = {(i.what, i.tier): i.nbytes for i in engine(module).plan.items}
    assert items["activations", "nvme"] == kept_by(module) - 4 * BATCH
    assert items["activations that stay", "host"] == 4 * BATCH  # the loss's difference is small


def test_where_nothing_is_hooked_the_growth_of_memory_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([10_000, 17_000, 99_999])
    monkeypatch.setattr("lightning_zinf.engine.profile.process_bytes", lambda: next(used))
    module = net()
    trainer(tmp_path, "device").fit(module, loader())
    by_unit = {u.name: u.saved_bytes * BATCH for u in engine(module).plan.model.units}
    assert by_unit[""] == sum(by_unit.values()) == 7_000


def test_code_that_torch_func_transforms_works_in_the_measured_step(tmp_path: Path) -> None:
    class Functional(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            slope = torch.func.grad(lambda x: x.pow(3).sum())(batch)
            return self.loss(batch) + slope.mean()

    trainer(tmp_path, "device").fit(net(Functional), loader())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_planes_make_room_for_activations(
    precision: str,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same bits as where memory is ample; the new plan fits, and fewer bytes of planes rest in memory."""
    reference = net(Deep)
    settings = {"precision": precision, "max_epochs": 3, **options}
    trainer(tmp_path, "nvme", **settings).fit(reference, loader())

    module, logger = net(Deep), CSVLogger(tmp_path, name="run")
    present = sum(p.nbytes for p in module.parameters())
    available = 4 * present
    free(monkeypatch, available)
    planned = plan_before(tmp_path, settings)
    planes = sum(n for _, _, tier, n in planned.residency() if tier != "nvme")
    assert planes
    assert planned.decision.on_nvme
    # What is free beside the plan, and as much as half of the planes that rest in memory.
    activations = available + present - planned.tiers[0].needed + planes // 2
    held: list[int] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            held.append(resident(module))

    def measured(self: Engine, samples: int) -> Any:
        kept = plain(self, samples)
        return None if kept is None else replace(kept, saved={"": activations})

    plain = Engine.measured
    monkeypatch.setattr(Engine, "measured", measured)
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, zinf("auto"), logger=logger, callbacks=[Watch()], **settings).fit(module, loader())
    assert_same(weights(module), weights(reference))
    plan = engine(module).plan
    assert plan.fits
    assert held[-1] < held[0]
    assert len(set(held)) == 2
    assert resident(module) == sum(n for _, _, tier, n in plan.residency() if tier != "nvme")
    assert any("planes have moved to make room for activations" in m for m in caplog.messages)
    kept = json.loads((Path(logger.log_dir) / "zinf_plan.json").read_text())
    assert kept == json.loads(json.dumps(plan.told()))


class SavesFirst(pl.Callback):
    """Saves after the first step, and notes how much of the planes rests in memory after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.held.append(resident(module))
        if trainer.global_step == 1:
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_that_is_being_written_while_planes_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the state of the step that it was saved after: who goes on from it has the bits of a run that stays."""
    stays, moves, resumed = net(Deep), net(Deep), [net(Deep), net(Deep)]
    still, moving = SavesFirst(tmp_path / "stays.ckpt"), SavesFirst(tmp_path / "moves.ckpt")
    trainer(tmp_path, zinf("nvme", state_dict_type="sharded"), callbacks=[still]).fit(stays, loader())
    present = sum(p.nbytes for p in moves.parameters())
    free(monkeypatch, 4 * present)
    planned = plan_before(tmp_path, {})
    planes = sum(n for _, _, tier, n in planned.residency() if tier != "nvme")
    activations = 5 * present - planned.tiers[0].needed + planes // 2
    plain = Engine.measured

    def measured(self: Engine, samples: int) -> Any:
        kept = plain(self, samples)
        return None if kept is None else replace(kept, saved={"": activations})

    monkeypatch.setattr(Engine, "measured", measured)
    trainer(tmp_path, zinf("auto", state_dict_type="sharded"), callbacks=[moving]).fit(moves, loader())
    assert moving.held[1] < moving.held[0]
    assert_same(weights(moves), weights(stays))
    monkeypatch.undo()
    for module, path in zip(resumed, (still.path, moving.path), strict=True):
        trainer(tmp_path, "nvme").fit(module, loader(), ckpt_path=path)
    assert_same(weights(resumed[1]), weights(resumed[0]))


def plan_before(folder: Path, settings: dict[str, Any]) -> Plan:
    """What a run with these settings begins with."""
    module = net(Deep)
    trainer(folder, zinf("auto"), **{**settings, "fast_dev_run": 1}).fit(module, loader())
    plan = engine(module).plan
    return make_plan(
        plan.model,
        plan.machine,
        replace(plan.options, accumulate=settings.get("accumulate_grad_batches", 1)),
        plan.decision,
    )


def test_what_the_user_has_placed_stays_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = net(Deep)
    present = sum(p.nbytes for p in module.parameters())
    free(monkeypatch, 4 * present)
    plain = Engine.measured

    def measured(self: Engine, samples: int) -> Any:
        kept = plain(self, samples)
        return None if kept is None else replace(kept, saved={**kept.saved, "": 8 * present})

    monkeypatch.setattr(Engine, "measured", measured)
    with pytest.warns(UserWarning, match=r"the first training step kept .* MiB for backward; with it a step needs"):
        trainer(tmp_path, "nvme").fit(module, loader())
    assert {b.params_tier for u in engine(module).units for b in u.buffers} == {"nvme"}
