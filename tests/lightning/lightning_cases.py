"""A small model, its data, and Trainers for the tests of the Lightning face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_zinf

WIDTH = 130
"""Wide enough that a block is a unit of its own: smaller ones join the root's."""

PLACES: dict[str, dict[str, Any]] = {
    "device": {"offload_params": "none", "offload_optimizer": "none"},
    "host": {"offload_params": "none", "offload_optimizer": "cpu"},
    "nvme": {"offload_params": "nvme", "offload_optimizer": "nvme", "state_dict_type": "full"},
}
"""One setting of the options for each code path that a CPU has."""


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


class Net(pl.LightningModule):
    """A regression on random vectors, with a buffer, logs of every step and no dropout."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.blocks = nn.Sequential(block(), block())
        self.head = nn.Linear(WIDTH, 1)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)) * self.scale

    def loss(self, batch: Tensor) -> Tensor:
        return (self(batch) - batch.sum(1, keepdim=True)).pow(2).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def net(kind: type[Net] = Net, **arguments: Any) -> Any:
    """Build a model with the same weights each time."""
    torch.manual_seed(1)
    return kind(**arguments)


def loader(batches: int = 6, seed: int = 0, shuffle: bool = False) -> DataLoader[Tensor]:
    data = torch.randn(batches * 4, WIDTH, generator=torch.Generator().manual_seed(seed))
    return DataLoader(data, batch_size=4, shuffle=shuffle)  # type: ignore[arg-type]


def zinf(place: str = "device", **options: Any) -> Any:
    return lightning_zinf.ZinfStrategy(**{**PLACES.get(place, {}), **options})


def trainer(root: Path, strategy: Any = "zinf", **options: Any) -> pl.Trainer:
    """Build a quiet Trainer. ``strategy`` may be a key of PLACES."""
    if isinstance(strategy, str) and strategy in PLACES:
        strategy = zinf(strategy)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    settings = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": root, **quiet}
    return pl.Trainer(strategy=strategy, **{**settings, **options})


def weights(module: nn.Module) -> dict[str, Tensor]:
    return lightning_zinf.full_state_dict(module)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Every bit."""
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Up to the rounding of another formula for the same Adam."""
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
