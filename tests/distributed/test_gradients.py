"""User code that reads or clips ``p.grad`` between backward and step raises; it never quietly does nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
from models import ZOO
from oracle import Recipe, assert_same
from pool import pool
from together import Setting, train_together


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_are_guarded(stage: int, precision: str, tmp_path: Path) -> None:
    setting = Setting(2, stage)
    for rank, (said, result) in enumerate(pool(2).run(ranks.touch_gradients, tmp_path, precision, setting)):
        assert len(said) == 24
        assert all("keeps this gradient elsewhere" in text for text in said), said
        if rank == 0:
            assert_same(result, train_together(ZOO["gpt"], precision, Recipe(steps=3), setting))


def test_copies_of_a_model_have_their_gradients_in_memory(tmp_path: Path) -> None:
    """Each rank has the whole model, as one alone, whose gradients would go to NVMe; but these have to be added up."""
    setting = Setting(2, shard=1)
    for said in pool(2).run(ranks.set_up_in_little_memory, tmp_path, setting, 11 * 2**19):
        assert "the model does not fit: a step needs" in said
    assert pool(2).run(ranks.set_up_in_little_memory, tmp_path, setting, 2**30) == ["", ""]
