"""What the ranks of a test do with a Trainer."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_cases import WIDTH, Net, loader, net, trainer
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_zinf


def build(size: int, strategy: Any, folder: Path, **options: Any) -> pl.Trainer:
    return trainer(folder, strategy, devices=size, **options)


def fit(rank: int, size: int, folder: Path, strategy: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Fit, validate and test; return the weights and metrics."""
    kind = lightning_zinf.ZinfStrategy(**strategy) if isinstance(strategy, dict) else strategy
    model = net()
    running = build(size, kind, folder, max_epochs=2, **options)
    running.fit(model, loader(12), loader(4, seed=1))
    metrics = {k: float(v) for k, v in running.callback_metrics.items()}
    tested = running.test(model, loader(4, seed=2), verbose=False)
    weights = lightning_zinf.full_state_dict(model)
    return {"weights": weights, "metrics": metrics, "test": tested, "steps": running.global_step}


def predict_unevenly(rank: int, size: int, folder: Path) -> list[Tensor]:
    """Rank 1 has fewer batches than rank 0."""
    running = build(size, "zinf", folder, use_distributed_sampler=False)
    return running.predict(net(), loader(3 if rank == 0 else 1))  # type: ignore[return-value]


def resume(rank: int, size: int, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train two epochs at once, and one after the other through a checkpoint."""
    whole = net()
    build(size, "zinf", folder, max_epochs=2).fit(whole, loader(4))
    first = net()
    running = build(size, "zinf", folder, max_epochs=1)
    running.fit(first, loader(4))
    running.save_checkpoint(folder / "one.ckpt")
    second = net()
    build(size, "zinf", folder, max_epochs=2).fit(second, loader(4), ckpt_path=folder / "one.ckpt")
    return lightning_zinf.full_state_dict(whole), lightning_zinf.full_state_dict(second)


class Fails(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        if batch_idx == 1 and self.global_rank == 1:
            raise RuntimeError("broken on purpose")
        return super().training_step(batch, batch_idx)


def fail_on_one_rank_and_fit_again(rank: int, size: int, folder: Path) -> tuple[str, int]:
    said = ""
    try:
        build(size, "zinf", folder).fit(net(Fails), loader(8))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    again = build(size, "zinf", folder)
    again.fit(net(), loader(8))
    return said, again.global_step


def batches_of_rank(rank: int, size: int, folder: Path) -> int:
    seen: list[Tensor] = []

    class Sees(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    build(size, "zinf", folder).fit(net(Sees), DataLoader(torch.randn(16, WIDTH), batch_size=2))  # type: ignore[arg-type]
    return len(seen)


class Reads(Net):
    """Rank 0 alone looks at a weight between steps."""

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_rank == 0:
            self.seen = float(self.head.weight.detach().sum())


class Writes(Net):
    """Rank 0 alone changes a weight between steps."""

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_rank == 0 and self.global_step == 2:
            with torch.no_grad():
                self.head.weight += 1


def fit_unevenly(
    rank: int, size: int, folder: Path, kind: type[Net], offload: str, seconds: float = 30
) -> tuple[str, dict[str, Tensor]]:
    model = net(kind)
    strategy = lightning_zinf.ZinfStrategy(
        offload_params=offload, offload_optimizer=offload, timeout=timedelta(seconds=seconds)
    )
    try:
        build(size, strategy, folder).fit(model, loader(8))
    except Exception as error:
        return f"{type(error).__name__}: {error}", {}
    return "", lightning_zinf.full_state_dict(model)


class Alone(Net):
    """Rank 0 uses a weight while rank 1 is in something that no rank serves from."""

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_rank == 0:
            self.head.weight.detach().sum()
        else:
            time.sleep(3)
