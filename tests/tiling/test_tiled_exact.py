"""Tiled training has the bits of the same tiles in plain PyTorch, wherever they live, and on any number of ranks."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import ranks
import torch
from driver import Where, session, train_paged
from oracle import Recipe, Result, assert_same, train_plain
from pool import pool
from tiled_models import TILED
from together import Setting, train_together

RECIPE = Recipe(steps=4)
PLACES = [
    Where("none", "none"),
    Where("nvme", "nvme", tight=True),
    Where("cpu", "nvme", aliased=False, tight=True),
]
MORE_PLACES = [
    Where("none", "nvme"),
    Where("nvme", "cpu"),
    Where("nvme", "nvme", prefetch=False),
    Where("none", "none", aliased=False),
    Where("none", "cpu", aliased=False),
    Where("nvme", "nvme", aliased=False, tight=True),
]
SETTINGS = [
    (Setting(2, 1), Where("none", "none")),
    (Setting(2, 2), Where("none", "nvme")),
    (Setting(2, 3), Where("nvme", "nvme", tight=True)),
]
MORE_SETTINGS = [
    (Setting(2, 1), Where("none", "nvme")),
    (Setting(2, 2), Where("none", "cpu", aliased=False)),
    (Setting(2, 3), Where("none", "none")),
    (Setting(2, 3), Where("cpu", "nvme", aliased=False, tight=True)),
    (Setting(4, 3, shard=2), Where("nvme", "nvme", tight=True)),
]

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch's optimizers have no fma here"
)


@functools.cache
def expected(name: str, precision: str) -> Result:
    return train_plain(TILED[name], precision, RECIPE)


def check(name: str, precision: str, where: Where, folder: Path) -> None:
    assert_same(train_paged(TILED[name], folder, where, precision, RECIPE), expected(name, precision))


@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("name", ["tiled-gpt", "tiled-conv1d"])
def test_every_tier(name: str, where: Where, tmp_path: Path) -> None:
    check(name, "bf16-mixed", where, tmp_path)


@pytest.mark.parametrize("name", [n for n in TILED if n not in ("tiled-gpt", "tiled-conv1d")])
def test_every_kind_of_layer(name: str, tmp_path: Path) -> None:
    check(name, "32-true", PLACES[1], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", TILED)
def test_all_of_them_everywhere(name: str, precision: str, where: Where, tmp_path: Path) -> None:
    check(name, precision, where, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("where", MORE_PLACES, ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", TILED)
def test_more_places(name: str, precision: str, where: Where, tmp_path: Path) -> None:
    check(name, precision, where, tmp_path)


def check_ranks(name: str, precision: str, setting: Setting, where: Where, folder: Path) -> None:
    found = pool(setting.world).run(ranks.train, name, folder, where, precision, RECIPE, setting)
    assert_same(found[0][0], train_together(TILED[name], precision, RECIPE, setting))
    for result, _ in found[1:]:
        result.losses = found[0][0].losses
        assert_same(result, found[0][0])


@pytest.mark.parametrize(("setting", "where"), SETTINGS, ids=str)
def test_every_stage_with_two_ranks(setting: Setting, where: Where, tmp_path: Path) -> None:
    check_ranks("tiled-conv1d", "bf16-mixed", setting, where, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "where"), [*SETTINGS, *MORE_SETTINGS], ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", TILED)
def test_more_ranks(name: str, precision: str, setting: Setting, where: Where, tmp_path: Path) -> None:
    check_ranks(name, precision, setting, where, tmp_path)


OPTIMIZERS = {
    "momentum": Recipe(steps=3, optimizer=torch.optim.SGD, options={"momentum": 0.9}),
    "adagrad": Recipe(steps=3, optimizer=torch.optim.Adagrad),
    "clip-value": Recipe(steps=3, clip_norm=None, clip_value=0.003),
    "three-micro-batches": Recipe(steps=3, accumulate=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_other_recipes(recipe: Recipe, tmp_path: Path) -> None:
    case = TILED["tiled-gpt"]
    found = train_paged(case, tmp_path, Where("nvme", "nvme", tight=True), "bf16-mixed", recipe)
    assert_same(found, train_plain(case, "bf16-mixed", recipe))


@pytest.mark.parametrize("name", ["tiled-gpt", "tiled-adapted"])
def test_nothing_is_gathered_whole(name: str, tmp_path: Path) -> None:
    """Tiles stay within the limit, and no tensor that autograd saved has to be fetched again."""
    case = TILED[name]
    assert case.tile_bytes is not None
    with session(case, tmp_path, Where("nvme", "nvme"), "bf16-mixed", RECIPE) as running:
        tiled = running.engine.tiled
        assert tiled
        for parameter in tiled:
            sizes = [tile.numel() * 2 for tile in parameter.tiles]
            assert max(sizes) <= case.tile_bytes
            assert sum(sizes) == parameter.param.numel() * 2
        before = running.engine.counters.refills
        running.train()
        assert running.engine.counters.refills == before
        assert all(parameter.opened is None for parameter in tiled)
