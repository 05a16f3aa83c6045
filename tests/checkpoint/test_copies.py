"""What saving copies and loading moves: no more than it has to, and into memory that is there already."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from async_saves import dawdling
from driver import Session, Where, session
from lightning_cases import assert_same
from models import ZOO
from oracle import Recipe
from snapshot_states import save_now, saved_state, state_of

from lightning_zinf.checkpoint import saving
from lightning_zinf.checkpoint.files import Reader
from lightning_zinf.checkpoint.load import load_optimizer, load_weights
from lightning_zinf.checkpoint.source import Checkpoint, ShardedStateDict
from lightning_zinf.engine import snapshot
from lightning_zinf.engine.snapshot import Snapshot
from lightning_zinf.optim.state_dict import optimizer_rest

RECIPE = Recipe(accumulate=1, clip_norm=0.5)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Session]:
    """Float32 weights and their state, all in memory."""
    with session(ZOO["gpt"], tmp_path / "run", Where("none", "none"), "32-true", RECIPE) as opened:
        opened.step()
        yield opened


def weight_bytes(running: Session) -> int:
    return sum(b.shard_bytes for u in running.engine.units for b in u.buffers)


def in_background(running: Session, path: Path) -> list[int]:
    """Save while steps are taken and weights changed; return the sizes of the memory that was taken for copies."""
    taken: list[int] = []
    real = snapshot.host_empty

    def counted(nbytes: int) -> torch.Tensor:
        taken.append(nbytes)
        return real(nbytes)

    expected = state_of(running)
    with dawdling(), mock.patch.object(snapshot, "host_empty", counted):
        save_now(running, path, background=True, copy_bytes=1 << 30)
        at_once = list(taken)
        for param in running.model.parameters():
            param.data.zero_()  # which nobody tells the engine
        assert running.engine.saving is not None
        running.engine.saving.wait()
    assert_same(dict(sorted(saved_state(running, path).items())), dict(sorted(expected.items())))
    return at_once


def test_memory_of_copies_is_kept_for_the_next_save(running: Session, tmp_path: Path) -> None:
    assert sum(in_background(running, tmp_path / "0.ckpt")) == weight_bytes(running)
    kept = {m.data_ptr() for m in running.engine.context.spare_copies}
    assert sum(m.numel() for m in running.engine.context.spare_copies) == weight_bytes(running)
    running.step()
    assert in_background(running, tmp_path / "1.ckpt") == []
    assert {m.data_ptr() for m in running.engine.context.spare_copies} == kept
    save_now(running, tmp_path / "2.ckpt", background=False, copy_bytes=1 << 30)
    assert {m.data_ptr() for m in running.engine.context.spare_copies} == kept


def test_memory_of_copies_is_given_back_where_little_is_free(running: Session, tmp_path: Path) -> None:
    with mock.patch.object(saving, "copy_room", return_value=weight_bytes(running) - 1):
        in_background(running, tmp_path / "0.ckpt")
    assert running.engine.context.spare_copies == []
    with mock.patch.object(saving, "copy_room", return_value=weight_bytes(running)):
        in_background(running, tmp_path / "1.ckpt")
    assert running.engine.context.spare_copies != []


def test_nothing_is_copied_in_the_foreground(running: Session, tmp_path: Path) -> None:
    expected = state_of(running)
    with mock.patch.object(snapshot, "copy_all", side_effect=AssertionError("a copy")):
        save_now(running, tmp_path / "0.ckpt", background=False, copy_bytes=1 << 30)
    assert_same(dict(sorted(saved_state(running, tmp_path / "0.ckpt").items())), dict(sorted(expected.items())))


@pytest.mark.parametrize("room", [1 << 30, 0])
def test_readers_begin_when_the_first_copies_have_been_made(running: Session, tmp_path: Path, room: int) -> None:
    """Unless there is no room for copies, and they are waited for."""
    began, early = threading.Event(), []
    begin, take = Snapshot.begin, Snapshot.take

    def noted_begin(self: Any) -> None:
        begin(self)
        began.set()

    def noted_take(self: Any) -> Any:
        work = take(self)
        if work is not None and not self._begun:
            early.append(work.piece.plane)
        return work

    with dawdling(), mock.patch.object(Snapshot, "begin", noted_begin), mock.patch.object(Snapshot, "take", noted_take):
        save_now(running, tmp_path / "0.ckpt", background=True, copy_bytes=room)
        assert began.is_set()
        assert running.engine.saving is not None
        running.engine.saving.wait()
    assert bool(early) == (not room)
    assert set(early) <= {"weight", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("place", ["memory", "nvme"])
def test_loading_checks_each_file_once_and_moves_what_it_changes(place: str, tmp_path: Path) -> None:
    where = Where("none", "none") if place == "memory" else Where("nvme", "nvme", tight=True)
    with session(ZOO["gpt"], tmp_path / "run", where, "32-true", RECIPE) as running:
        running.step()
        expected = state_of(running)
        save_now(running, tmp_path / "0.ckpt", background=False, copy_bytes=0)
        running.step()
        running.engine.flush()
        checked: list[str] = []
        verify = Reader.verify

        def noted(self: Any) -> None:
            checked.append(self.where)
            verify(self)

        counters, weight = running.engine.counters, weight_bytes(running)
        rest = optimizer_rest(running.binding)
        with mock.patch.object(Reader, "verify", noted), Checkpoint(tmp_path / "0.ckpt") as source:
            before = counters.nvme_write_bytes
            load_weights(running.engine, ShardedStateDict(source))
            assert counters.nvme_write_bytes - before == (weight if place == "nvme" else 0)
            load_optimizer(running.binding, source, 0, {**rest, **source.trainer()["optimizer_states"][0]})
            # The update of the state takes the weights along, as a step does.
            assert counters.nvme_write_bytes - before == (4 * weight if place == "nvme" else 0)
        assert len(checked) == len(set(checked)) == 2
        assert_same(dict(sorted(state_of(running).items())), dict(sorted(expected.items())))
