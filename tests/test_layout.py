"""Flat buffers: aligned, without overlap, and cut without a gap."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_zinf.layout import PARAMETER_ALIGNMENT, SHARD_ALIGNMENT, FlatLayout, round_up, tile_ranges

SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), max_size=8)
ITEMSIZES = st.sampled_from([1, 2, 4, 8])
LAYOUTS = st.builds(FlatLayout.build, SHAPES, ITEMSIZES, st.integers(1, 9))


@given(SHAPES, ITEMSIZES, st.integers(1, 9))
def test_parameters_are_aligned_in_order_and_apart(
    shapes: list[tuple[int, ...]], itemsize: int, world_size: int
) -> None:
    layout = FlatLayout.build(shapes, itemsize, world_size)
    assert layout.shapes == tuple(shapes)
    assert layout.numels == tuple(math.prod(s) for s in shapes)
    assert layout.numel == sum(layout.numels)
    end = 0
    for offset, numel in zip(layout.offsets, layout.numels, strict=True):
        assert offset * itemsize % PARAMETER_ALIGNMENT == 0
        assert end <= offset < end + PARAMETER_ALIGNMENT // itemsize  # and no gap is larger than it must be
        end = offset + numel
    assert end <= layout.padded_numel
    assert end == 0 or layout.padded_numel - end < SHARD_ALIGNMENT // itemsize * world_size


@given(SHAPES, ITEMSIZES, st.integers(1, 9))
def test_shards_are_equal_whole_blocks_that_cover_the_buffer(
    shapes: list[tuple[int, ...]], itemsize: int, world_size: int
) -> None:
    layout = FlatLayout.build(shapes, itemsize, world_size)
    ranges = [layout.shard_range(rank) for rank in range(world_size)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == layout.padded_numel
    assert all(low[1] == high[0] for low, high in pairwise(ranges))
    assert {stop - start for start, stop in ranges} == {layout.shard_numel}
    # In the narrowest plane, so in every plane.
    assert all(start * itemsize % SHARD_ALIGNMENT == 0 for start, _ in ranges)
    assert layout.shard_numel * itemsize % SHARD_ALIGNMENT == 0
    assert layout.shard_numel > 0


@given(LAYOUTS, st.data())
def test_any_cuts_of_the_buffer_cover_every_parameter_once(layout: FlatLayout, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, layout.padded_numel), max_size=6)))
    edges = [0, *cuts, layout.padded_numel]
    found: list[list[int]] = [[] for _ in layout.shapes]
    for start, stop in pairwise(edges):
        for index, parameter_start, flat_start, numel in layout.overlaps(start, stop):
            assert numel > 0
            assert start <= flat_start
            assert flat_start + numel <= stop
            assert flat_start == layout.offsets[index] + parameter_start
            found[index].extend(range(parameter_start, parameter_start + numel))
    assert found == [list(range(numel)) for numel in layout.numels]


@given(LAYOUTS)
def test_shards_share_the_parameters_out(layout: FlatLayout) -> None:
    pieces = [layout.overlaps(*layout.shard_range(rank)) for rank in range(layout.world_size)]
    assert sum(numel for shard in pieces for *_, numel in shard) == layout.numel


def test_an_empty_range_overlaps_nothing() -> None:
    layout = FlatLayout.build([(100,), (3, 3)], 4)
    assert layout.overlaps(5, 5) == []
    assert layout.overlaps(100, layout.offsets[1]) == []  # padding


def test_an_example() -> None:
    layout = FlatLayout.build([(10, 10), (), (0, 5), (64,)], 2, world_size=2)
    assert layout.offsets == (0, 128, 256, 256)
    assert layout.numels == (100, 1, 0, 64)
    assert layout.padded_numel == 2 * 2048
    assert layout.overlaps(90, 300) == [(0, 90, 90, 10), (1, 0, 128, 1), (3, 0, 256, 44)]


def test_a_buffer_without_parameters_has_a_block_for_each_rank() -> None:
    assert FlatLayout.build([], 4, world_size=3).padded_numel == 3 * 1024


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_does_not_exist_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\)"):
        FlatLayout.build([(3,)], 4, world_size=2).shard_range(rank)


@pytest.mark.parametrize(("itemsize", "world_size"), [(0, 1), (4, 0), (-2, 1), (4, -1)])
def test_sizes_that_make_no_sense_are_refused(itemsize: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        FlatLayout.build([(3,)], itemsize, world_size)


@given(st.integers(0, 2000), st.integers(1, 500))
def test_tiles_cover_without_overlap(numel: int, tile: int) -> None:
    ranges = tile_ranges(numel, tile)
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(numel))
    assert all(stop - start == tile for start, stop in ranges[:-1])
    assert all(0 < stop - start <= tile for start, stop in ranges)


@pytest.mark.parametrize("tile", [0, -1])
def test_tiles_of_nothing_are_refused(tile: int) -> None:
    with pytest.raises(ValueError, match="tile_numel must be positive"):
        tile_ranges(10, tile)


@given(st.integers(0, 10**12), st.integers(1, 10**6))
def test_rounding_up_is_the_least_multiple(value: int, multiple: int) -> None:
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert value <= rounded < value + multiple
