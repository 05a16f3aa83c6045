"""Bytes between ranks are those of the formula: 2P in stages 1 and 2, at most 3P in stage 3."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
from driver import Where
from oracle import Recipe
from pool import pool
from together import Setting

STEPS = 3


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bytes_of_a_step(stage: int, precision: str, tmp_path: Path) -> None:
    recipe = Recipe(steps=STEPS, accumulate=1)
    where = Where("none", "none", prefetch=True)
    found = pool(2).run(ranks.train, "mlp", tmp_path, where, precision, recipe, Setting(2, stage), ranks.traffic)
    for _, seen in found:
        assert seen["reduce_scatter_bytes"] == STEPS * seen["weights"] == STEPS * seen["planned_reduce_bytes"]
        assert seen["planned_gather_bytes"] == seen["weights"] * (2 if stage == 3 else 1)
        assert seen["planned_state"] == seen["state"]
        if stage < 3:
            assert seen["all_gather_bytes"] == STEPS * seen["weights"]
            assert seen["resident"] == seen["weights"]
        else:
            assert seen["all_gather_bytes"] <= 2 * STEPS * seen["weights"]
            assert seen["all_gather_bytes"] + seen["reused_bytes"] >= 2 * STEPS * seen["weights"]
            assert seen["resident"] == seen["weights"] // 2
        assert seen["state"] == seen["elements"] // 2 * (10 if precision == "bf16-mixed" else 8)
