"""Loops of the user's own that zero gradients, or do not, and Lightning's, which does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning_cases import PLACES, Net, assert_close, loader, net, trainer, weights
from torch import Tensor

from lightning_zinf.engine.guard import KeptGradient

EVERY_PLACE = pytest.mark.parametrize("place", PLACES)


def fitted(root: Path, strategy: Any, kind: type[Net], **options: Any) -> Any:
    module = net(kind)
    trainer(root, strategy, **options).fit(module, loader())
    return module


class NeverZeroed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        self.optimizers().step()


class NeverZeroedByLightning(Net):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        pass


@pytest.mark.parametrize("kind", [NeverZeroed, NeverZeroedByLightning])
@EVERY_PLACE
def test_gradients_that_are_not_zeroed(place: str, kind: type[Net], tmp_path: Path) -> None:
    """The numbers of the plain Trainer, which adds them up, or refused."""
    if place != "nvme":
        assert_close(weights(fitted(tmp_path, place, kind)), fitted(tmp_path, "auto", kind).state_dict())
        return
    refused = r"an earlier step has used the gradients of '.*zero_grad\(\) after each step"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one step ahead.*")  # nothing has been taken
        with pytest.raises(ValueError, match=refused):
            fitted(tmp_path, place, kind)


class LeftOver(Net):
    """As many GANs do: one side's backward leaves gradients to the other, which are zeroed before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for number, part in enumerate((self.blocks, self.head)):
            if batch_idx % 2:
                part.zero_grad()
            else:
                self.optimizers()[number].zero_grad()
            self.manual_backward(self.loss(batch), retain_graph=True)
            self.manual_backward(self.loss(batch))
            self.optimizers()[number].step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.blocks.parameters(), lr=1e-2),
            torch.optim.AdamW(self.head.parameters(), lr=1e-2),
        ]


class ZeroedByHand(Net):
    """An override that zeroes otherwise."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        for param in self.parameters():
            param.grad = None


class SeesNone(Callback):
    """What automatic optimization has always left after a step of offloaded state."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        assert all(p.grad is None for p in pl_module.parameters())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LeftOver, {}),
        (ZeroedByHand, {}),
        (ZeroedByHand, {"accumulate_grad_batches": 2}),
        (Net, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
        (Net, {"callbacks": [SeesNone()]}),
    ],
)
def test_what_is_zeroed_is_neither_refused_nor_warned_of(
    kind: type[Net], options: dict[str, Any], tmp_path: Path
) -> None:
    oracle = fitted(tmp_path, "auto", kind, **{k: v for k, v in options.items() if k != "callbacks"})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(gradient|zero_grad|ahead).*")
        module = fitted(tmp_path, "nvme", kind, **options)
    assert_close(weights(module), oracle.state_dict())
    assert not any(isinstance(p.grad, KeptGradient) for p in module.parameters())
