"""Delays in any stage of any rank never stop the others and never change a bit; a trace has every collective."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import ranks
from driver import Where
from models import ZOO
from oracle import assert_same
from pool import pool
from together import Setting, train_together

PLACES = [
    Where("none", "none"),
    Where("nvme", "nvme", tight=True),
    Where("nvme", "nvme", aliased=False),
    Where("none", "nvme", early=True),
    Where("nvme", "nvme", tight=True, early=True),
    Where("nvme", "nvme", aliased=False, early=True),
]


def check(where: Where, stage: int, seed: int, folder: Path) -> None:
    setting = Setting(2, stage)
    expected = train_together(ZOO["gpt"], "bf16-mixed", ranks.delayed_recipe(where), setting)
    found = pool(2).run(ranks.train_delayed, folder, where, setting, seed)
    assert_same(found[0][0], expected)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("where", PLACES, ids=str)
def test_slow_ranks_change_nothing(where: Where, tmp_path: Path) -> None:
    check(where, 3, 0, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("where", PLACES, ids=str)
def test_slow_ranks_change_nothing_ever(where: Where, stage: int, seed: int, tmp_path: Path) -> None:
    if stage < 3 and where.params != "none":
        where = replace(where, params="none", tight=False)
    check(where, stage, seed, tmp_path)
