"""A model that the ranks build together: each holds its slices and a budget, and has the values that it always had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import buildings
import pytest
import torch
from buildings import MODELS, WEIGHT
from oracle import bits
from pool import Pool, pool
from torch import Tensor

from lightning_zinf.engine.shared_pages import SHARED_BUDGET


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(bits(found[name]), bits(value)), name


def check(size: int, name: str, offload: str, seeds: bool, folder: Path, stage: int = 3, **options: Any) -> None:
    expected, generator = buildings.plainly(name)
    found = pool(size).run(buildings.build, folder, name, offload, options, seeds, stage)
    for rank, seen in enumerate(found):
        assert seen["names"] == list(expected)
        assert_equal(seen["partitioned"], expected)
        if rank == 0 or not seeds:
            assert_equal(seen["built"], expected)
            assert torch.equal(seen["generator"], generator)


@pytest.mark.parametrize("offload", ["none", "nvme"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_random_numbers_are_those_of_plain_construction(name: str, offload: str, tmp_path: Path) -> None:
    check(2, name, offload, False, tmp_path)


@pytest.mark.parametrize("name", ["deep", "late"])
def test_rank_0_s_draw_wins(name: str, tmp_path: Path) -> None:
    check(2, name, "cpu", True, tmp_path)


def test_four_ranks(tmp_path: Path) -> None:
    check(4, "deep", "none", True, tmp_path)
    check(4, "late", "nvme", True, tmp_path, shard_size=2)


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_that_keep_weights_whole_build_them_whole(stage: int, tmp_path: Path) -> None:
    expected, _ = buildings.plainly("deep")
    for seen in pool(2).run(buildings.build, tmp_path, "deep", "none", {}, True, stage):
        assert seen["pages"] == 0
        assert_equal(seen["partitioned"], expected)


def test_parameters_larger_than_the_budget(tmp_path: Path) -> None:
    """Two of them in one operation do not drive each other out."""
    check(2, "late", "none", False, tmp_path, budget=WEIGHT // 2)
    check(2, "deep", "nvme", True, tmp_path, budget=WEIGHT // 2)


@pytest.mark.parametrize("memory", [[100_000, 400_000], [400_000, 100_000]])
def test_slices_in_memory_on_one_rank_and_on_nvme_on_the_other(memory: list[int], tmp_path: Path) -> None:
    """Ranks with unequal room: a page rests where each rank has it, and has rank 0's values on both."""
    expected, _ = buildings.plainly("padded")
    found = pool(2).run(buildings.keep_unequally, tmp_path, memory)
    places = [seen["on_nvme"] for seen in found]
    assert list(places[0]) == list(places[1])
    assert any(a != b for a, b in zip(places[0].values(), places[1].values(), strict=True))
    for seen, room in zip(found, memory, strict=True):
        assert 0 < seen["kept"] <= room
        assert not all(seen["on_nvme"].values())
        assert_equal(seen["built"], {name: expected[name] for name in seen["built"]})
        assert_equal(seen["partitioned"], expected)


@pytest.mark.parametrize("kind", ["read", "write", "lost write"])
def test_what_one_rank_does_alone(kind: str, tmp_path: Path) -> None:
    """What rank 0 makes of a parameter is what counts, as if it were sent at the end."""
    expected, _ = buildings.plainly("late")
    if kind == "write":
        expected["blocks.0.weight"].fill_(5.0)
    for seen in pool(2).run(buildings.unequal, tmp_path, kind):
        assert_equal(seen["values"], expected)
        assert seen["said"] == []
        if kind == "read":
            assert seen["read"] == float(expected["blocks.0.weight"].sum())


@pytest.mark.parametrize("kind", ["throwaway", "throwaway of the same kind"])
def test_what_one_rank_builds_alone_has_each_build_its_own(kind: str, tmp_path: Path) -> None:
    expected, _ = buildings.plainly("late")
    for seen in pool(2).run(buildings.unequal, tmp_path, kind):
        assert_equal(seen["values"], expected)
        assert seen["said"]


@pytest.mark.parametrize("kind", ["throwaway, then a barrier", "small throwaway, then a barrier"])
def test_after_a_barrier_ranks_build_together_again(kind: str, tmp_path: Path) -> None:
    expected, _ = buildings.plainly("late")
    for rank, seen in enumerate(pool(2).run(buildings.unequal, tmp_path, kind)):
        assert_equal(seen["values"], expected)
        assert bool(seen["said"]) == (rank == 0 and "small" not in kind)


def test_an_exception_on_one_rank_reaches_all(tmp_path: Path) -> None:
    said = pool(2).run(buildings.fail, tmp_path)
    assert said[1] == "broken on purpose"
    assert "rank 1 stopped in configure_model with RuntimeError: broken on purpose" in said[0]


def test_parameters_outside_of_the_model_become_ordinary(tmp_path: Path) -> None:
    expected, _ = buildings.plainly("plain")
    for was_cut, values, pages in pool(2).run(buildings.outside, tmp_path):
        assert was_cut
        assert pages == 0
        assert_equal(values, expected)


def test_setting_up_again_after_a_failure(tmp_path: Path) -> None:
    expected, _ = buildings.plainly("plain")
    for said, values in pool(2).run(buildings.partition_again, tmp_path):
        assert "float64" in said
        assert_equal(values, expected)


def check_memory(size: int, offload: str, folder: Path) -> None:
    """A rank grows by its slices, the budget, and copies of a weight: in the new layer, in gloo, and on their way.

    Partitioning adds the slots for gathered weights, which training has too.
    """
    layers, width = 32, 1024
    weight = width * width * 4
    whole = layers * weight
    fresh = Pool(size)  # a heap with room that was used before does not give back what is freed
    try:
        found = fresh.run(buildings.measure, folder, layers, width, offload)
    finally:
        fresh.close()
    for seen in found:
        assert seen["pages"] * weight >= whole - SHARED_BUDGET
        slices = 0 if offload == "nvme" else whole // size
        assert seen["building"] <= slices + SHARED_BUDGET + 2 * weight < whole
        assert seen["partitioning"] <= slices + SHARED_BUDGET + seen["slots"] + 3 * weight < whole
        assert seen["shards"] == slices


def test_memory_of_two_ranks(tmp_path: Path) -> None:
    check_memory(2, "none", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "offload"), [(2, "nvme"), (4, "none"), (4, "nvme")])
def test_memory_of_more_ranks_and_on_nvme(size: int, offload: str, tmp_path: Path) -> None:
    check_memory(size, offload, tmp_path)
