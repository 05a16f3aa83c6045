"""Checkpoints that are written while training goes on, through Lightning: bits, failures, crashes, removals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any
from unittest import mock

import async_saves
import pytest
import torch
from async_saves import contents, dawdling
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_cases import assert_same, loader, net, trainer
from pool import close_all, pool
from sharded_cases import Model, everything, fit, strategy
from torch import Tensor

import lightning_zinf
from lightning_zinf import CheckpointConfig
from lightning_zinf.checkpoint.folder import Folder
from lightning_zinf.checkpoint.source import Checkpoint
from lightning_zinf.checkpoint.stream import LocalFile

STEPS = (3, 6, 9, 12, 15)


@pytest.fixture(scope="module", autouse=True)
def _ranks() -> Any:
    yield
    close_all()


def run(size: int, function: Any, *arguments: Any) -> list[Any]:
    return [function(0, 1, *arguments)] if size == 1 else pool(size).run(function, *arguments)


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


def test_a_second_name_that_cannot_be_written(tmp_path: Path) -> None:
    """The first is complete, and what the second name had before stays."""
    link = Folder.link

    def full(self: Any, source: Any, name: str) -> None:
        if (tmp_path / "1.ckpt/manifest.json").exists():
            raise OSError(28, "No space left on device")
        link(self, source, name)

    used = trainer(tmp_path, strategy("nvme"), callbacks=[async_saves.SavesTwice(tmp_path)])
    with (
        mock.patch.object(Folder, "link", full),
        pytest.raises(OSError, match=r"[^,]*1.ckpt was not saved: \[Errno 28\]"),
    ):
        used.fit(net(Model), loader(8))
    for number, step in enumerate((5, 3)):
        assert contents(tmp_path / f"{number}.ckpt")
        with Checkpoint(tmp_path / f"{number}.ckpt") as source:
            assert source.trainer()["global_step"] == step
        assert len(list((tmp_path / f"{number}.ckpt").iterdir())) == 4


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


def test_an_exception_waits_for_what_is_being_saved(tmp_path: Path) -> None:
    class Breaks(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 4:
                raise RuntimeError("broken on purpose")
            return super().training_step(batch, batch_idx)

    used = trainer(tmp_path, strategy("nvme"), callbacks=[async_saves.SavesOften(tmp_path, 3)])
    with dawdling(longest=0.05), pytest.raises(RuntimeError, match="broken on purpose"):
        used.fit(net(Breaks), loader(8))
    assert contents(tmp_path / "3.ckpt")


def test_an_exception_on_one_of_two_ranks(tmp_path: Path) -> None:
    """Nobody waits for somebody who does not come, and nothing looks complete that is not."""
    for said, over in run(2, async_saves.stop_on_one_rank, tmp_path):
        assert "broken on purpose" in said
        assert over
    if (tmp_path / "3.ckpt/manifest.json").exists():
        assert contents(tmp_path / "3.ckpt")


# ---------------------------------------------------------------------- failures


@pytest.mark.parametrize("size", [1, 2])
def test_a_full_disk_is_raised_by_all_ranks(tmp_path: Path, size: int) -> None:
    for said, left, over in run(size, async_saves.fail_in_the_background, tmp_path):
        assert "3.ckpt was not saved: " in said
        assert f"rank {size - 1}: [Errno 28] No space left on device" in said
        assert not left
        assert over


@pytest.mark.parametrize("caught", [False, True])
def test_the_checkpoint_before_stays(tmp_path: Path, caught: bool) -> None:
    """An I/O error while the second one is written to the same name; training goes on if the user wants that."""
    put, failing = LocalFile.put, [False]

    def broken(self: Any, at: int, content: Tensor) -> None:
        if failing[0] and at:
            raise OSError(5, "Input/output error")
        put(self, at, content)

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
            elif trainer.global_step == 5:
                failing[0] = True
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                trainer.strategy.remove_checkpoint(tmp_path / "older.ckpt")
                if caught:
                    with pytest.raises(OSError, match=r"a.ckpt was not saved: rank 0: \[Errno 5\]"):
                        trainer.strategy.wait_for_checkpoints()

    model, used = net(Model), trainer(tmp_path, strategy("nvme"), callbacks=[Saves()])
    (tmp_path / "older.ckpt").write_text("")
    with mock.patch.object(LocalFile, "put", broken):
        if caught:
            used.fit(model, loader(8))
            plain, other = fit(tmp_path / "plain", "nvme", 1)
            assert_same(everything(model, used), everything(plain, other))
        else:
            with pytest.raises(OSError, match=r"a.ckpt was not saved: rank 0: \[Errno 5\] Input/output error"):
                used.fit(model, loader(8))
    assert (tmp_path / "older.ckpt").exists(), "removed although the newer one was not saved"
    with Checkpoint(tmp_path / "a.ckpt") as source:
        assert source.trainer()["global_step"] == 2
    assert len(list((tmp_path / "a.ckpt").iterdir())) == 4
    assert contents(tmp_path / "a.ckpt")


def test_the_end_of_fit_raises(tmp_path: Path) -> None:
    def full(self: Any, at: int, content: Tensor) -> None:
        raise OSError(28, "No space left on device")

    model, used = net(Model), trainer(tmp_path, strategy("nvme"), callbacks=[async_saves.SavesOften(tmp_path, 8)])
    with (
        mock.patch.object(LocalFile, "put", full),
        pytest.raises(OSError, match=r"8.ckpt was not saved: rank 0: \[Errno 28\]"),
    ):
        used.fit(model, loader(8))
    assert not list(tmp_path.glob("8.ckpt/*"))
    used.save_checkpoint(tmp_path / "again.ckpt")
    assert contents(tmp_path / "again.ckpt")


# ---------------------------------------------------------------------- crashes

SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from async_saves import SavesOften, dawdling
from lightning_cases import loader, net, trainer
from sharded_cases import Model, strategy
from lightning.pytorch.callbacks import Callback

class Saves(Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.save_checkpoint(Path({folder!r}) / f"{{trainer.global_step % 2}}.ckpt")
        print(trainer.global_step, flush=True)

with dawdling({seed}, longest=0.01, numel=2048):
    trainer(Path({folder!r}), strategy({setting!r}), max_epochs=1000, callbacks=[Saves()]).fit(net(Model), loader(8))
"""


def kill_and_look(folder: Path, setting: str, seed: int, times: int) -> None:
    """Kill a process that saves to two names by turns; whatever has a manifest loads, and the last but one has."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parent / "lightning")]
    script = SCRIPT.format(paths=paths, folder=str(folder), setting=setting, seed=seed)
    for attempt in range(times):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stdout is not None
        begun = 0
        while begun < 4 + attempt:
            begun = int(process.stdout.readline())
        time.sleep(0.013 * (attempt * 7 % 5))
        process.send_signal(signal.SIGKILL)
        begun = max([begun, *map(int, process.stdout.read().split())])
        process.wait()
        complete = {}
        for path in folder.glob("*.ckpt"):
            if (path / "manifest.json").exists():
                assert contents(path)
                with Checkpoint(path) as source:
                    complete[source.trainer()["global_step"]] = path
        assert max(complete) >= begun - 1, (complete, begun)  # the last but one was complete when the last began
        model = net(Model)
        trainer(folder, strategy("none")).test(model, loader(2), ckpt_path=complete[max(complete)], verbose=False)
        assert all(torch.isfinite(v).all() for v in lightning_zinf.full_state_dict(model).values())


def test_kill_9(tmp_path: Path) -> None:
    kill_and_look(tmp_path, "nvme", 0, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("setting", ["none", "nvme"])
def test_kill_9_again_and_again(tmp_path: Path, setting: str) -> None:
    kill_and_look(tmp_path, setting, 1, 15)
