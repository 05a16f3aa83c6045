"""Lightning's contract with a strategy, section by section, in one process: sections 1.1 to 1.6.

Every section has a test named for it, of the claims that no other test is about; its docstring says where the others
are tested. Sections 1.7 to 1.12 are in ``test_contract_sections_later.py``, and what needs
two ranks in ``tests/distributed/test_contract_sections_on_ranks.py``.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import lightning.pytorch.strategies.ddp as lightning_ddp
import lightning.pytorch.strategies.strategy as lightning_strategy
import pytest
import pytorch_lightning as old
import torch
import torchmetrics
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import grad_norm
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_cases import PLACES, WIDTH, Net, assert_close, assert_same, loader, net, trainer, weights, zinf
from torch import Tensor

import lightning_zinf
import lightning_zinf.lightning
import lightning_zinf.pl
from lightning_zinf import _compat

EVERY_PLACE = pytest.mark.parametrize("place", PLACES)
SHARDED = {"offload_params": "nvme", "offload_optimizer": "nvme", "state_dict_type": "sharded"}
HOMES = {"new": (pl, lightning_zinf.lightning), "old": (old, lightning_zinf.pl)}

# ---------------------------------------------------------------------- 1.1


def test_1_01_two_namespaces() -> None:
    """Section 1.1 (two namespaces): a strategy of one package is refused by the other's Trainer, which names it; the
    engine, formats and tools import neither; what is written into checkpoints has one name in both.

    Also test_registration.py (homes, pickling, the package in use is taken, training in both), test_cli.py
    (``class_path`` in both) and test_both_packages_train_to_the_same_bits.
    """
    for package, foreign in ((pl, lightning_zinf.pl), (old, lightning_zinf.lightning)):
        with pytest.raises(ValueError, match=rf"invalid strategy name: .*{foreign.__name__}\.ZinfStrategy"):
            package.Trainer(strategy=foreign.ZinfStrategy(), accelerator="cpu", logger=False)
    for name in lightning_zinf.lightning.__all__:
        ours, theirs = getattr(lightning_zinf.lightning, name), getattr(lightning_zinf.pl, name)
        assert ours is not theirs
        assert ours.__qualname__ == theirs.__qualname__ == name
    script = """
import importlib, pkgutil, sys, lightning_zinf
face = {"strategy", "strategy_ranks", "strategy_checkpoints", "precision", "lightning", "pl", "callbacks"}
names = [m.name for m in pkgutil.walk_packages(lightning_zinf.__path__, "lightning_zinf.")]
for name in names:
    if name.split(".")[1] not in face:
        importlib.import_module(name)
assert "lightning_zinf.engine.engine" in sys.modules
print([m for m in sys.modules if m.split(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def in_package(which: str, root: Path, kind: str, epochs: int, path: Path | None = None) -> tuple[Any, Any]:
    """Fit in one of the packages with everything that is written into checkpoints by a name: scaler and average."""
    package, home = HOMES[which]

    class Model(package.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(WIDTH, WIDTH)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layer(batch).pow(2).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

        def on_train_epoch_end(self) -> None:
            if path is None and self.current_epoch == 0:
                self.trainer.save_checkpoint(root / "one.ckpt")

    torch.manual_seed(0)
    module = Model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    used = package.Trainer(
        strategy=home.ZinfStrategy(**{**SHARDED, "state_dict_type": kind}),
        plugins=[package.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        callbacks=[home.ZinfEMA(0.8)],
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    used.fit(module, loader(4), ckpt_path=path)
    return weights(module), used.scaler.state_dict()


@pytest.mark.parametrize("kind", ["full", "sharded"])
@pytest.mark.parametrize(("saved", "resumed"), [("new", "old"), ("old", "new")])
def test_1_01_two_namespaces_resume_each_other(saved: str, resumed: str, kind: str, tmp_path: Path) -> None:
    """Section 1.1 (two namespaces): precision state and callback state are found under the same names."""
    whole, scale = in_package(saved, tmp_path, kind, 2)
    assert scale["scale"] != 1024.0
    again, scale_again = in_package(resumed, tmp_path, kind, 2, tmp_path / "one.ckpt")
    assert_same(again, whole)
    assert scale_again == scale


# ---------------------------------------------------------------------- 1.2


def test_1_02_base_class(tmp_path: Path) -> None:
    """Section 1.2 (base class): a DDPStrategy, so what Lightning decides by class is decided as for DDP; what of DDP
    would wrap or move the module is overridden; the connector sets attributes and no constructor argument.

    Also test_sampler_is_distributed, test_metrics_logs_and_collectives_within_steps_as_ddp (``sync_dist``),
    test_compiled_module and test_compiled, test_base_class_registers_nothing_else.
    """
    used = trainer(tmp_path, "zinf", devices=2, num_nodes=3)
    strategy = used.strategy
    assert used._accelerator_connector.is_distributed
    assert used.distributed_sampler_kwargs == {"num_replicas": 6, "rank": 0}
    assert used.world_size == 6
    assert not torch.distributed.is_initialized()
    assert strategy.parallel_devices == [torch.device("cpu")] * 2
    assert strategy.num_nodes == 3
    assert strategy.accelerator is used.accelerator
    assert isinstance(strategy.cluster_environment, LightningEnvironment)
    assert trainer(tmp_path, "zinf", sync_batchnorm=True).strategy._layer_sync is not None
    ours = {n for kind in type(strategy).__mro__ if kind.__module__.startswith("lightning_zinf") for n in vars(kind)}
    assert {"setup", "model_to_device", "teardown", "on_exception", "register_strategies"} <= ours
    error = RuntimeError("Expected to have finished reduction in the prior iteration before starting a new one.")
    strategy.on_exception(error)
    assert "find_unused_parameters" not in str(error)
    arguments = set(inspect.signature(lightning_zinf.ZinfStrategy.__init__).parameters)
    assert not arguments & {"accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "kwargs"}
    registry = _StrategyRegistry()
    type(strategy).register_strategies(registry)
    assert [name for name in registry if name != name.lower()] == []
    assert trainer(tmp_path, "ZINF_Stage_2").strategy.stage == 2


# ---------------------------------------------------------------------- 1.3

TRACED = (  # noqa: SIM905
    "set_world_ranks _configure_launcher connect setup_environment tensor_init_context model_sharded_context setup "
    "model_to_device setup_optimizers setup_precision_plugin load_checkpoint load_model_state_dict "
    "load_optimizer_state_dict batch_to_device on_validation_start validation_step on_validation_end "
    "block_backward_sync training_step backward pre_backward post_backward optimizer_step reduce_boolean_decision "
    "lightning_module_state_dict optimizer_state save_checkpoint test_step on_train_end teardown"
).split()
HOOKS = (  # noqa: SIM905
    "setup configure_model configure_optimizers on_fit_start on_load_checkpoint training_step optimizer_zero_grad "
    "on_before_backward backward on_after_backward optimizer_step on_before_optimizer_step "
    "configure_gradient_clipping on_save_checkpoint on_train_end on_fit_end"
).split()


def recording(kind: type, names: list[str], prefix: str, calls: list[str]) -> type:
    """Make a subclass that writes down which of its methods are called."""

    def record(name: str) -> Any:
        method = getattr(kind, name)

        def called(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(prefix + name)
            return method(self, *args, **kwargs)

        return called

    return type(kind.__name__, (kind,), {name: record(name) for name in names})


BEGIN = "connect setup_environment .setup tensor_init_context model_sharded_context .configure_model setup "
BEGIN += "model_to_device"
FIT = f"{BEGIN} setup_optimizers .configure_optimizers setup_precision_plugin .on_fit_start"
VALIDATE = "on_validation_start batch_to_device validation_step on_validation_end"
FORWARD = "training_step .training_step"
BACKWARD = "backward pre_backward .on_before_backward .backward .on_after_backward post_backward"
SAVE = "lightning_module_state_dict optimizer_state .on_save_checkpoint save_checkpoint"


def test_1_03_call_order(tmp_path: Path) -> None:
    """Section 1.3 (call order): what Lightning calls, in its order, and in between our own calls at their places.

    ``zero_grad`` comes between the first forward and backward, ``configure_optimizers`` before the module is cut,
    a checkpoint is loaded after setup, and ``teardown`` comes before ``on_fit_end`` and before saving.

    Also test_every_entry_point_in_a_row and test_checkpoint_saved_after_teardown.
    """
    calls: list[str] = []
    module = net(recording(Net, HOOKS, ".", calls))
    strategy = recording(lightning_zinf.ZinfStrategy, TRACED, "", calls)

    def expect(*parts: str) -> None:
        assert calls == " ".join(parts).split()
        calls.clear()

    def build(epochs: int) -> pl.Trainer:
        options = {"max_epochs": epochs, "limit_val_batches": 1, "enable_checkpointing": True, "gradient_clip_val": 1.0}
        return trainer(tmp_path, strategy(), accumulate_grad_batches=2, **options)

    used = build(1)
    expect("set_world_ranks _configure_launcher")
    used.fit(module, loader(2), loader(1))
    begin = FIT.replace("setup_environment", "setup_environment set_world_ranks")
    first = f"batch_to_device block_backward_sync {FORWARD} .optimizer_zero_grad {BACKWARD}"
    last = f"batch_to_device .optimizer_step optimizer_step {FORWARD} {BACKWARD} .on_before_optimizer_step "
    last += ".configure_gradient_clipping"
    end = ".on_train_end on_train_end teardown .on_fit_end"
    expect(begin, VALIDATE, first, last, VALIDATE, "reduce_boolean_decision", SAVE, end)
    used.save_checkpoint(tmp_path / "a.ckpt")
    expect(SAVE)
    used.test(module, loader(1), verbose=False)
    begin = BEGIN.replace("setup_environment", "setup_environment set_world_ranks")
    expect(begin, "setup_precision_plugin batch_to_device test_step teardown")
    again = build(1)
    calls.clear()
    again.fit(module, loader(2), ckpt_path=tmp_path / "a.ckpt")  # which has trained its one epoch
    begin = FIT.replace("setup_environment", "setup_environment set_world_ranks")
    load = "load_checkpoint .on_load_checkpoint load_model_state_dict load_optimizer_state_dict"
    assert " ".join(calls).startswith(f"{begin} {load}")


# ---------------------------------------------------------------------- 1.4


def test_1_04_method_by_method(tmp_path: Path) -> None:
    """Section 1.4 (method by method): process group backends, where tensors are made, what moves to the device, no
    wrapper, and getters that hold no copy of the weights.

    Also test_checkpoint_io_plugin_is_used, test_top_k_and_last, test_clipping, test_manual_optimization,
    test_own_backward_and_optimizer_step_are_honoured, test_several_processes_get_a_launcher_and_one_gets_none, and
    for ranks test_1_04_method_by_method_on_ranks.
    """
    strategy = lightning_zinf.ZinfStrategy()
    strategy.cluster_environment = LightningEnvironment()
    for device, asked, expected in (
        ("cpu", None, "gloo"),
        ("cuda:0", None, "cpu:gloo,cuda:nccl"),
        ("cuda:0", "nccl", "nccl"),
    ):
        strategy.parallel_devices = [torch.device(device)]
        strategy._process_group_backend = asked
        assert strategy._get_process_group_backend() == expected
    with strategy.tensor_init_context():  # the root device is CUDA
        assert torch.empty(0).device.type == "cpu"
    assert not strategy.handles_gradient_accumulation
    assert strategy.restore_checkpoint_after_setup
    assert strategy.lightning_restore_optimizer  # state goes where it lives, through load_optimizer_state_dict

    class Metered(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torchmetrics.MeanMetric()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            assert self.trainer.strategy.model is self
            return super().training_step(batch, batch_idx)

    module = net(Metered)
    used = trainer(tmp_path, zinf(**SHARDED))
    used.fit(module, loader(2))
    state = used.strategy.lightning_module_state_dict()
    assert list(state) == list(net().state_dict())  # no prefix of a wrapper
    assert {name for name, value in state.items() if not value.is_meta} == {"scale"}
    assert {
        name for entry in used.strategy.optimizer_state(used.optimizers[0])["state"].values() for name in entry
    } == {"step"}
    _compat.move_all_but_parameters(module, torch.device("meta"))
    assert module.scale.is_meta
    assert module.mean.mean_value.is_meta
    assert not any(p.is_meta for p in module.parameters())


# ---------------------------------------------------------------------- 1.5


def test_1_05_traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 1.5 (traps of a sharding strategy): nothing moves the state of optimizers, the user's optimizer stays
    itself and schedulers keep it, fitting again starts with new optimizers, released parameters keep their shape and
    take a state dict, and the batch size finder's refusal is Lightning's own.

    By number, also: 1 test_prediction_of_a_remainder, test_streams_of_different_lengths_in_validation_and_prediction;
    2 test_inference_mode_leaves_no_inference_tensors; 3 test_param_groups_and_frozen_parameters,
    test_model_summary_counts_what_is_offloaded; 5 test_second_trainer_reuses_the_engine_and_starts_with_fresh_moments;
    7 test_no_optimizer; 8 test_gan_with_toggled_optimizers_as_ddp; 9 test_an_exception_on_one_rank_reaches_all;
    10 test_on_exception; 11 test_training_step_may_return_none; 12 test_parameters_that_only_one_rank_uses_as_ddp;
    13 test_supported; 14 test_learning_rate_finder, test_load_into_a_stepped_engine_again_and_again. For 2, 9, 10 and
    11 on ranks see test_1_05_traps_*_on_ranks.
    """

    def moved(*args: Any) -> None:
        raise AssertionError("optimizer state was moved")

    for module in (lightning_ddp, lightning_strategy):
        for name in ("_optimizers_to_device", "_optimizer_to_device"):
            monkeypatch.setattr(module, name, moved, raising=False)

    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            self.made = super().configure_optimizers()
            self.schedule = torch.optim.lr_scheduler.StepLR(self.made, 1)
            return [self.made], [self.schedule]

    model = net(Scheduled)
    used = trainer(tmp_path, "nvme")
    used.fit(model, loader(2))
    first = model.made
    assert used.strategy.optimizers == [first]
    assert model.schedule.optimizer is first
    assert isinstance(first, torch.optim.AdamW)
    assert type(model.optimizers()).__mro__[1].__name__ == "LightningOptimizer"
    used.save_checkpoint(tmp_path / "a.ckpt")
    used.fit_loop.max_epochs = 2
    used.fit(model, loader(2), ckpt_path=tmp_path / "a.ckpt")
    assert model.made is not first
    assert used.strategy.optimizers == [model.made]
    for name, param in model.named_parameters():
        assert type(param).__name__ == "ReleasedParameter"
        assert (param.shape, param.ndim) == (net().get_parameter(name).shape, net().get_parameter(name).ndim)
    model.load_state_dict(net().state_dict())
    assert_same(weights(model), dict(net().state_dict()))
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
        model.load_state_dict({**net().state_dict(), "head.weight": torch.zeros(2, WIDTH)})

    class Sized(Net):
        batch_size = 2

        def train_dataloader(self) -> Any:
            return loader()

    with pytest.raises(ValueError, match="batch size is currently not supported with distributed strategies"):
        Tuner(trainer(tmp_path, "zinf")).scale_batch_size(net(Sized), max_trials=1)


# ---------------------------------------------------------------------- 1.6


@EVERY_PLACE
def test_1_06_precision_and_clipping(tmp_path: Path, place: str) -> None:
    """Section 1.6 (precision plugin and clipping): user code that reads or clips ``p.grad`` in hooks does what it does
    in the plain Trainer, and so does ``strategy.clip_grad_norm_`` in manual optimization.

    Also test_precision.py (plugins, scalers, both algorithms, overrides, several optimizers, scaler state),
    test_user_code_that_uses_them_raises and test_gradients_are_guarded (where gradients are elsewhere),
    test_clipping_as_ddp, and for ranks test_1_06_overflow_on_one_rank.
    """
    seen: dict[str, list[float]] = {"ours": [], "plain": []}

    class Clips(Net):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen[self.run].append(float(grad_norm(self, 2)["grad_2.0_norm_total"]))
            seen[self.run].append(float(torch.nn.utils.clip_grad_norm_(self.parameters(), 0.05)))

    class ByHand(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            if self.run == "ours":
                seen[self.run].append(self.trainer.strategy.clip_grad_norm_(0.05))
            else:
                seen[self.run].append(float(torch.nn.utils.clip_grad_norm_(self.parameters(), 0.05)))
            optimizer.step()

    for kind in (Clips, ByHand):
        results = []
        for run, strategy in (("ours", place), ("plain", "auto")):
            module = net(kind)
            module.run = run
            trainer(tmp_path, strategy).fit(module, loader(3))
            results.append(weights(module))
        assert_close(*results)
    assert seen["ours"] == pytest.approx(seen["plain"], rel=1e-5)
    assert len(seen["ours"]) == 9
    assert min(seen["plain"]) > 0.05
    module = net(ByHand)
    with pytest.raises(MisconfigurationException, match="gradient clipping is not supported for manual optimization"):
        trainer(tmp_path, place, gradient_clip_val=1.0).fit(module, loader(2))
