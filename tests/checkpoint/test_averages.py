"""Averages of the weights in sharded checkpoints: read as those of whole ones are, whenever they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning_cases import assert_same, loader, net, trainer
from sharded_cases import Model, strategy
from torch import Tensor, nn

import lightning_zinf


class Counts(Model):
    """A buffer that is not saved, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.head_norm = nn.BatchNorm1d(1)
        self.register_buffer("hidden", torch.tensor(1.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.hidden += 1
        return self.head_norm(super().forward(x))


class Saves(Callback):
    """Saves both kinds in the middle of an epoch, during validation and after training."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def save(self, trainer: Any, when: str) -> None:
        for kind in ("full", "sharded"):
            trainer.strategy.state_dict_type = kind
            trainer.save_checkpoint(self.folder / f"{when}-{kind}.ckpt")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0 and batch_idx == 2:
            self.save(trainer, "middle")

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and trainer.current_epoch == 0 and not trainer.sanity_checking:
            self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            self.save(trainer, "epoch")


def fit(folder: Path, epochs: int, path: Any = None, saves: bool = False, average: bool = True) -> tuple[Any, Any]:
    callbacks: list[Any] = [lightning_zinf.ZinfEMA(0.8)] * average + [Saves(folder)] * saves
    model = net(Counts)
    used = trainer(folder, strategy("nvme"), precision="bf16-mixed", max_epochs=epochs, callbacks=callbacks)
    used.fit(model, loader(6), loader(2, seed=1), ckpt_path=path)
    return model, used


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    _, used = fit(folder, 1, saves=True)
    Saves(folder).save(used, "end")
    return folder


@pytest.mark.parametrize("when", ["middle", "validation", "epoch", "end"])
@pytest.mark.parametrize("with_callback", [False, True])
def test_testing_uses_the_average(saved: Path, tmp_path: Path, when: str, with_callback: bool) -> None:
    states, scores = [], []
    for kind in ("full", "sharded"):
        model = net(Counts)
        callbacks = [lightning_zinf.ZinfEMA(0.8)] if with_callback else []
        used = trainer(tmp_path, strategy("none"), callbacks=callbacks)
        scores.append(used.test(model, loader(2), ckpt_path=saved / f"{when}-{kind}.ckpt", verbose=False))
        states.append(lightning_zinf.full_state_dict(model))
    assert_same(states[1], states[0])
    assert scores[0] == scores[1]
    whole = torch.load(saved / f"{when}-full.ckpt", weights_only=True)
    assert_same(states[1], dict(whole["state_dict"]))
    assert not torch.equal(whole["current_model_state"]["head.weight"], states[1]["head.weight"])


@pytest.mark.parametrize("when", ["epoch", "end"])
def test_training_goes_on_from_the_weights(saved: Path, tmp_path: Path, when: str) -> None:
    uninterrupted, _ = fit(tmp_path, 2)
    expected = lightning_zinf.full_state_dict(uninterrupted)
    for kind in ("full", "sharded"):
        resumed, _ = fit(tmp_path, 2, saved / f"{when}-{kind}.ckpt")
        assert_same(lightning_zinf.full_state_dict(resumed), expected)


def test_training_without_the_callback_goes_on_from_the_average(saved: Path, tmp_path: Path) -> None:
    found = [
        lightning_zinf.full_state_dict(fit(tmp_path, 2, saved / f"epoch-{kind}.ckpt", average=False)[0])
        for kind in ("full", "sharded")
    ]
    assert_same(*found)
