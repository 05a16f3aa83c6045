"""Checkpoints that are written while training goes on, through Lightning: bits, removals, who waits."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import async_saves
import pytest
from async_saves import contents, dawdling
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_cases import assert_same, loader, net, trainer
from pool import run
from sharded_cases import Model, everything, fit, strategy
from torch import Tensor

from lightning_zinf import CheckpointConfig
from lightning_zinf.checkpoint.source import Checkpoint

STEPS = (3, 6, 9, 12, 15)


def compare(size: int, folder: Path, setting: str, precision: str, copy_bytes: int | None) -> None:
    after, under_way = run(size, async_saves.train, folder / "back", setting, precision, True, copy_bytes)[0]
    expected, _ = run(size, async_saves.train, folder / "fore", setting, precision, False)[0]
    assert_same(after, expected)
    assert len(under_way) == len(STEPS)
    assert all(under_way)
    for step in STEPS:
        assert_same(contents(folder / f"back/{step}.ckpt"), contents(folder / f"fore/{step}.ckpt"))


@pytest.mark.parametrize(
    ("size", "setting", "precision"),
    [
        (1, "none", "32-true"),
        (1, "cpu", "bf16-mixed"),
        (1, "nvme", "32-true"),
        (2, "none", "bf16-mixed"),
        (2, "nvme", "32-true"),
        (2, "copies", "32-true"),
    ],
)
def test_the_bits_of_saving_in_the_foreground(tmp_path: Path, size: int, setting: str, precision: str) -> None:
    compare(size, tmp_path, setting, precision, None)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "copy_bytes"), [("32-true", 1), ("bf16-mixed", None)])
@pytest.mark.parametrize(
    ("size", "setting"),
    [(1, "none"), (1, "cpu"), (1, "nvme")]
    + [(2, setting) for setting in ("none", "cpu", "nvme", "stage-2", "stage-1", "copies")]
    + [(4, "nvme"), (4, "stage-1")],
)
def test_the_bits_everywhere(tmp_path: Path, size: int, setting: str, precision: str, copy_bytes: int | None) -> None:
    compare(size, tmp_path, setting, precision, copy_bytes)


def test_remote_folders_in_the_background(tmp_path: Path) -> None:
    """Written in order, with copies of what training changes meanwhile; or training waits."""
    expected: list[dict[str, Tensor]] = []
    for setting, copy_bytes in (("none", None), ("none", 1), ("nvme", None)):
        root = f"memory://{uuid.uuid4().hex}"
        saves = async_saves.SavesOften(root, 3)
        options = CheckpointConfig(copy_bytes=copy_bytes)
        model, used = net(Model), trainer(tmp_path, strategy(setting, checkpoint=options), callbacks=[saves])
        with dawdling():
            used.fit(model, loader(8))
        assert saves.under_way == [True, True]
        found = [contents(f"{root}/{step}.ckpt") for step in (3, 6)] + [everything(model, used)]
        for ours, theirs in zip(found, expected or found, strict=True):
            assert_same(ours, theirs)
        expected = expected or found


def test_what_was_saved_resumes(tmp_path: Path) -> None:
    """Saved in the midst of an epoch while updates were pending; and loaded right after it was saved."""
    saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    model = net(Model)
    with dawdling():
        used = trainer(tmp_path, strategy("nvme"), max_epochs=2, callbacks=[saves], enable_checkpointing=True)
        used.fit(model, loader(8))
    resumed, again = fit(tmp_path, "none", 2, path=tmp_path / "epoch=0.ckpt")
    assert_same(everything(resumed, again), everything(model, used))


# ---------------------------------------------------------------------- twice


def inodes(path: Path) -> set[int]:
    return {p.stat().st_ino for p in path.glob("shard-*")}


@pytest.mark.parametrize(("size", "setting"), [(1, "nvme"), (2, "nvme"), (1, "none")])
def test_one_state_under_two_names(tmp_path: Path, size: int, setting: str) -> None:
    """The second has the files of the first, unless weights in place could have changed unseen."""
    after, found = run(size, async_saves.save_twice, tmp_path / "back", setting, True)[0]
    expected, others = run(size, async_saves.save_twice, tmp_path / "fore", setting, False)[0]
    assert_same(after, expected)
    for ours, theirs in zip(found, others, strict=True):
        assert_same(ours, theirs)
    first, second, changed = (inodes(tmp_path / f"back/{i}.ckpt") for i in range(3))
    assert len(first) == size
    assert (first == second) == (setting == "nvme")
    assert not first & changed
    assert all(len(list((tmp_path / f"back/{i}.ckpt").iterdir())) == 3 + size for i in range(3))  # older ones are gone


def test_the_best_and_the_last(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, filename="{step}", save_last=True)
    used = trainer(tmp_path, strategy("nvme"), callbacks=[saves], enable_checkpointing=True)
    with dawdling():
        used.fit(net(Model), loader(8))
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["last.ckpt", "step=6.ckpt"]
    assert inodes(tmp_path / "saved/last.ckpt") == inodes(tmp_path / "saved/step=6.ckpt")
    with Checkpoint(tmp_path / "saved/last.ckpt") as last, Checkpoint(tmp_path / "saved/step=6.ckpt") as best:
        assert last.trainer()["global_step"] == best.trainer()["global_step"] == 6
    assert_same(contents(tmp_path / "saved/last.ckpt"), contents(tmp_path / "saved/step=6.ckpt"))


def test_one_state_again_and_again(tmp_path: Path) -> None:
    """Under a name that has it already, and under that of the checkpoint that is being saved."""

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step in (2, 5):
                for name in ("0.ckpt", "1.ckpt", "1.ckpt", "0.ckpt", "1.ckpt"):
                    trainer.save_checkpoint(tmp_path / name)

    used = trainer(tmp_path, strategy("nvme"), callbacks=[Saves()])
    with dawdling():
        used.fit(net(Model), loader(8))
    first, second = (contents(tmp_path / f"{i}.ckpt") for i in range(2))
    assert_same(first, second)
    assert inodes(tmp_path / "0.ckpt") == inodes(tmp_path / "1.ckpt")
    assert all(len(list((tmp_path / f"{i}.ckpt").iterdir())) == 4 for i in range(2))


# ---------------------------------------------------------------------- removals


class Watches(Callback):
    """Notes after each batch which checkpoints are complete."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.complete: list[list[str]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.complete.append(sorted(p.parent.name for p in self.folder.glob("*.ckpt/manifest.json")))


def test_the_older_checkpoint_goes_when_the_newer_is_complete(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=3, save_top_k=1)
    watches = Watches(tmp_path / "saved")
    used = trainer(tmp_path, strategy("nvme"), callbacks=[watches, saves], enable_checkpointing=True)
    with dawdling(longest=0.03):
        used.fit(net(Model), loader(12))
    first = next(i for i, names in enumerate(watches.complete) if names)
    assert all(watches.complete[first:]), "there was a moment without a complete checkpoint"
    assert [p.name for p in (tmp_path / "saved").iterdir()] == ["step=12.ckpt"]


def test_a_link_has_something_to_link_to(tmp_path: Path) -> None:
    class Follows(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            assert trainer.strategy.engine.saving is None

    saves = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=2, save_last="link")
    used = trainer(tmp_path, strategy("nvme"), callbacks=[saves, Follows()], enable_checkpointing=True)
    used.fit(net(Model), loader(8))
    assert (tmp_path / "saved/last.ckpt/manifest.json").exists()


# ---------------------------------------------------------------------- waiting


def test_who_needs_a_complete_checkpoint_waits(tmp_path: Path) -> None:
    class Uses(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            path = tmp_path / f"{trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            assert trainer.strategy.engine.saving is not None
            assert not (path / "manifest.json").exists()
            if trainer.global_step == 2:
                trainer.strategy.wait_for_checkpoints()
            elif trainer.global_step == 3:
                trainer.strategy.load_checkpoint(path)
            elif trainer.global_step == 4:
                pl_module.head.bias.data.add_(1)
                trainer.save_checkpoint(tmp_path / "other.ckpt")
            if trainer.global_step in (2, 3, 4):
                assert (path / "manifest.json").exists()

    used = trainer(tmp_path, strategy("nvme"), callbacks=[Uses()])
    with dawdling(longest=0.05):
        used.fit(net(Model), loader(5))
        assert (tmp_path / "5.ckpt/manifest.json").exists()  # the end of fit waits
        used.save_checkpoint(tmp_path / "after.ckpt")
        assert (tmp_path / "after.ckpt/manifest.json").exists()
    with pytest.raises(ValueError, match=r"copy_bytes must be a positive whole number of bytes or None, got 0"):
        CheckpointConfig(copy_bytes=0)
    with pytest.raises(ValueError, match=r"checkpoint must be a lightning_zinf.CheckpointConfig"):
        strategy("nvme", checkpoint=True)


def test_in_the_foreground_if_asked(tmp_path: Path) -> None:
    saves = async_saves.SavesOften(tmp_path, 2)
    options = CheckpointConfig(async_save=False)
    trainer(tmp_path, strategy("nvme", checkpoint=options), callbacks=[saves]).fit(net(Model), loader(4))
    assert saves.under_way == [False, False]
