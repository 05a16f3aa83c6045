"""A checkpoint of any number of ranks loads into any other, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reshards
from lightning_cases import assert_same
from pool import pool, run
from torch import Tensor

WORLDS = [1, 2, 4]
SETTINGS = ["none", "cpu", "nvme", "stage-2", "stage-1"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoints by world size, setting and precision, made when they are asked for."""
    made: dict[Any, tuple[Path, dict[str, Tensor]]] = {}

    def get(world: int, setting: str, precision: str) -> tuple[Path, dict[str, Tensor]]:
        key = (world, setting, precision)
        if key not in made:
            folder = tmp_path_factory.mktemp("saved")
            made[key] = folder / "half.ckpt", run(world, reshards.save, folder, setting, precision)[0]
        return made[key]

    return get


CASES = [(w, s, v, t) for w in WORLDS for v in WORLDS for s, t in (("none", "nvme"), ("nvme", "stage-2"))]
ALL = [(w, s, v, t) for w in WORLDS for v in WORLDS for s in SETTINGS for t in SETTINGS]


def check(saved: Any, case: tuple[int, str, int, str], precision: str, folder: Path) -> None:
    world, setting, target, other = case
    path, expected = saved(world, setting, precision)
    for found in run(target, reshards.load, folder, other, precision, path):
        assert_same(found, expected)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_any_world_into_any_other(saved: Any, case: Any, tmp_path: Path) -> None:
    check(saved, case, "bf16-mixed", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=lambda c: "-".join(map(str, c)))
def test_everything_into_everything(saved: Any, case: Any, tmp_path: Path) -> None:
    check(saved, case, "bf16-mixed", tmp_path)


@pytest.mark.parametrize("setting", ["none", "nvme", "stage-2"])
@pytest.mark.parametrize("world", [2, 4])
def test_resume_equals_not_having_stopped(saved: Any, world: int, setting: str, tmp_path: Path) -> None:
    path, _ = saved(world, "nvme", "bf16-mixed")
    whole = run(world, reshards.go_on, tmp_path, setting, "bf16-mixed", None, 2)
    resumed = run(world, reshards.go_on, tmp_path, setting, "bf16-mixed", path, 2)
    assert_same(resumed[0], whole[0])
    assert_same(resumed[-1], whole[0])


@pytest.mark.parametrize("world", [1, 2])
def test_averages_resume(world: int, tmp_path: Path) -> None:
    whole = run(world, reshards.average, tmp_path, None, 2)
    resumed = run(world, reshards.average, tmp_path / "again", tmp_path / "first.ckpt", 2)
    assert_same(resumed[0], whole[0])


def test_a_full_disk_on_one_rank(tmp_path: Path) -> None:
    """All ranks say so, and the checkpoint that was there stays."""
    results = pool(2).run(reshards.fail_on_one_rank, tmp_path)
    for said, left, state in results:
        assert "a.ckpt was not saved: rank 1: [Errno 28] No space left on device" in said
        assert not left
        for name in ("a.ckpt", "b.ckpt"):
            found = reshards.load(0, 1, tmp_path / "load", "nvme", "32-true", tmp_path / name)
            assert_same(found, state)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """Rank 0 alone makes it, and all ranks say why not."""
    for first, second in pool(2).run(reshards.fail_to_make_the_folder, tmp_path):
        assert "a.ckpt was not saved: rank 0: " in first
        assert not second
