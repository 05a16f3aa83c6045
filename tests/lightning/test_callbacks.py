"""Callbacks that average, freeze and prune (contract 1.12)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, EMAWeightAveraging, ModelPruning, WeightAveraging
from lightning.pytorch.callbacks import StochasticWeightAveraging as SWA
from lightning_cases import PLACES, Net, assert_close, assert_same, loader, net, trainer, weights
from torch import Tensor, nn

import lightning_zinf

EVERY_PLACE = pytest.mark.parametrize("place", PLACES)


class Averaged(Net):
    """Has a running statistic, and keeps what validation saw."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.seen: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)  # the same bits as torch's

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.seen.append(weights(self))


def averaged(root: Path, strategy: str, callback: Any, **options: Any) -> tuple[Any, Any]:
    module = net(Averaged)
    used = trainer(root, strategy, callbacks=[callback], max_epochs=2, num_sanity_val_steps=0, **options)
    used.fit(module, loader(6), loader(2))
    return module, used


WHEN: dict[str, dict[str, Any]] = {
    "every-step": {},
    "every-second-step": {"update_every_n_steps": 2},
    "later": {"update_starting_at_step": 3},
    "epochs": {"update_every_n_steps": 0, "update_starting_at_epoch": 0},
}


@EVERY_PLACE
@pytest.mark.parametrize("when", WHEN)
def test_ema_is_lightnings(when: str, place: str, tmp_path: Path) -> None:
    """Validation sees the same bits, and so is what is left at the end."""
    ours, _ = averaged(tmp_path, place, lightning_zinf.ZinfEMA(0.8, **WHEN[when]), accumulate_grad_batches=2)
    theirs, _ = averaged(tmp_path, "auto", EMAWeightAveraging(decay=0.8, **WHEN[when]), accumulate_grad_batches=2)
    assert_same(weights(ours), dict(theirs.state_dict()))
    assert len(ours.seen) == len(theirs.seen) == 2
    first = 1 if when in ("later", "epochs") else 0  # before there is an average we validate with the weights
    for mine, other in zip(ours.seen[first:], theirs.seen[first:], strict=True):
        assert_same(mine, other)


@EVERY_PLACE
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_ema_resumes(precision: Any, place: str, tmp_path: Path) -> None:
    whole, _ = averaged(tmp_path, place, lightning_zinf.ZinfEMA(0.8), precision=precision)
    first = net(Averaged)
    used = trainer(tmp_path, place, callbacks=[lightning_zinf.ZinfEMA(0.8)], precision=precision, max_epochs=1)

    class Saves(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "ema.ckpt")

    used.callbacks.append(Saves())
    used.fit(first, loader(6))
    saved = torch.load(tmp_path / "ema.ckpt", weights_only=True)
    assert not torch.equal(saved["state_dict"]["head.weight"], saved["current_model_state"]["head.weight"])
    assert_same(weights(first), saved["state_dict"])
    second = net(Averaged)
    used = trainer(tmp_path, place, callbacks=[lightning_zinf.ZinfEMA(0.8)], precision=precision, max_epochs=2)
    used.fit(second, loader(6), ckpt_path=tmp_path / "ema.ckpt")
    assert_same(weights(second), weights(whole))


def test_ema_from_lightnings_checkpoint(tmp_path: Path) -> None:
    class Saves(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "theirs.ckpt")

    module = net(Averaged)
    used = trainer(tmp_path, "auto", callbacks=[EMAWeightAveraging(decay=0.8), Saves()], max_epochs=2)
    used.fit(module, loader(6))
    resumed = net(Averaged)
    used = trainer(tmp_path, "nvme", callbacks=[lightning_zinf.ZinfEMA(0.8)], max_epochs=2)
    used.fit(resumed, loader(6), ckpt_path=tmp_path / "theirs.ckpt")
    assert_same(weights(resumed), dict(module.state_dict()))


def test_ema_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="decay must be from 0 to 1, got 2"):
        lightning_zinf.ZinfEMA(2)
    with pytest.raises(ValueError, match=r"ZinfEMA needs Trainer\(strategy='zinf'\).*SingleDeviceStrategy"):
        trainer(tmp_path, "auto", callbacks=[lightning_zinf.ZinfEMA()]).fit(net(), loader())


class WithBackbone(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.blocks

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01, momentum=0.9)


def finetuned(root: Path, strategy: str, path: Path | None = None, epochs: int = 3) -> tuple[Any, Any]:
    module = net(WithBackbone)
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)
    used = trainer(root, strategy, callbacks=[callback], max_epochs=epochs)
    used.fit(module, loader(4), ckpt_path=path)
    return module, used


@EVERY_PLACE
def test_backbone_finetuning(place: str, tmp_path: Path) -> None:
    """The backbone is frozen at first, and joins the optimizer in the second epoch."""
    ours, _ = finetuned(tmp_path, place)
    theirs, _ = finetuned(tmp_path, "auto")
    assert_close(weights(ours), dict(theirs.state_dict()), 0.0)
    start = dict(net(WithBackbone).state_dict())
    assert not torch.equal(weights(ours)["blocks.0.0.weight"], start["blocks.0.0.weight"])


@EVERY_PLACE
def test_backbone_finetuning_resumes(place: str, tmp_path: Path) -> None:
    """As Lightning itself does it, which leaves the backbone frozen."""
    _, used = finetuned(tmp_path, place, epochs=2)
    used.save_checkpoint(tmp_path / "two.ckpt")
    ours, _ = finetuned(tmp_path, place, tmp_path / "two.ckpt", epochs=4)
    theirs, _ = finetuned(tmp_path, "auto", tmp_path / "two.ckpt", epochs=4)
    assert_same(weights(ours), dict(theirs.state_dict()))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: SWA(1e-3), "StochasticWeightAveraging: it averages whole copies"),
        (lambda: EMAWeightAveraging(), "EMAWeightAveraging: .* use lightning_zinf.ZinfEMA"),
        (lambda: WeightAveraging(), "WeightAveraging: .* use lightning_zinf.ZinfEMA"),
        (lambda: ModelPruning("l1_unstructured", amount=0.5), "ModelPruning: .* prune before or after"),
    ],
)
def test_refused_by_name(callback: Any, message: str, tmp_path: Path) -> None:
    module = net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, "zinf", callbacks=[callback()]).fit(module, loader())
    assert_same(dict(module.state_dict()), before)
