"""Checkpoints that cannot be finished while training goes on: exceptions, full disks, kills. What was there stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import async_saves
import pytest
import torch
from async_saves import contents, dawdling
from lightning.pytorch.callbacks import Callback
from lightning_cases import assert_same, loader, net, trainer
from pool import run
from sharded_cases import Model, everything, fit, strategy
from torch import Tensor

import lightning_zinf
from lightning_zinf.checkpoint.folder import Folder
from lightning_zinf.checkpoint.source import Checkpoint
from lightning_zinf.checkpoint.stream import LocalFile

# ---------------------------------------------------------------------- exceptions


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


# ---------------------------------------------------------------------- full and broken disks


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
