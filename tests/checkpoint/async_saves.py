"""Savers that dawdle, and what a checkpoint has, for the tests of saving in the background."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.callbacks import Callback
from lightning_cases import loader, net, trainer
from sharded_cases import Model, everything, strategy
from torch import Tensor

from lightning_zinf import CheckpointConfig
from lightning_zinf.checkpoint.source import Checkpoint
from lightning_zinf.checkpoint.stream import LocalFile, RemoteFile
from lightning_zinf.engine.snapshot import Snapshot
from lightning_zinf.memory import pieces
from lightning_zinf.memory.nvme import NvmeStore


class Late:
    """A write to NVMe that begins after a while."""

    def __init__(self, write: Callable[[], Any], seconds: float) -> None:
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, args=(write, seconds))
        self._thread.start()

    def _run(self, write: Callable[[], Any], seconds: float) -> None:
        time.sleep(seconds)
        try:
            write().wait()
        except OSError as error:
            self._error = error

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        return 0

    def done(self) -> bool:
        return not self._thread.is_alive()


@contextmanager
def dawdling(seed: int = 0, longest: float = 0.004, numel: int = 4096) -> Iterator[None]:
    """Have threads that save, and writes to NVMe, wait now and then; pieces are small."""
    chance = random.Random(seed)
    take, put, write = Snapshot.take, LocalFile.put, NvmeStore.write
    remote = RemoteFile.put

    def slow_write(*arguments: Any) -> Any:
        return Late(functools.partial(write, *arguments), chance.random() * longest)

    def slow_take(self: Any) -> Any:
        time.sleep(chance.random() * longest)
        return take(self)

    def slow_put(self: Any, at: int, content: Tensor) -> None:
        if chance.random() < 0.5:
            time.sleep(chance.random() * longest)
        put(self, at, content)
        if chance.random() < 0.5:
            time.sleep(chance.random() * longest)

    def slow_remote(self: Any, at: int, content: Tensor) -> None:
        time.sleep(chance.random() * longest)
        remote(self, at, content)

    with (
        mock.patch.object(RemoteFile, "put", slow_remote),
        mock.patch.object(Snapshot, "take", slow_take),
        mock.patch.object(LocalFile, "put", slow_put),
        mock.patch.object(NvmeStore, "write", slow_write),
        mock.patch.object(pieces, "PIECE_NUMEL", numel),
    ):
        yield


def contents(path: Any) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint, and what torch.optim keeps beside; files have the right checksums."""
    found = {}
    with Checkpoint(path) as source:
        source.verify(info.path for info in source.manifest.files)
        for name in source.names():
            found[name] = source.tensor(name)
        for param in source.params():
            for plane in param.planes:
                found[f"{param.names[0]}, {plane}"] = source.tensor(param.names[0], plane)
        for number, state in enumerate(source.trainer()["optimizer_states"]):
            for index, entry in state["state"].items():
                for key, value in entry.items():
                    found[f"optimizer {number}, parameter {index}, {key}"] = torch.as_tensor(value)
    return found


class SavesOften(Callback):
    """Saves after some steps, and changes a weight right after."""

    def __init__(self, folder: Path | str, every: int) -> None:
        super().__init__()
        self.folder = folder
        self.every = every
        self.under_way: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            trainer.save_checkpoint(f"{self.folder}/{trainer.global_step}.ckpt")
            self.under_way.append(trainer.strategy.engine.saving is not None)
            with torch.no_grad():
                pl_module.head.bias.data.mul_(0.5)


def train(
    rank: int, size: int, folder: Path, setting: str, precision: Any, background: bool, copy_bytes: int | None = None
) -> tuple[dict[str, Tensor], list[bool]]:
    """Train with deferred updates and clipping, saving after every third step; return everything at the end."""
    options = CheckpointConfig(async_save=background, copy_bytes=copy_bytes)
    saves = SavesOften(folder, 3)
    model = net(Model)
    running = trainer(
        folder, strategy(setting, checkpoint=options), devices=size, max_epochs=2, precision=precision,
        gradient_clip_val=0.1, callbacks=[saves],
    )  # fmt: skip
    with dawdling(rank):
        running.fit(model, loader(8 * size), loader(2, seed=1))
    return everything(model, running), saves.under_way


class SavesTwice(Callback):
    """Saves the same state twice, and once more after a change."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step in (3, 5):
            for number in range(3):
                if number == 2:
                    with torch.no_grad():
                        pl_module.head.bias.data.mul_(0.5)
                trainer.save_checkpoint(self.folder / f"{number}.ckpt")


def save_twice(rank: int, size: int, folder: Path, setting: str, background: bool) -> tuple[Any, list[dict[str, Any]]]:
    """Train and save each state twice; return everything at the end, and what the checkpoints have and are made of."""
    model = net(Model)
    options = CheckpointConfig(async_save=background)
    running = trainer(folder, strategy(setting, checkpoint=options), devices=size, callbacks=[SavesTwice(folder)])
    with dawdling(rank):
        running.fit(model, loader(8 * size))
    return everything(model, running), [contents(folder / f"{i}.ckpt") for i in range(3)] if rank == 0 else []


def fail_in_the_background(rank: int, size: int, folder: Path) -> tuple[str, list[str], bool]:
    """A disk is full on the last rank while training goes on; then it has room again."""
    put = LocalFile.put

    def full(self: Any, at: int, content: Tensor) -> None:
        if rank == size - 1 and at and "3.ckpt" in str(self._path):
            raise OSError(28, "No space left on device")
        put(self, at, content)

    saves = SavesOften(folder, 3)
    running = trainer(folder, strategy("nvme"), devices=size, callbacks=[saves])
    said = ""
    with mock.patch.object(LocalFile, "put", full):
        try:
            running.fit(net(Model), loader(8 * size))
        except OSError as error:
            said = str(error)
    if size > 1:
        torch.distributed.barrier()
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.ckpt/*"))
    return said, left, running.strategy.engine.saving is None


def stop_on_one_rank(rank: int, size: int, folder: Path) -> tuple[str, bool]:
    """Rank 1 raises while a checkpoint is being saved that takes long."""

    class Breaks(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if rank == 1 and self.global_step == 4:
                raise RuntimeError("broken on purpose")
            return super().training_step(batch, batch_idx)

    running = trainer(folder, strategy("nvme"), devices=size, callbacks=[SavesOften(folder, 3)])
    said = ""
    with dawdling(0, longest=0.2):
        try:
            running.fit(net(Breaks), loader(8 * size))
        except Exception as error:
            said = str(error)
    return said, running.strategy.engine.saving is None
