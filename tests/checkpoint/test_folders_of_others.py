"""Saving to a folder that is there already: checkpoints are replaced, other people's files are not written beside."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning_cases import assert_same, loader, net, trainer, weights
from pool import pool
from sharded_cases import Model, fit, strategy
from torch import Tensor

from lightning_zinf.checkpoint.source import Checkpoint


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    model, running = fit(tmp_path, "nvme", 1)
    folder = tmp_path / "results"
    (folder / "figures").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match=r"no checkpoint, with 'figures', 'notes.txt' in it: give"):
        running.save_checkpoint(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["figures", "notes.txt"]
    expected = weights(model)

    for path in (tmp_path / "empty", tmp_path / "killed"):
        path.mkdir()
    (tmp_path / "killed" / "shard-0123456789ab-00000-of-00001.safetensors").write_text("half")
    running.save_checkpoint(tmp_path / "whole")
    (tmp_path / "whole" / "notes.txt").write_text("mine")
    for name in ("empty", "killed", "whole"):  # what a save that was killed left, and older checkpoints
        running.save_checkpoint(tmp_path / name)
        with Checkpoint(tmp_path / name) as source:
            source.verify([info.path for info in source.manifest.files])
    assert not list((tmp_path / "killed").glob("*0123456789ab*"))
    assert (tmp_path / "whole" / "notes.txt").read_text() == "mine"
    assert_same(weights(model), expected)


class Saving(Model):
    """Saves twice in one step, to a folder of others as well."""

    folder: Path

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        self.trainer.save_checkpoint(self.folder / "first")
        self.trainer.save_checkpoint(self.folder / "others")
        return loss


def refused(rank: int, size: int, folder: Path) -> str:
    model = net(Saving)
    model.folder = folder
    try:
        trainer(folder, strategy("nvme"), devices=size).fit(model, loader(8))
    except OSError as error:
        return str(error)
    return ""


def test_in_the_background_on_ranks(tmp_path: Path) -> None:
    """At the call, on all ranks, also where the second would have been links to the first."""
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "notes.txt").write_text("mine")
    for said in pool(2).run(refused, tmp_path):
        assert "others was not saved: rank 0: " in said
        assert "is a folder that is no checkpoint, with 'notes.txt' in it" in said
    assert [p.name for p in (tmp_path / "others").iterdir()] == ["notes.txt"]
