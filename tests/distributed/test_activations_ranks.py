"""Activations on several ranks: every rank recomputes and offloads its own, and the bits stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
from driver import Where
from models import ZOO
from oracle import Recipe, assert_same
from pool import pool
from test_matrix import RECIPE, check
from together import Setting, train_together

AGAIN = Where("nvme", "nvme", tight=True, recompute=True, activations="nvme", activation_bytes=8192)
PLACES = {
    1: [Where(recompute=True, activations="nvme", activation_bytes=8192)],
    2: [Where("none", "cpu", aliased=False, recompute=True, activations="cpu")],
    3: [
        AGAIN,
        Where("nvme", "nvme", tight=True, recompute=True),
        Where("nvme", "nvme", tight=True, activations="nvme", activation_bytes=40960),
        Where("nvme", "nvme", aliased=False, tight=True, recompute=True, activations="nvme", activation_bytes=8192),
    ],
}


def moved(running: Any) -> dict[str, Any]:
    """What a rank brought away; nothing of it may be left."""
    store = running.engine.context.activations
    store.drain()
    assert store.live == store.resting_bytes == 0
    counters = running.engine.counters
    back = counters.activation_read_bytes + counters.activation_reused_bytes
    return {"away": counters.activation_write_bytes, "back": back}


def test_two_ranks_bring_away_their_own(tmp_path: Path) -> None:
    recipe = Recipe(steps=2)
    found = pool(2).run(ranks.train, "gpt", tmp_path, AGAIN, "bf16-mixed", recipe, Setting(2, 3), moved)
    assert_same(found[0][0], train_together(ZOO["gpt"], "bf16-mixed", recipe, Setting(2, 3)))
    inputs = 3 * 4096 * recipe.steps * recipe.accumulate
    assert [seen for _, seen in found] == 2 * [{"away": inputs, "back": inputs}]


@pytest.mark.slow
@pytest.mark.parametrize(("where", "stage"), [(w, s) for s, ws in PLACES.items() for w in ws], ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["gpt", "encoder-decoder", "mixture", "late", "attention", "bfloat16-born"])
def test_two_ranks_have_the_bits_of_the_oracle(
    name: str, precision: str, where: Where, stage: int, tmp_path: Path
) -> None:
    check(name, precision, where, Setting(2, stage), tmp_path)


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    check("gpt", "bf16-mixed", AGAIN, Setting(4, 3, shard=2), tmp_path, RECIPE)
