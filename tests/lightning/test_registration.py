"""Names, options and both namespaces (contract 1.1, 1.2, 2.1)."""

from __future__ import annotations

import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning as old
import torch
from lightning_cases import PLACES, loader

import lightning_zinf
import lightning_zinf.lightning
import lightning_zinf.pl
from lightning_zinf.config import IOConfig, MemoryConfig, OverlapConfig
from lightning_zinf_boot import PRESETS

BOTH = pytest.mark.parametrize(("package", "home"), [(pl, lightning_zinf.lightning), (old, lightning_zinf.pl)])


@BOTH
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(package: Any, home: Any, preset: str) -> None:
    trainer = package.Trainer(strategy=preset, accelerator="cpu", devices=1, logger=False)
    strategy = trainer.strategy
    assert type(strategy) is home.ZinfStrategy
    assert isinstance(strategy, package.strategies.DDPStrategy)
    for name, value in PRESETS[preset][1].items():
        assert getattr(strategy, name) == value
    assert type(trainer.precision_plugin) is home.ZinfPrecision
    assert isinstance(trainer.precision_plugin, package.plugins.precision.Precision)


@BOTH
@pytest.mark.parametrize("place", PLACES)
def test_trains_in_both_namespaces(tmp_path: Path, package: Any, home: Any, place: str) -> None:
    class Model(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(130, 130)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.layer(batch).pow(2).mean()
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.layer(batch).pow(2).mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    losses = []
    for strategy in (home.ZinfStrategy(**PLACES[place]), "auto"):
        torch.manual_seed(0)
        module = Model()
        used = package.Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
            gradient_clip_val=0.1,
            callbacks=[home.ZinfMonitor()] if strategy != "auto" else [],
        )
        used.fit(module, loader(), loader(2))
        losses.append(used.callback_metrics["val_loss"].item())
        (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
        used.validate(module, loader(2), ckpt_path=str(checkpoint), verbose=False)
        checkpoint.unlink()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_strategies_of_one_namespace_are_not_those_of_the_other() -> None:
    assert not issubclass(lightning_zinf.pl.ZinfStrategy, pl.strategies.Strategy)
    assert lightning_zinf.ZinfStrategy is lightning_zinf.lightning.ZinfStrategy
    assert lightning_zinf.ZinfMonitor is lightning_zinf.lightning.ZinfMonitor
    for name in ("ZinfStrategy", "ZinfPrecision", "ZinfMonitor"):  # what checkpoints have as keys
        assert getattr(lightning_zinf.pl, name).__qualname__ == getattr(lightning_zinf.lightning, name).__qualname__
    assert pickle.loads(pickle.dumps(lightning_zinf.pl.ZinfStrategy)) is lightning_zinf.pl.ZinfStrategy


def test_the_namespace_in_use_is_taken(tmp_path: Path) -> None:
    script = "import pytorch_lightning, lightning_zinf; print(lightning_zinf.ZinfStrategy.__module__)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["lightning_zinf.pl"]


def test_base_class_registers_nothing_else() -> None:
    from lightning.fabric.strategies.registry import _StrategyRegistry

    registry = _StrategyRegistry()
    lightning_zinf.lightning.ZinfStrategy.register_strategies(registry)
    assert set(registry) == set(PRESETS)


def test_defaults_are_the_preset_zinf() -> None:
    strategy = lightning_zinf.ZinfStrategy()
    assert (strategy.stage, strategy.offload_params, strategy.offload_optimizer) == (3, "auto", "auto")
    assert (strategy.memory, strategy.overlap, strategy.io) == (MemoryConfig(), OverlapConfig(), IOConfig())
    assert strategy._timeout == timedelta(minutes=30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 4}, "stage must be 1, 2 or 3"),
        ({"stage": True}, "stage must be 1, 2 or 3"),
        ({"stage": "3"}, "stage must be 1, 2 or 3"),
        ({"offload_params": "disk"}, "offload_params must be one of 'auto', 'none', 'cpu', 'nvme'"),
        ({"offload_optimizer": True}, "offload_optimizer must be one of"),
        ({"stage": 2, "offload_params": "cpu"}, "needs stage=3"),
        ({"memory": {"host_bytes": 1}}, "memory must be a lightning_zinf.MemoryConfig"),
        ({"timeout": 30}, r"timeout must be a datetime.timedelta or None, got 30"),
        ({"start_method": "thread"}, "start_method must be 'popen', 'spawn', 'fork' or 'forkserver', got 'thread'"),
        ({"units": "Block"}, "units must be a list of class names"),
        ({"units": [torch.nn.Linear]}, "units must be a list of class names"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lightning_zinf.ZinfStrategy(**options)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="find_unused_parameters"):
        lightning_zinf.ZinfStrategy(find_unused_parameters=True)
    with pytest.raises(ValueError, match=r"memory\.host_bytes must be a positive"):
        MemoryConfig(host_bytes=0)


def test_version_is_the_distribution_s() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'\nversion = "{lightning_zinf.__version__}"\n' in project


def test_everything_public_is_there() -> None:
    for name in lightning_zinf.__all__:
        assert getattr(lightning_zinf, name) is not None
        assert name in dir(lightning_zinf)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lightning_zinf.nothing
