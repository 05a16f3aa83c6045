"""Training loops: numbers of the plain Trainer, accumulation, schedulers, manual optimization (contract 1.3 to 1.7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.tuner import Tuner
from lightning_cases import PLACES, Net, assert_close, assert_same, loader, net, trainer, weights, zinf
from torch import Tensor, nn

EVERY_PLACE = pytest.mark.parametrize("place", PLACES)


def fitted(root: Path, strategy: Any, kind: type[Net] = Net, **options: Any) -> Any:
    """Fit a model and return it with its Trainer."""
    module = net(kind)
    batches = options.pop("batches", 6)
    used = trainer(root, strategy, **options)
    used.fit(module, loader(batches), loader(2, seed=1))
    return module, used


@EVERY_PLACE
def test_trains_as_the_plain_trainer(tmp_path: Path, place: str) -> None:
    module, ours = fitted(tmp_path, place, max_epochs=2)
    oracle, theirs = fitted(tmp_path, "auto", max_epochs=2)
    assert_close(weights(module), oracle.state_dict())
    assert ours.global_step == theirs.global_step == 12
    assert ours.callback_metrics.keys() == theirs.callback_metrics.keys()
    for name, value in theirs.callback_metrics.items():
        torch.testing.assert_close(ours.callback_metrics[name], value, atol=1e-3, rtol=1e-5)


def test_every_place_gives_the_same_bits(tmp_path: Path) -> None:
    results = [weights(fitted(tmp_path, place, max_epochs=2, gradient_clip_val=0.5)[0]) for place in PLACES]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_shuffles_as_the_plain_trainer(tmp_path: Path) -> None:
    seen: dict[str, list[Tensor]] = {}

    class Watching(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            seen[self.name].append(batch)
            return super().training_step(batch, batch_idx)

    for strategy in ("auto", "zinf"):
        module = net(Watching)
        module.name = strategy
        seen[strategy] = []
        torch.manual_seed(7)
        trainer(tmp_path, strategy).fit(module, loader(shuffle=True))
    assert all(torch.equal(a, b) for a, b in zip(seen["auto"], seen["zinf"], strict=True))


@EVERY_PLACE
def test_accumulation_steps_on_the_tail(tmp_path: Path, place: str) -> None:
    module, ours = fitted(tmp_path, place, accumulate_grad_batches=2, batches=5, max_epochs=2)
    oracle, theirs = fitted(tmp_path, "auto", accumulate_grad_batches=2, batches=5, max_epochs=2)
    assert ours.global_step == theirs.global_step == 6
    assert_close(weights(module), oracle.state_dict())


def test_accumulation_may_change_between_epochs(tmp_path: Path) -> None:
    results = []
    for strategy in ("nvme", "auto"):
        changing = GradientAccumulationScheduler(scheduling={0: 1, 1: 3})
        module, used = fitted(tmp_path, strategy, callbacks=[changing], max_epochs=2)
        results.append((weights(module), used.global_step))
    assert results[0][1] == results[1][1] == 8
    assert_close(results[0][0], results[1][0])


class Scheduled(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class OnPlateau(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


@pytest.mark.filterwarnings("error:Detected call of")
@pytest.mark.parametrize("kind", [Scheduled, OnPlateau])
def test_schedulers(tmp_path: Path, kind: type[Net]) -> None:
    results = []
    for strategy in ("nvme", "auto"):
        module, used = fitted(tmp_path, strategy, kind, max_epochs=3)
        lr = used.optimizers[0].param_groups[0]["lr"]
        assert lr != 1e-2
        results.append((weights(module), lr))
    assert results[0][1] == results[1][1]
    assert_close(results[0][0], results[1][0])


class Skipping(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 2 else loss


@EVERY_PLACE
def test_training_step_may_return_none(tmp_path: Path, place: str) -> None:
    module, ours = fitted(tmp_path, place, Skipping)
    oracle, theirs = fitted(tmp_path, "auto", Skipping)
    assert ours.global_step == theirs.global_step
    assert_close(weights(module), oracle.state_dict())


class Manual(Net):
    """Two optimizers that take turns, with toggling, two backwards a step and a step within the training step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        with first.toggle_model():
            loss = self.loss(batch)
            first.zero_grad()
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(loss)
            first.step()
        self.toggle_optimizer(second)
        second.zero_grad()
        self.manual_backward(self.loss(batch))
        if batch_idx % 2:
            self.clip_gradients(second, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            second.step()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.blocks.parameters(), lr=1e-2),
            torch.optim.Adam(self.head.parameters(), lr=1e-2),
        ]


@EVERY_PLACE
def test_manual_optimization(tmp_path: Path, place: str) -> None:
    module, ours = fitted(tmp_path, place, Manual, max_epochs=2)
    oracle, theirs = fitted(tmp_path, "auto", Manual, max_epochs=2)
    assert ours.global_step == theirs.global_step == 18
    assert_close(weights(module), oracle.state_dict())


class ZeroedByTheModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.zero_grad()
        self.manual_backward(self.loss(batch))
        self.optimizers().step()


@EVERY_PLACE
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_zeroed_by_the_module(tmp_path: Path, place: str, precision: Any) -> None:
    module, _ = fitted(tmp_path, place, ZeroedByTheModule, precision=precision)
    oracle, _ = fitted(tmp_path, "auto", ZeroedByTheModule, precision=precision)
    assert_close(weights(module), oracle.state_dict(), 1e-5 if precision == "32-true" else 1e-2)


class WithClosure(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        loss = optimizer.step(closure=closure)
        assert loss.requires_grad


def test_manual_optimization_with_a_closure(tmp_path: Path) -> None:
    module, _ = fitted(tmp_path, "nvme", WithClosure)
    oracle, _ = fitted(tmp_path, "auto", WithClosure)
    assert_close(weights(module), oracle.state_dict())


class NoOptimizer(Net):
    def configure_optimizers(self) -> Any:
        return None


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_no_optimizer(tmp_path: Path) -> None:
    module, _ = fitted(tmp_path, "nvme", NoOptimizer, gradient_clip_val=0.1)
    assert_same(weights(module), weights(net()))


class Grouped(Net):
    """Weight decay by the number of dimensions, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.5},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "lr": 2e-2},
        ]
        return torch.optim.AdamW(groups, lr=1e-2)


@EVERY_PLACE
def test_param_groups_and_frozen_parameters(tmp_path: Path, place: str) -> None:
    module, _ = fitted(tmp_path, place, Grouped)
    oracle, _ = fitted(tmp_path, "auto", Grouped)
    assert_close(weights(module), oracle.state_dict())
    assert torch.equal(weights(module)["head.weight"], net(Grouped).head.weight)


@EVERY_PLACE
def test_hooks_see_weights_and_gradients(tmp_path: Path, place: str) -> None:
    seen: list[float] = []

    class Watch(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            seen.append(float(pl_module.head.weight.sum()))

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append(float(pl_module.blocks[0][0].weight.grad.sum()))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            with torch.no_grad():
                pl_module.head.bias.add_(1.0)

    module, _ = fitted(tmp_path, place, callbacks=[Watch()])
    ours, seen = seen, []
    oracle, _ = fitted(tmp_path, "auto", callbacks=[Watch()])
    assert ours == pytest.approx(seen, rel=1e-4, abs=1e-5)
    assert_close(weights(module), oracle.state_dict())


def test_own_backward_and_optimizer_step_are_honoured(tmp_path: Path) -> None:
    calls: list[str] = []

    class Own(Net):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            calls.append("backward")
            (loss * 2).backward(*args, **kwargs)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            calls.append("step")
            optimizer.step(closure=optimizer_closure)

    module, _ = fitted(tmp_path, "nvme", Own)
    assert calls[:4] == ["step", "backward", "step", "backward"]
    oracle, _ = fitted(tmp_path, "auto", Own)
    assert_close(weights(module), oracle.state_dict())


def test_learning_rate_finder(tmp_path: Path) -> None:
    results = []
    for strategy in ("nvme", "auto"):
        module = net()
        used = trainer(tmp_path, strategy, max_epochs=10)
        found = Tuner(used).lr_find(module, loader(40), num_training=30)
        results.append((found.results["loss"], weights(module)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-3)
    assert_same(results[0][1], dict(net().state_dict()))


def test_batch_norm_and_sync_batchnorm(tmp_path: Path) -> None:
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks.append(nn.BatchNorm1d(130))

    module, _ = fitted(tmp_path, "nvme", Normed, sync_batchnorm=True)
    oracle, _ = fitted(tmp_path, "auto", Normed)
    assert_close(weights(module), oracle.state_dict())


def test_several_processes_get_a_launcher_and_one_gets_none(tmp_path: Path) -> None:
    assert trainer(tmp_path, "zinf").strategy.launcher is None
    assert trainer(tmp_path, "zinf", devices=2).strategy.launcher is not None
    for name in ("zinf_spawn", "zinf_notebook"):
        assert trainer(tmp_path, name, devices=2).strategy.launcher.is_interactive_compatible == (
            name == "zinf_notebook"
        )


def test_shard_size_must_be_a_number_of_ranks() -> None:
    with pytest.raises(ValueError, match="shard_size must be a positive number"):
        zinf("device", shard_size=0)


def test_one_process_has_no_launcher_and_no_process_group(tmp_path: Path) -> None:
    class Collective(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            assert self.trainer.world_size == 1
            assert torch.equal(self.all_gather(batch), batch)
            assert self.trainer.strategy.broadcast({"a": 1}) == {"a": 1}
            assert self.trainer.strategy.reduce_boolean_decision(True)
            assert self.trainer.distributed_sampler_kwargs == {"num_replicas": 1, "rank": 0}
            self.trainer.strategy.barrier("here")
            self.log("mean", float(batch_idx), sync_dist=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    _, used = fitted(tmp_path, zinf("nvme"), Collective)
    assert used.strategy.launcher is None
    assert not torch.distributed.is_initialized()
    assert used.callback_metrics["mean_epoch"] == 2.5
