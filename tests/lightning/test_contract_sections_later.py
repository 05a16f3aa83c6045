"""Lightning's contract with a strategy, section by section, in one process: sections 1.7 to 1.12.

See ``test_contract_sections.py``.
"""

from __future__ import annotations

import copy
import functools
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch.trainer.connectors.accelerator_connector as lightning_connector
import pytest
import torch
from lightning.fabric.strategies.fsdp import _is_sharded_checkpoint
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_summary import summarize
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from lightning_cases import WIDTH, Net, assert_close, assert_same, loader, net, trainer, weights, zinf
from test_sequences import Configured
from torch import Tensor

from lightning_zinf import ops
from lightning_zinf_boot import PRESETS

SHARDED = {"offload_params": "nvme", "offload_optimizer": "nvme", "state_dict_type": "sharded"}

# ---------------------------------------------------------------------- 1.7


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_1_07_accumulation_and_schedulers(tmp_path: Path, kind: str) -> None:
    """Section 1.7 (accumulation, manual optimization, schedulers, several optimizers): what ``load_checkpoint`` returns
    has all that Lightning looks up in it, and the schedule goes on.

    Also test_accumulation_steps_on_the_tail, test_accumulation_may_change_between_epochs, test_manual_optimization
    (``retain_graph``, ``toggle_model``, steps at any time, steps of all optimizers counted), test_schedulers, their
    counterparts as DDP, and for ranks test_1_07_gradients_that_are_not_synchronised_at_once.
    """

    class Decays(Net):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    used = trainer(tmp_path, zinf(**{**SHARDED, "state_dict_type": kind}), accumulate_grad_batches=2)
    used.fit(net(Decays), loader(5))
    assert used.global_step == 3
    used.save_checkpoint(tmp_path / "a.ckpt")
    loaded = used.strategy.load_checkpoint(tmp_path / "a.ckpt")
    needed = {"lr_schedulers", "pytorch-lightning_version", "loops", "callbacks", "state_dict", "optimizer_states"}
    assert needed <= set(loaded)
    again = trainer(tmp_path, zinf(**SHARDED), accumulate_grad_batches=2, max_epochs=2)
    again.fit(net(Decays), loader(5), ckpt_path=tmp_path / "a.ckpt")
    assert again.global_step == 6
    assert again.optimizers[0].param_groups[0]["lr"] == 1e-2 / 4


# ---------------------------------------------------------------------- 1.8


def test_1_08_checkpoints(tmp_path: Path) -> None:
    """Section 1.8 (checkpoints): what a sharded checkpoint cannot have is refused and never dropped, it is not taken
    for one of Lightning's own folders, and saving it again makes it the newest.

    Also test_checkpoints.py, test_sharded.py, test_model_checkpoint.py (removal of keys, top-k, links, ``last``,
    remote folders), test_reshard.py (other world sizes, stages, tiers), test_tools.py (``zinf consolidate`` gives a
    file that ``load_from_checkpoint`` and other strategies take), test_s3.py, and for ranks
    test_1_08_names_that_differ and test_1_08_saving_in_the_middle_on_ranks.
    """

    class Edits(Net):
        edit: Any = None

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if self.edit is not None:
                self.edit(checkpoint["state_dict"])

    module = net(Edits)
    used = trainer(tmp_path, zinf(**SHARDED))
    used.fit(module, loader(2))
    path = tmp_path / "a.ckpt"
    used.save_checkpoint(path)
    assert not _is_sharded_checkpoint(path)
    assert not (path / "checkpoint").exists()
    before, long_ago = sorted(p.name for p in path.iterdir()), path.stat().st_mtime - 1000
    os.utime(path, (long_ago, long_ago))
    for edit, message in (
        (lambda state: state.update(renamed=state.pop("head.weight")), r"gave a weight the name 'renamed'"),
        (lambda state: state.update({"head.weight": torch.zeros(1, WIDTH)}), r"other values in the place of 'head.we"),
    ):
        module.edit = edit
        with pytest.raises(ValueError, match=message):
            used.save_checkpoint(path)
    assert sorted(p.name for p in path.iterdir()) == before
    module.edit = lambda state: state.update(extra=torch.ones(2))
    used.save_checkpoint(path, storage_options={"auto_mkdir": True})  # options of the file system
    assert path.stat().st_mtime > long_ago + 900
    assert torch.equal(used.strategy.load_checkpoint(path)["state_dict"]["extra"], torch.ones(2))
    with pytest.raises(TypeError, match=r"storage_options .* a dict for fsspec, got 'fast'"):
        used.save_checkpoint(path, storage_options="fast")


def test_1_08_checkpoints_through_a_plugin(tmp_path: Path) -> None:
    """Section 1.8 (checkpoints): a CheckpointIO plugin is used, or refused before training where it would not be."""

    class Mine(TorchCheckpointIO):
        pass

    with pytest.raises(ValueError, match=r"Mine would not be used: .* state_dict_type='full'"):
        trainer(tmp_path, zinf(**SHARDED), plugins=[Mine()]).fit(net(), loader(2))
    trainer(tmp_path, zinf(**SHARDED), plugins=[Mine()]).validate(net(), loader(1), verbose=False)  # saves nothing
    trainer(tmp_path, zinf(**SHARDED), plugins=[TorchCheckpointIO()]).fit(net(), loader(2))
    trainer(tmp_path, zinf("nvme"), plugins=[Mine()]).fit(net(), loader(2))


class Interrupted(Net):
    """Something happens at some place of the third step."""

    where = ""
    what: Callable[[], None]

    def signal(self, here: str) -> None:
        if here == self.where and self.trainer.global_step == 2:
            self.what()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        self.signal("forward")
        if x.requires_grad:
            x.register_hook(lambda grad: self.signal("backward"))
        return self.head(self.blocks[1](x)) * self.scale

    def on_after_backward(self) -> None:
        self.signal("after backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.signal("before the step")


@pytest.mark.parametrize("kind", ["full", "sharded"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_1_08_checkpoints_in_the_middle_of_user_code(tmp_path: Path, precision: Any, kind: str) -> None:
    """Section 1.8 (checkpoints): code of the user saves within a step: what is saved is what the last step left, and
    training goes on as if nothing had been. A signal's handler that saves, as SLURM's, does so after the step."""
    options = {**SHARDED, "state_dict_type": kind}
    whole = net(Interrupted)
    trainer(tmp_path, zinf(**options), precision=precision).fit(whole, loader(4))
    after = {2: net(Interrupted), 3: net(Interrupted)}
    for steps, module in after.items():
        trainer(tmp_path, zinf(**options), precision=precision, max_steps=steps).fit(module, loader(4))
    places = ("forward", "backward", "after backward", "before the step")
    for where, by_signal in [(where, by_signal) for where in places for by_signal in (False, True)]:
        module = net(Interrupted)
        module.where = where
        used = trainer(tmp_path, zinf(**options), precision=precision)
        saved: list[int] = []

        def handler(*args: Any, used: Any = used, saved: list[int] = saved) -> None:
            saved.append(used.global_step)
            used.save_checkpoint(tmp_path / "hpc.ckpt")

        module.what = functools.partial(os.kill, os.getpid(), signal.SIGUSR1) if by_signal else handler
        earlier = signal.signal(signal.SIGUSR1, handler)
        try:
            used.fit(module, loader(4))
        finally:
            signal.signal(signal.SIGUSR1, earlier)
        assert saved == [3 if by_signal else 2], where
        assert_same(weights(module), weights(whole))
        found = net()
        resumed = trainer(tmp_path, zinf(**options), precision=precision)
        resumed.validate(found, loader(1), ckpt_path=tmp_path / "hpc.ckpt", verbose=False)
        assert_same(weights(found), weights(after[saved[0]]))


# ---------------------------------------------------------------------- 1.9


def test_1_09_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 1.9 (processes): one process works in a notebook and several of ``zinf_notebook`` do; others are refused
    by Lightning; the kernels run on as many threads as torch was given.

    Also test_one_process_has_no_launcher_and_no_process_group, test_script (all launchers, what comes back to the
    process that spawned), test_several_trainers_on_one_module_as_ddp (one process group for all Trainers).
    """
    monkeypatch.setattr(lightning_connector, "_IS_INTERACTIVE", True)
    for name in PRESETS:
        assert trainer(tmp_path, name).strategy.launcher is None
        if name == "zinf_notebook":
            assert trainer(tmp_path, name, devices=2).strategy.launcher is not None
        else:
            with pytest.raises(MisconfigurationException, match="not compatible with an interactive environment"):
                trainer(tmp_path, name, devices=2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        trainer(tmp_path, "nvme").fit(net(), loader(1))
        assert ops.num_threads() == 3
    finally:
        torch.set_num_threads(before)
        ops.set_num_threads(before)


# ---------------------------------------------------------------------- 1.10


def test_1_10_repeated_calls_and_teardown(tmp_path: Path) -> None:
    """Section 1.10 (evaluation without fit, repeated calls, teardown): ``configure_model`` may be called by anybody at
    any time, and a module is exported after ``fit`` through a copy; tracing it as it is raises, and says so.

    Also test_every_entry_point_in_a_row, test_second_trainer_reuses_the_engine_and_starts_with_fresh_moments,
    test_configure_model, test_weights_are_usable_after_fit (``model(x)``, ``state_dict``, ``torch.save``,
    ``deepcopy``), test_several_trainers_on_one_module_as_ddp, test_checkpoint_saved_after_teardown.
    """
    results = []
    for strategy in ("nvme", "auto"):
        configured = Configured()
        for _ in range(2):
            configured.configure_model()
            trainer(tmp_path, strategy).fit(configured, loader(3))
        configured.configure_model()
        results.append(weights(configured))
    assert_close(*results)
    module = net().eval()
    trainer(tmp_path, "nvme").fit(module, loader(2))
    plain = net()
    plain.load_state_dict(weights(module))
    batch = next(iter(loader()))
    for export in (lambda m: torch.export.export(m, (batch,)), lambda m: torch.jit.trace(m.blocks, batch)):
        with pytest.raises(RuntimeError, match=r"cannot be traced: export copy.deepcopy\(module\)"):
            export(module)
    with torch.no_grad():
        exported = torch.export.export(copy.deepcopy(module), (batch,), strict=False).module()
        assert torch.equal(exported(batch), plain(batch))
        assert torch.equal(module(batch), plain(batch))


# ---------------------------------------------------------------------- 1.11


def test_1_11_init(tmp_path: Path) -> None:
    """Section 1.11 (initialisation): ``init_module`` makes ordinary tensors in host memory, empty ones if asked, and
    says that ``configure_model`` is the better place; a module without values is refused by name.

    Also test_pretrained.py (weights streamed into a model that is being built in pages), test_construction.py,
    test_configure_model_beyond_the_host_budget; the user guide says what building in ``__init__`` costs on each rank.
    """
    used = trainer(tmp_path, "nvme")
    with (
        pytest.warns(PossibleUserWarning, match="inside the`LightningModule.configure_model` hook"),
        used.init_module(),
    ):
        module = net()
    assert_same(dict(module.state_dict()), dict(net().state_dict()))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.warns(PossibleUserWarning), used.init_module(empty_init=True):
        empty = Net()
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn
    assert {p.device.type for p in empty.parameters()} == {"cpu"}
    used.fit(module, loader(2))
    used.save_checkpoint(tmp_path / "a.ckpt")
    trainer(tmp_path, "nvme").validate(empty, loader(1), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert_same(weights(empty), weights(module))
    with torch.device("meta"):
        hollow = Net()
    for strategy in ("device", "nvme"):
        with pytest.raises(ValueError, match=r"buffer 'scale' is on the meta device .*load_pretrained"):
            trainer(tmp_path, strategy).fit(hollow, loader(2))
    hollow.scale = torch.tensor(2.0)
    for strategy in ("device", "nvme"):
        with pytest.raises(ValueError, match=r"parameter 'blocks.0.0.weight' is on the meta device .*load_pretrained"):
            trainer(tmp_path, strategy).validate(hollow, loader(2), verbose=False)


# ---------------------------------------------------------------------- 1.12


def test_1_12_callbacks(tmp_path: Path) -> None:
    """Section 1.12 (callbacks): those that only look on see what they see in the plain Trainer, all at once.

    Also test_refused_by_name (StochasticWeightAveraging, WeightAveraging, EMA, pruning), test_ema_is_lightnings,
    test_backbone_finetuning, test_model_summary_counts_what_is_offloaded, test_accumulation_may_change_between_epochs,
    test_early_stopping_stops_all_ranks_together.
    """
    results = []
    for strategy in ("nvme", "auto"):
        root = tmp_path / strategy
        summaries: list[Any] = []
        sums: list[float] = []

        class Summary(ModelSummary):
            def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
                found = summarize(pl_module, max_depth=3)
                summaries.append((str(found), found.total_parameters, found.model_size))  # noqa: B023

        def look(trainer: Any, module: Any, *args: Any) -> None:
            sums.append(float(module.head.weight.data.sum()))  # noqa: B023

        timer, stop = Timer(duration=timedelta(hours=1)), EarlyStopping("val_loss", patience=0, min_delta=1e9)
        others = [LearningRateMonitor("step"), DeviceStatsMonitor(cpu_stats=False), Summary()]
        others += [GradientAccumulationScheduler({0: 1, 1: 2}), LambdaCallback(on_train_batch_end=look)]
        module = net()
        module.example_input_array = torch.zeros(2, WIDTH)
        options = {"logger": CSVLogger(root), "log_every_n_steps": 1, "max_epochs": 9}
        used = trainer(root, strategy, callbacks=[timer, stop, *others], **options)
        used.fit(module, loader(4), loader(2))
        assert timer.time_elapsed("train") > 0
        results.append((summaries, used.current_epoch, used.global_step, sorted(used.logged_metrics), sums))
    assert results[0][:4] == (results[1][0], 2, 6, results[1][3])
    assert results[0][4] == pytest.approx(results[1][4], rel=1e-4)
    assert len(results[0][4]) == 8


def test_1_12_callbacks_that_save_on_an_exception(tmp_path: Path) -> None:
    """Section 1.12 (callbacks): OnExceptionCheckpoint saves what the last step left, and fitting again begins there."""

    class Breaks(Net):
        breaks = True

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            if self.breaks and batch_idx == 3:
                raise RuntimeError("broken on purpose")
            return super().training_step(batch, batch_idx)

    results = []
    for options in (SHARDED, {**SHARDED, "state_dict_type": "full"}, None):
        root = tmp_path / str(len(results))
        for breaks in (True, False):
            module = net(Breaks)
            module.breaks = breaks
            callbacks = [OnExceptionCheckpoint(root), ModelCheckpoint(root / "kept")]
            strategy = "auto" if options is None else zinf(**options)
            used = trainer(root, strategy, callbacks=callbacks, enable_checkpointing=True)
            if breaks:
                with pytest.raises(RuntimeError, match="broken on purpose"):
                    used.fit(module, loader(6))
                assert used.global_step == 3
                assert (root / "on_exception.ckpt").exists()
            else:
                used.fit(module, loader(6))  # from that checkpoint
        assert not (root / "on_exception.ckpt").exists()  # which the callback removes at the end
        results.append((used.global_step, weights(module)))
    assert results[0][0] == results[1][0] == results[2][0] > 3
    assert_same(results[0][1], results[1][1])
    assert_close(results[0][1], results[2][1])
