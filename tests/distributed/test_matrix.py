"""Training on several ranks has the bits of a serial data-parallel oracle, in every stage and wherever things live."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import ranks
import torch
from driver import Where
from models import ZOO
from oracle import Recipe, Result, assert_same
from pool import pool
from together import Setting, train_together

PRECISIONS = ["32-true", "bf16-mixed"]
PLACES = {
    1: [Where("none", "none"), Where("none", "nvme")],
    2: [Where("none", "none"), Where("none", "nvme"), Where("none", "cpu", aliased=False)],
    3: [
        Where("none", "none"),
        Where("nvme", "nvme", tight=True),
        Where("none", "none", aliased=False),
        Where("cpu", "nvme", aliased=False, tight=True),
        Where("nvme", "cpu", aliased=False, tight=True),
    ],
}
RECIPE = Recipe(steps=4)

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch's optimizers have no fma here"
)


@functools.cache
def expected(name: str, precision: str, setting: Setting) -> Result:
    return train_together(ZOO[name], precision, RECIPE, setting)


def check(
    name: str, precision: str, where: Where, setting: Setting, folder: Path, recipe: Recipe | None = None
) -> None:
    found = pool(setting.world).run(ranks.train, name, folder, where, precision, recipe or RECIPE, setting)
    if recipe is None:
        assert_same(found[0][0], expected(name, precision, setting))
    else:
        assert_same(found[0][0], train_together(ZOO[name], precision, recipe, setting))
    for result, _ in found[1:]:
        result.losses = found[0][0].losses
        assert_same(result, found[0][0])


@pytest.mark.parametrize(("where", "stage"), [(w, s) for s, ws in PLACES.items() for w in ws], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["gpt", "mixture", "late"])
def test_two_ranks(name: str, precision: str, where: Where, stage: int, tmp_path: Path) -> None:
    check(name, precision, where, Setting(2, stage), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "stage"), [(w, s) for s, ws in PLACES.items() for w in ws], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("gpt", "mixture", "late")])
def test_two_ranks_and_every_model(name: str, precision: str, where: Where, stage: int, tmp_path: Path) -> None:
    check(name, precision, where, Setting(2, stage), tmp_path)


@pytest.mark.parametrize(
    "setting", [Setting(4, 3), Setting(4, 2), Setting(4, 3, shard=2), Setting(4, 1, shard=2)], ids=str
)
def test_four_ranks(setting: Setting, tmp_path: Path) -> None:
    where = Where("nvme", "nvme", tight=True) if setting.stage == 3 else Where("none", "none")
    check("gpt", "bf16-mixed", where, setting, tmp_path)


@pytest.mark.parametrize(("where", "stage"), [(PLACES[2][0], 2), (PLACES[3][0], 3), (PLACES[3][1], 3)], ids=str)
def test_a_copy_of_the_model_on_each_rank(where: Where, stage: int, tmp_path: Path) -> None:
    check("gpt", "bf16-mixed", where, Setting(2, stage, shard=1), tmp_path)


@pytest.mark.parametrize(("where", "stage"), [(PLACES[1][0], 1), (PLACES[2][1], 2), (PLACES[3][1], 3)], ids=str)
@pytest.mark.parametrize("name", ["gpt", "mixture"])
def test_float16(name: str, where: Where, stage: int, tmp_path: Path) -> None:
    check(name, "16-mixed", where, Setting(2, stage), tmp_path)


AHEAD = [
    (Where("none", "none", ahead=True), Setting(2, 2)),
    (Where("nvme", "nvme", tight=True, ahead=True), Setting(2, 3)),
    (Where("none", "nvme", aliased=False, ahead=True), Setting(2, 3)),
    (Where("none", "nvme", ahead=True), Setting(2, 2, shard=1)),
]


@pytest.mark.parametrize(("where", "setting"), AHEAD, ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_norms_of_shards_are_summed_as_they_are_reduced(
    accumulate: int, where: Where, setting: Setting, tmp_path: Path
) -> None:
    recipe = Recipe(steps=3, accumulate=accumulate)
    found = pool(2).run(ranks.train, "gpt", tmp_path, where, "bf16-mixed", recipe, setting, ranks.norms)
    assert_same(found[0][0], train_together(ZOO["gpt"], "bf16-mixed", recipe, setting))
    for _, (ahead, later, shard) in found:
        assert (ahead, later) == (recipe.steps * shard, 0)


OPTIMIZERS = {
    "momentum": Recipe(steps=3, optimizer=torch.optim.SGD, options={"momentum": 0.9}),
    "plain": Recipe(steps=3, optimizer=torch.optim.SGD),
    "adagrad": Recipe(steps=3, optimizer=torch.optim.Adagrad),
    "asgd": Recipe(steps=3, optimizer=torch.optim.ASGD, options={"t0": 1}),
    "amsgrad": Recipe(steps=3, optimizer=torch.optim.AdamW, options={"amsgrad": True}),
}


@pytest.mark.parametrize(("where", "stage"), [(PLACES[2][1], 2), (PLACES[3][1], 3)], ids=str)
@pytest.mark.parametrize("recipe", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_other_optimizers(recipe: Recipe, where: Where, stage: int, tmp_path: Path) -> None:
    check("gpt", "bf16-mixed" if stage == 3 else "32-true", where, Setting(2, stage), tmp_path, recipe)
