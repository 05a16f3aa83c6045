"""Updates in backward on several ranks: shards are updated as gradients are reduced, with the bits of later updates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import early_ranks
import pytest
from driver import Where
from models import ZOO
from oracle import Recipe, assert_same
from pool import pool
from tiled_models import TILED
from together import Setting, train_together

PLACES = {
    2: [Where("none", "nvme", early=True), Where("none", "nvme", aliased=False, early=True)],
    3: [
        Where("none", "none", early=True),
        Where("nvme", "nvme", tight=True, early=True),
        Where("none", "none", aliased=False, early=True),
        Where("cpu", "nvme", aliased=False, tight=True, early=True),
        Where("nvme", "cpu", aliased=False, tight=True, early=True),
    ],
}
STAGES = [(where, stage) for stage, places in PLACES.items() for where in places]
PLAIN = Recipe(steps=4, clip_norm=None, accumulate=1)
ACCUMULATE = Recipe(steps=3, clip_norm=None, accumulate=2)
NVME = Where("nvme", "nvme", tight=True, prefetch=False, early=True)
STATE = Where("none", "nvme", prefetch=False, early=True)


def check(
    name: str, precision: str, where: Where, setting: Setting, folder: Path, recipe: Recipe = PLAIN, *, wait: bool
) -> list[list[set[int]]]:
    """Compare with the oracle; return what each rank updated in the backward of each step."""
    found = pool(setting.world).run(early_ranks.train, name, folder, where, precision, recipe, setting, wait)
    assert_same(found[0][0], train_together({**ZOO, **TILED}[name], precision, recipe, setting))
    for result, _, _ in found[1:]:
        result.losses = found[0][0].losses
        assert_same(result, found[0][0])
    for _, updated, may in found:
        assert updated[0] == set()  # watched
        assert all(units <= may for units in updated)
        if wait:
            assert all(units == may for units in updated[2:])  # agreed on by the end of the first backward
    return [updated for _, updated, _ in found]


@pytest.mark.parametrize(("where", "stage"), STAGES, ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_ranks(precision: str, where: Where, stage: int, tmp_path: Path) -> None:
    where = replace(where, prefetch=False)  # else one rank may need another while that waits for a reduction
    for updated in check("gpt", precision, where, Setting(2, stage), tmp_path, wait=True):
        assert min(len(units) for units in updated[1:]) >= 2


@pytest.mark.parametrize("name", ["mixture", "late", "gpt-recompute-reentrant"])
def test_ranks_that_differ(name: str, tmp_path: Path) -> None:
    check(name, "bf16-mixed", PLACES[3][1], Setting(2, 3), tmp_path, wait=False)
    check(name, "32-true", PLACES[2][0], Setting(2, 2), tmp_path / "2", ACCUMULATE, wait=False)


def test_accumulated_gradients_are_used_with_the_last_micro_batch(tmp_path: Path) -> None:
    check("gpt", "bf16-mixed", NVME, Setting(2, 3), tmp_path, ACCUMULATE, wait=True)


def test_stage_1_reduces_when_the_optimizer_steps(tmp_path: Path) -> None:
    updated = check("gpt", "bf16-mixed", PLACES[2][0], Setting(2, 1), tmp_path, wait=False)
    assert updated == [[set()] * PLAIN.steps] * 2


@pytest.mark.parametrize(("stage", "shard"), [(2, 1), (3, 1)])
def test_a_copy_of_the_model_on_each_rank(stage: int, shard: int, tmp_path: Path) -> None:
    where = NVME if stage == 3 else STATE
    for updated in check("gpt", "bf16-mixed", where, Setting(2, stage, shard), tmp_path, wait=True):
        assert min(len(units) for units in updated[1:]) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", [Setting(4, 3), Setting(4, 2), Setting(4, 3, shard=2), Setting(4, 2, shard=2)], ids=str
)
@pytest.mark.parametrize("name", ["gpt", "mixture", "late"])
def test_four_ranks(name: str, setting: Setting, tmp_path: Path) -> None:
    where = NVME if setting.stage == 3 else STATE
    check(name, "bf16-mixed", where, setting, tmp_path, wait=name == "gpt")


@pytest.mark.slow
@pytest.mark.parametrize(("where", "stage"), STAGES, ids=str)
@pytest.mark.parametrize("name", [*ZOO, *TILED])
def test_every_model(name: str, where: Where, stage: int, tmp_path: Path) -> None:
    check(name, "bf16-mixed", where, Setting(2, stage), tmp_path, wait=False)


@pytest.mark.parametrize(("where", "stage"), STAGES, ids=str)
def test_weights_of_before_and_after_an_update_are_never_used(where: Where, stage: int, tmp_path: Path) -> None:
    setting = Setting(2, stage)
    first, second = pool(2).run(early_ranks.mix, tmp_path, replace(where, tight=False, prefetch=False), PLAIN, setting)
    assert_same(first, train_together(ZOO["gpt"], "bf16-mixed", PLAIN, setting))
    second.losses = first.losses
    assert_same(second, first)


def test_updates_move_nothing_between_ranks(tmp_path: Path) -> None:
    moved = []
    for early in (False, True):
        where = Where("nvme", "nvme", prefetch=False, early=early)
        found = pool(2).run(early_ranks.traffic, tmp_path / str(early), where, PLAIN, Setting(2, 3))
        assert found[0] == found[1]
        moved.append(found[0])
    assert moved[0] == moved[1]
    assert min(moved[0].values()) > 0


@pytest.mark.parametrize("where", [NVME, STATE], ids=str)
def test_a_unit_that_one_rank_needs_late_is_left_to_forward_by_all(where: Where, tmp_path: Path) -> None:
    stage = 3 if where.params == "nvme" else 2
    free = pool(2).run(early_ranks.late, tmp_path / "a", where, Setting(2, stage), [False] * 3)
    late = pool(2).run(early_ranks.late, tmp_path / "b", where, Setting(2, stage), [True] * 3)
    for rank in range(2):
        assert free[rank] == [set(), {1, 2}, {1, 2}]
        assert late[rank] == [set(), {2}, {2}]


@pytest.mark.parametrize("where", [NVME, STATE], ids=str)
def test_a_graph_that_changes_on_one_rank_is_refused_by_name(where: Where, tmp_path: Path) -> None:
    setting = Setting(2, 3 if where.params == "nvme" else 2)
    first, second = pool(2).run(early_ranks.late, tmp_path, where, setting, [False, False, True])
    if where.params == "nvme":
        assert "the weights of unit 'layers.1' are used in backward after its gradients were complete" in second
    else:  # autograd tells by itself
        assert "has been modified by an inplace operation" in second
    assert first == second  # all raise the same


def test_ranks_that_disagree_on_when_to_update_are_told(tmp_path: Path) -> None:
    for said in pool(2).run(early_ranks.disagree, tmp_path, Setting(2, 3)):
        assert said.startswith("rank 1 can no longer take optimizer steps in backward")
