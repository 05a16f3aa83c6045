"""What the ranks of a test do with a Trainer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning_cases import WIDTH, Net, loader, net, trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import lightning_zinf
from lightning_zinf.engine import reduction


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


def fit_early(rank: int, size: int, folder: Path, update: str, options: dict[str, Any]) -> Any:
    """Fit; return how many units each step had updated in backward, and the weights."""
    counts: list[int] = []

    class Counts(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            counts.append(len(trainer.strategy.engine.early.updated))
            trainer.strategy.engine.early.updated.clear()

        def on_train_start(self, trainer: Any, module: Any) -> None:
            if (reducer := trainer.strategy.engine.reducer) is not None:
                reducer._budget = 0  # a backward then waits for what is under way

    kind = lightning_zinf.ZinfStrategy(
        offload_optimizer="nvme",
        units=["Linear"],
        overlap=lightning_zinf.OverlapConfig(update=update, prefetch=False),  # type: ignore[arg-type]
        nvme_path=folder / "nvme",
        **options,
    )
    model = net()
    with mock.patch.object(reduction, "PATIENCE_SECONDS", 20.0):
        build(size, kind, folder, callbacks=[Counts()]).fit(model, loader(12))
    return counts, lightning_zinf.full_state_dict(model)


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


class AllWrite(Net):
    """All ranks look at a weight between steps, and scale it later."""

    def on_train_batch_end(self, *args: Any) -> None:
        engine = self.trainer.strategy.engine
        self.seen = float(self.head.weight.detach().sum())
        engine.release_host()
        self.between(engine.pager)
        self.head.weight.data.mul_(0.9)

    def between(self, pager: Any) -> None:
        pass


class AllWriteLate(AllWrite):
    """One of them comes late, and has to gather what another still has."""

    def between(self, pager: Any) -> None:
        if self.global_rank == self.global_step % 2:
            pager.forget_gathered()
            time.sleep(0.1)


class Alone(Net):
    """Rank 0 uses a weight while rank 1 is in something that no rank serves from."""

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_rank == 0:
            self.head.weight.detach().sum()
        else:
            time.sleep(3)


class Averages(Net):
    """Keeps the weights that validation saw; SGD has the same bits as torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1)
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        time.sleep(0.05 * self.global_rank)  # rank 0 is through long before rank 1
        super().validation_step(batch, batch_idx)

    def on_validation_batch_end(self, *args: Any) -> None:
        self.seen = lightning_zinf.full_state_dict(self)


def average(
    rank: int, size: int, folder: Path, strategy: Any, theirs: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Train with an average; return the weights that validation saw, those at the end, and the validation loss."""
    callback = EMAWeightAveraging(decay=0.8) if theirs else lightning_zinf.ZinfEMA(0.8)
    kind = lightning_zinf.ZinfStrategy(**strategy) if isinstance(strategy, dict) else strategy
    model = net(Averages)
    running = build(size, kind, folder, max_epochs=2, callbacks=[callback], num_sanity_val_steps=0)
    running.fit(model, loader(12), loader(4, seed=1))
    return model.seen, lightning_zinf.full_state_dict(model), float(running.callback_metrics["val_loss"])


def write_on_rank_0(rank: int, size: int, folder: Path, offload: str) -> list[float]:
    def strategy() -> Any:
        return lightning_zinf.ZinfStrategy(offload_params=offload, offload_optimizer=offload)  # type: ignore[arg-type]

    model = net()
    build(size, strategy(), folder).fit(model, loader(4))
    with lightning_zinf.gathered(model.blocks, write=True), torch.no_grad():
        if rank == 0:
            for number, parameter in enumerate(model.blocks.parameters()):
                parameter.fill_(number)
    build(size, strategy(), folder).validate(model, loader(4), verbose=False)
    return [float(p.detach().mean()) for p in model.blocks.parameters()]


class Stream(IterableDataset[Tensor]):
    """Has more on rank 1 than on rank 0."""

    def __init__(self, counts: tuple[int, ...]) -> None:
        self.counts = counts

    def __iter__(self) -> Iterator[Tensor]:
        rank = torch.distributed.get_rank()
        generator = torch.Generator().manual_seed(rank)
        for _ in range(self.counts[rank]):
            yield torch.randn(WIDTH, generator=generator)


def fit_streams(rank: int, size: int, folder: Path, counts: tuple[int, ...]) -> tuple[int, Any]:
    model = net()
    running = build(size, "zinf", folder, max_epochs=2)
    running.fit(model, DataLoader(Stream(counts), batch_size=2), loader(4))
    return running.global_step, lightning_zinf.full_state_dict(model)
