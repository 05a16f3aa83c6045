"""Tiles over several ranks in a Trainer: checkpoints of any number of ranks, and changes by user code."""

from __future__ import annotations

from pathlib import Path

import pytest
import reshards
import tiled_ranks
import torch
from lightning_cases import assert_same
from pool import pool, run

from lightning_zinf.checkpoint.source import Checkpoint

CASES = [
    ((2, "tiled"), (1, "none")),
    ((1, "none"), (2, "tiled")),
    ((2, "tiled"), (2, "stage-2")),
    ((1, "tiled"), (2, "nvme")),
    ((2, "stage-1"), (1, "tiled")),
    ((4, "tiled"), (2, "tiled")),
]


@pytest.mark.parametrize(
    ("saved", "loaded"), [pytest.param(*c, marks=() if i < 2 else pytest.mark.slow) for i, c in enumerate(CASES)]
)
def test_any_ranks_into_any_others(saved: tuple[int, str], loaded: tuple[int, str], tmp_path: Path) -> None:
    expected = run(saved[0], reshards.save, tmp_path, saved[1], "bf16-mixed")[0]
    with Checkpoint(tmp_path / "half.ckpt") as source:
        parts = [len(stored.places) for stored in source.params()]
        assert (max(parts) > 1) == (saved[1] == "tiled")
    for found in run(loaded[0], reshards.load, tmp_path, loaded[1], "bf16-mixed", tmp_path / "half.ckpt"):
        assert_same(found, expected)


def test_what_rank_0_writes_and_what_all_write(tmp_path: Path) -> None:
    first, second = pool(2).run(tiled_ranks.change, tmp_path)
    for tiled, state in (first, second):
        assert tiled
        assert torch.equal(state["frozen.weight"].view(-1), torch.arange(130 * 130).float())
        assert float(state["blocks.1.0.weight"].min()) == float(state["blocks.1.0.weight"].max()) == 2.0
    assert_same(first[1], second[1])
