"""Several calls, several Trainers, one module; exceptions in between (contract 1.9, 1.10, 1.12)."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelSummary
from lightning.pytorch.utilities.model_summary import summarize
from lightning_cases import PLACES, Net, assert_close, assert_same, block, loader, net, trainer, weights, zinf
from torch import Tensor, nn

import lightning_zinf
from lightning_zinf.engine.partition import engine_of

EVERY_PLACE = pytest.mark.parametrize("place", PLACES)


@EVERY_PLACE
def test_every_entry_point_in_a_row(tmp_path: Path, place: str) -> None:
    def run(strategy: str) -> tuple[dict[str, Tensor], list[Any]]:
        module, used = net(), trainer(tmp_path, strategy)
        results = [used.validate(module, loader(2), verbose=False)[0]["val_loss"]]
        used.fit(module, loader(), loader(2))
        results.append(used.test(module, loader(2), verbose=False)[0]["test_loss"])
        results += [float(p.sum()) for p in used.predict(module, loader(2))]
        used.fit_loop.max_epochs = 2
        used.fit(module, loader())
        results.append(used.validate(module, loader(2), verbose=False)[0]["val_loss"])
        return weights(module), results

    ours, oracle = run(place), run("auto")
    assert ours[1] == pytest.approx(oracle[1], rel=1e-4)
    assert_close(ours[0], oracle[0])


@EVERY_PLACE
def test_inference_mode_leaves_no_inference_tensors(tmp_path: Path, place: str) -> None:
    class Watch(Net):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            assert torch.is_inference_mode_enabled()
            super().validation_step(batch, batch_idx)

    module, used = net(Watch), trainer(tmp_path, place)
    used.validate(module, loader(2), verbose=False)
    assert not any(p.is_inference() for p in module.parameters())
    trainer(tmp_path, place, limit_val_batches=0).fit(module, loader(), loader(2))


@EVERY_PLACE
def test_second_trainer_reuses_the_engine_and_starts_with_fresh_moments(tmp_path: Path, place: str) -> None:
    def run(strategy: str) -> tuple[Any, Any]:
        module = net()
        trainer(tmp_path / "a", strategy).fit(module, loader())
        engine = engine_of(module)
        trainer(tmp_path / "b", strategy).fit(module, loader())
        assert engine_of(module) is engine
        return module, engine

    module, engine = run(place)
    assert engine is not None
    assert_close(weights(module), weights(run("auto")[0]))


def test_other_options_partition_the_module_anew(tmp_path: Path) -> None:
    module, oracle = net(), net()
    for place in ("device", "nvme", "host"):
        trainer(tmp_path, place).fit(module, loader())
        trainer(tmp_path, "auto").fit(oracle, loader())
        assert_close(weights(module), dict(oracle.state_dict()))


def test_optimizer_that_the_module_keeps_keeps_its_state(tmp_path: Path) -> None:
    class Keeping(Net):
        kept: Any = None

        def configure_optimizers(self) -> Any:
            self.kept = self.kept or torch.optim.AdamW(self.parameters(), lr=1e-2)
            return self.kept

    module, oracle = net(Keeping), net(Keeping)
    for place in ("nvme", "nvme", "device"):  # bound anew, still bound, taken over from another engine
        trainer(tmp_path, place).fit(module, loader())
        trainer(tmp_path, "auto").fit(oracle, loader())
    assert module.kept.state_dict()["state"][0]["step"] == 18
    assert_close(weights(module), dict(oracle.state_dict()))


def test_optimizer_that_comes_with_state(tmp_path: Path) -> None:
    oracle = net()
    plain = trainer(tmp_path, "auto")
    plain.fit(oracle, loader())
    state = copy.deepcopy(plain.optimizers[0].state_dict())

    class Loaded(Net):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.load_state_dict(copy.deepcopy(state))
            return optimizer

    results = []
    for strategy in ("nvme", "auto"):
        module = net(Loaded)
        used = trainer(tmp_path, strategy)
        used.fit(module, loader())
        assert used.optimizers[0].state_dict()["state"][0]["step"] == 12
        results.append(weights(module))
    assert_close(results[0], results[1])


@EVERY_PLACE
def test_weights_are_usable_after_fit(tmp_path: Path, place: str) -> None:
    module = net()
    trainer(tmp_path, place).fit(module, loader())
    x = next(iter(loader()))
    expected = weights(module)
    state = module.state_dict()
    assert_same(dict(state), expected)
    twin = net()
    twin.load_state_dict(state)
    twin.eval()
    with torch.no_grad():
        assert torch.equal(module.eval()(x), twin(x))
        assert torch.equal(copy.deepcopy(module)(x), twin(x))
        torch.save(module, tmp_path / "module.pt")
        assert torch.equal(torch.load(tmp_path / "module.pt", weights_only=False)(x), twin(x))
    torch.save(module.state_dict(), tmp_path / "state.pt")
    assert_same(torch.load(tmp_path / "state.pt"), expected)
    assert str(module.device) == "cpu"


def test_zinf_after_and_before_another_strategy(tmp_path: Path) -> None:
    module, oracle = net(), net()
    for ours in ("auto", "nvme", "auto"):
        trainer(tmp_path, ours).fit(module, loader())
        trainer(tmp_path, "auto").fit(oracle, loader())
    assert_close(weights(module), dict(oracle.state_dict()))


class Boom(Exception):
    pass


@EVERY_PLACE
@pytest.mark.parametrize("where", ["forward", "training_step", "on_after_backward", "validation_step"])
def test_exception_in_user_code(tmp_path: Path, place: str, where: str) -> None:
    class Failing(Net):
        fails = True

        def _boom(self, here: str, batch_idx: int) -> None:
            if self.fails and here == where and batch_idx == 1:
                raise Boom

        def forward(self, x: Tensor) -> Tensor:
            inner = self.blocks[0](x)
            self._boom("forward", self.trainer.global_step)
            return self.head(self.blocks[1](inner)) * self.scale

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            self._boom("training_step", batch_idx)
            return loss

        def on_after_backward(self) -> None:
            self._boom("on_after_backward", self.trainer.global_step)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self._boom("validation_step", batch_idx)

    def run(strategy: str) -> dict[str, Tensor]:
        module = net(Failing)
        used = trainer(tmp_path, strategy, num_sanity_val_steps=0)
        with pytest.raises(Boom):
            used.fit(module, loader(), loader(2))
        used.save_checkpoint(tmp_path / "after.ckpt")
        module.fails = False
        assert_same(torch.load(tmp_path / "after.ckpt")["state_dict"], weights(module))
        trainer(tmp_path, strategy).fit(module, loader(), loader(2))
        return weights(module)

    assert_close(run(place), run("auto"))


def test_interrupted_configure_optimizers_can_be_repeated(tmp_path: Path) -> None:
    class Closure(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1)

    module = net(Closure)
    with pytest.raises(ValueError, match=r"torch.optim.*LBFGS"):
        trainer(tmp_path, "nvme").fit(module, loader())
    oracle = net(Closure)
    trainer(tmp_path, "auto").fit(module, loader())
    trainer(tmp_path, "auto").fit(oracle, loader())
    assert_close(weights(module), dict(oracle.state_dict()))


class Configured(pl.LightningModule):
    """Builds its network in configure_model, guarded as users do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = None

    def configure_model(self) -> None:
        if self.inner is None:
            assert torch.empty(0).device.type == "cpu"
            self.inner = net()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.inner.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.inner.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@EVERY_PLACE
def test_configure_model(tmp_path: Path, place: str) -> None:
    results = []
    for strategy in (place, "auto"):
        module = Configured()
        used = trainer(tmp_path, strategy)
        used.fit(module, loader(), loader(2))
        used.validate(module, loader(2), verbose=False)
        results.append(weights(module))
    assert_close(results[0], results[1])


def test_configure_model_beyond_the_host_budget(tmp_path: Path) -> None:
    budget = lightning_zinf.MemoryConfig(host_bytes=600_000)

    class Deep(Configured):
        def configure_model(self) -> None:
            if self.inner is None:
                self.inner = net()
                self.inner.blocks.extend(block() for _ in range(10))

    results = []
    for strategy in (zinf("nvme", memory=budget), "auto"):
        module = Deep()
        used = trainer(tmp_path, strategy)
        used.validate(module, loader(2), verbose=False)
        used.fit(module, loader(), loader(2))
        results.append(weights(module))
    assert sum(v.nbytes for v in results[0].values()) > 600_000
    assert_close(results[0], results[1], 1e-4)


def test_compiled_module(tmp_path: Path) -> None:
    class Silent(Net):  # torch.compile cannot trace self.log of some Lightning versions
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.loss(batch)

    results = []
    for strategy in ("nvme", "auto"):
        module = net(Silent)
        trainer(tmp_path, strategy).fit(torch.compile(module, backend="eager"), loader())
        results.append(weights(module))
    assert_close(results[0], results[1])


def test_saving_from_a_hook_of_every_step(tmp_path: Path) -> None:
    class Saving(Net):
        def on_train_batch_end(self, *args: Any) -> None:
            self.trainer.save_checkpoint(tmp_path / "a.ckpt")

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.trainer.save_checkpoint(tmp_path / "b.ckpt")

    module, oracle = net(Saving), net(Saving)
    trainer(tmp_path, "nvme").fit(module, loader())
    assert_same(torch.load(tmp_path / "a.ckpt")["state_dict"], weights(module))
    trainer(tmp_path, "auto").fit(oracle, loader())
    assert_close(weights(module), weights(oracle))


def test_model_summary_counts_what_is_offloaded(tmp_path: Path) -> None:
    counted: list[int] = []

    class Count(ModelSummary):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            summary = summarize(pl_module)
            counted.extend((summary.total_parameters, summary.trainable_parameters))

    trainer(tmp_path, "nvme", callbacks=[Count()]).fit(net(), loader())
    assert counted == [sum(p.numel() for p in net().parameters())] * 2


def test_unfreezing_in_the_middle(tmp_path: Path) -> None:
    class Unfreeze(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.blocks.requires_grad_(False)

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.blocks.requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.blocks.parameters()), "lr": 1e-3})

    class HeadFirst(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.head.parameters(), lr=1e-2)

    results = []
    for strategy in ("nvme", "auto"):
        module = net(HeadFirst)
        trainer(tmp_path, strategy, callbacks=[Unfreeze()], max_epochs=2).fit(module, loader())
        results.append(weights(module))
    assert_close(results[0], results[1])


def test_no_parameters(tmp_path: Path) -> None:
    class Empty(pl.LightningModule):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("mean", batch.mean())

    trainer(tmp_path, "nvme").validate(Empty(), loader(2), verbose=False)


def test_options_are_announced_with_the_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    used = trainer(tmp_path, zinf("nvme", debug=True))
    with caplog.at_level("INFO"):
        used.fit(net(), loader(), loader(2))
    (plan,) = (m for m in caplog.messages if m.startswith("zinf: stage 3, 32-true"))
    assert "weights on nvme, optimizer state on nvme" in plan
    assert "exp_avg_sq" in plan
    assert any("nvme_read_bytes" in m for m in caplog.messages)


def test_engine_before_setup_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="has set up no module yet"):
        _ = lightning_zinf.ZinfStrategy().engine


def test_part_of_a_module_and_gathered(tmp_path: Path) -> None:
    module = net()
    trainer(tmp_path, "nvme").fit(module, loader())
    before = weights(module)
    assert_same(weights(module.head), {k[5:]: v for k, v in before.items() if k.startswith("head.")})
    with lightning_zinf.gathered(module, write=True), torch.no_grad():
        for parameter in module.parameters():
            assert type(parameter) is nn.Parameter
            parameter.add_(1.0)
    after = weights(module)
    assert_same(after, {k: v if k == "scale" else v + 1.0 for k, v in before.items()})
    with lightning_zinf.gathered(module.head.bias):
        assert float(module.head.bias) == float(after["head.bias"])
    assert lightning_zinf.full_state_dict(net()).keys() == after.keys()


@EVERY_PLACE
def test_a_module_that_nobody_keeps_is_given_back(tmp_path: Path, place: str) -> None:
    """As in a search or a cross-validation: its memory, its threads and its room on the disk."""

    def once() -> list[weakref.ref[Any]]:
        module, used = net(), trainer(tmp_path, place)
        used.fit(module, loader(2))
        return [weakref.ref(o) for o in (module, used.strategy, used.strategy.engine, used.optimizers[0])]

    once()
    gc.collect()
    files = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        refs = once()
        gc.collect()
        assert [ref() for ref in refs] == [None] * len(refs)
    assert len(list(Path("/proc/self/fd").iterdir())) == files
