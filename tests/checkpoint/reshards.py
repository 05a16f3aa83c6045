"""What the ranks of the resharding tests do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning_cases import loader, net, trainer
from sharded_cases import Model, everything, fit, strategy
from torch import Tensor

import lightning_zinf


def save(rank: int, size: int, folder: Path, setting: str, precision: Any) -> dict[str, Tensor]:
    """Train an epoch and save; return everything that there was."""
    model, running = fit(folder, setting, 1, size, precision=precision)
    running.save_checkpoint(folder / "half.ckpt")
    return everything(model, running)


def load(rank: int, size: int, folder: Path, setting: str, precision: Any, path: Path) -> dict[str, Tensor]:
    """Load at the point where it was saved, and return everything."""
    return everything(*fit(folder, setting, 1, size, path, precision=precision))


def go_on(
    rank: int, size: int, folder: Path, setting: str, precision: Any, path: Any, epochs: int
) -> dict[str, Tensor]:
    """Train until ``epochs``."""
    return everything(*fit(folder, setting, epochs, size, path, precision=precision))


def average(rank: int, size: int, folder: Path, path: Any, epochs: int) -> dict[str, Tensor]:
    """Train with a running average until ``epochs``, saving at the end of the first."""
    callbacks = [lightning_zinf.ZinfEMA(0.8), Saves(folder / "first.ckpt")]
    model = net(Model)
    running = trainer(folder, strategy("nvme"), devices=size, max_epochs=epochs, callbacks=callbacks)
    running.fit(model, loader(8), ckpt_path=path)
    return lightning_zinf.full_state_dict(model)


def fail_on_one_rank(rank: int, size: int, folder: Path) -> tuple[str, list[str], dict[str, Tensor]]:
    """Save twice; the second time a disk is full on rank 1."""
    from lightning_zinf.checkpoint import stream

    model, running = fit(folder, "nvme", 1, size)
    running.save_checkpoint(folder / "a.ckpt")
    before = sorted(p.name for p in (folder / "a.ckpt").iterdir())
    put = stream.LocalFile.put

    def full(self: Any, at: int, content: Tensor) -> None:
        if rank == 1:
            raise OSError(28, "No space left on device")
        put(self, at, content)

    stream.LocalFile.put = full  # type: ignore[method-assign]
    said = ""
    try:
        running.save_checkpoint(folder / "a.ckpt")
    except OSError as error:
        said = str(error)
    finally:
        stream.LocalFile.put = put  # type: ignore[method-assign]
    torch.distributed.barrier()
    after = sorted(p.name for p in (folder / "a.ckpt").iterdir())
    running.save_checkpoint(folder / "b.ckpt")  # nothing is broken
    return said, [n for n in after if n not in before], everything(model, running)


class Saves(Callback):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def fail_to_make_the_folder(rank: int, size: int, folder: Path) -> list[str]:
    """A file is where a folder would have to be; then all is well again."""
    _, running = fit(folder, "nvme", 1, size)
    (folder / "file").write_text("")
    said = []
    for path in (folder / "file" / "a.ckpt", folder / "b.ckpt"):
        try:
            running.save_checkpoint(path)
            said.append("")
        except OSError as error:
            said.append(str(error))
    return said
