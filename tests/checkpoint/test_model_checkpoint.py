"""Sharded checkpoints through Lightning's own ways: ModelCheckpoint, resuming by name, remote folders."""

from __future__ import annotations

import pickle
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_cases import assert_close, assert_same, loader, net, trainer
from sharded_cases import Model, everything, fit, strategy

import lightning_zinf
from lightning_zinf.checkpoint.source import Checkpoint


def checkpointed(folder: Path, epochs: int, path: Any = None, **options: Any) -> tuple[Any, Any, ModelCheckpoint]:
    saver = ModelCheckpoint(folder / "saved", filename="{epoch}", **options)
    model = net(Model)
    used = trainer(folder, strategy("nvme"), max_epochs=epochs, callbacks=[saver], enable_checkpointing=True)
    used.fit(model, loader(8), loader(2, seed=1), ckpt_path=path)
    return model, used, saver


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "saved").iterdir())


def test_top_k_and_last(tmp_path: Path) -> None:
    whole, used, saver = checkpointed(tmp_path, 3, save_top_k=1, monitor="val_loss", mode="min", save_last=True)
    assert len(names(tmp_path)) == 2  # what is worse has been removed
    assert "last.ckpt" in names(tmp_path)
    assert (Path(saver.best_model_path) / "manifest.json").exists()
    state = everything(whole, used)
    checkpointed(tmp_path / "other", 2, save_last=True)
    resumed, used, _ = checkpointed(tmp_path / "other", 3, "last", save_last=True)
    assert_same(everything(resumed, used), state)
    scores = used.test(resumed, loader(2), ckpt_path="last", verbose=False)
    assert scores == used.test(net(Model), loader(2), ckpt_path=tmp_path / "other/saved/last.ckpt", verbose=False)


def test_every_epoch_and_a_link(tmp_path: Path) -> None:
    checkpointed(tmp_path, 2, save_top_k=-1, every_n_epochs=1, save_last="link")
    assert names(tmp_path) == ["epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"]
    assert (tmp_path / "saved/last.ckpt").is_symlink()
    with Checkpoint(tmp_path / "saved/last.ckpt") as source:
        assert source.trainer()["epoch"] == 1


def test_on_exception(tmp_path: Path) -> None:
    class Breaks(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 5:
                raise RuntimeError("broken on purpose")
            return super().training_step(batch, batch_idx)

    def run(folder: Path, kind: Any) -> Any:
        saver = ModelCheckpoint(folder / "saved", save_on_exception=True)
        with pytest.raises(RuntimeError, match="broken on purpose"):
            trainer(folder, kind(), callbacks=[saver], enable_checkpointing=True).fit(net(Breaks), loader(8))
        (path,) = (folder / "saved").iterdir()
        resumed = net(Model)
        trainer(folder, kind()).fit(resumed, loader(8), ckpt_path=path)
        return lightning_zinf.full_state_dict(resumed)

    assert_close(run(tmp_path / "ours", lambda: strategy("nvme")), run(tmp_path / "theirs", lambda: "auto"))


def test_overwriting_leaves_nothing_behind(tmp_path: Path) -> None:
    _, used = fit(tmp_path, "nvme", 1)
    for _ in range(3):
        used.save_checkpoint(tmp_path / "a.ckpt")
    assert len(list((tmp_path / "a.ckpt").iterdir())) == 4


def test_remote_folder(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/a.ckpt"
    _, used = fit(tmp_path, "nvme", 1)
    for _ in range(2):
        used.save_checkpoint(url)
    assert len(fsspec.filesystem("memory").ls(url)) == 4
    resumed, again = fit(tmp_path, "none", 2, path=url)
    whole, plain = fit(tmp_path, "nvme", 2)
    assert_same(everything(resumed, again), everything(whole, plain))
    used.strategy.remove_checkpoint(url)
    assert not fsspec.filesystem("memory").exists(url)


def test_hooks_see_values(tmp_path: Path) -> None:
    """A hook that reads, changes and adds entries when a checkpoint is loaded."""
    model, used = fit(tmp_path, "nvme", 1)
    used.save_checkpoint(tmp_path / "a.ckpt")
    expected = lightning_zinf.full_state_dict(model)

    class Hooked(Model):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            assert_same(dict(state.items()), expected)
            state["head.weight"] = state["head.weight"] * 2

    other = net(Hooked)
    used = trainer(tmp_path, strategy("none"))
    used.test(other, loader(2), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    found = lightning_zinf.full_state_dict(other)
    expected["head.weight"] = expected["head.weight"] * 2
    assert_same(found, expected)


def test_what_is_not_ours_is_never_removed(tmp_path: Path) -> None:
    """A folder of the user's in the place of a checkpoint, and files of his in that of an older one."""
    _, used = fit(tmp_path, "nvme", 1)
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("precious.txt", "trainer-notes.txt", "shard-plan.md"):
        (mine / name).write_text("precious")
    used.strategy.state_dict_type = "full"
    with pytest.raises(IsADirectoryError, match="mine is a folder that is no checkpoint"):
        used.save_checkpoint(mine)
    used.strategy.state_dict_type = "sharded"
    with pytest.raises(OSError, match="mine is a folder that is no checkpoint"):
        used.save_checkpoint(mine)
    assert len(list(mine.iterdir())) == 3
    used.save_checkpoint(tmp_path / "a.ckpt")
    for file in (tmp_path / "a.ckpt").iterdir():
        file.rename(mine / file.name)
    for _ in range(2):
        used.save_checkpoint(mine)
    assert [(mine / n).read_text() for n in ("precious.txt", "trainer-notes.txt", "shard-plan.md")] == ["precious"] * 3
    assert len(list(mine.iterdir())) == 3 + 4


def test_entries_that_a_hook_adds(tmp_path: Path) -> None:
    _, used = fit(tmp_path, "nvme", 1)
    used.save_checkpoint(tmp_path / "a.ckpt")

    class Renamed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("more", torch.zeros(3))

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"]["more"] = torch.ones(3)

    module = net(Renamed)
    trainer(tmp_path, strategy("none")).test(module, loader(2), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert torch.equal(module.more, torch.ones(3))


def test_what_cannot_be_pickled_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    model, used = fit(tmp_path, "nvme", 1)
    used.save_checkpoint(tmp_path / "a.ckpt")
    before = sorted(p.name for p in (tmp_path / "a.ckpt").iterdir())
    model.on_save_checkpoint = lambda checkpoint: checkpoint.update(hook=lambda: None)
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        used.save_checkpoint(tmp_path / "a.ckpt")
    assert sorted(p.name for p in (tmp_path / "a.ckpt").iterdir()) == before
