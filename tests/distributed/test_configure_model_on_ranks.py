"""A model built in ``configure_model`` by several ranks trains to the bits of one that is built in ``__init__``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import configured
import pytest
import torch
from pool import pool

SMALL = 300_000
"""Bytes of budget: four weights."""
SETTINGS: dict[str, dict[str, Any]] = {
    "stage-1": {"stage": 1},
    "stage-3": {},
    "nvme": {"offload_params": "nvme", "offload_optimizer": "nvme"},
}


def budgeted(
    rank: int, size: int, folder: Path, kind: Any, strategy: dict[str, Any], options: dict[str, Any]
) -> tuple[Any, int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_zinf.engine.construction.SHARED_BUDGET", SMALL)
        return configured.fit(rank, size, folder, kind, strategy, options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_bits_as_built_in_init(setting: str, precision: str, tmp_path: Path) -> None:
    options = {"precision": precision}
    ours = pool(2).run(budgeted, tmp_path, configured.Configured, SETTINGS[setting], options)
    early = pool(2).run(budgeted, tmp_path, configured.Early, SETTINGS[setting], options)
    for weights, cut in ours:
        assert (cut > 0) == (SETTINGS[setting].get("stage") is None)
        for name, value in early[0][0].items():
            assert torch.equal(weights[name], value), name


@pytest.mark.parametrize("kind", [configured.Alone, configured.Downloads])
def test_what_rank_0_does_alone_changes_no_bit(kind: Any, tmp_path: Path) -> None:
    expected = pool(2).run(budgeted, tmp_path, configured.Configured, {}, {})
    for weights, pages in pool(2).run(budgeted, tmp_path, kind, {}, {}):
        assert pages > 0
        for name, value in expected[0][0].items():
            assert torch.equal(weights[name], value), name


def test_an_exception_on_one_rank_reaches_all(tmp_path: Path) -> None:
    for said, steps, _ in pool(2).run(configured.break_and_fit, tmp_path):
        assert "broken on purpose" in said
        assert steps == 2
