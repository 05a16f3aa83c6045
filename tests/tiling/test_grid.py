"""Arithmetic of tiles: every element is in one of them, and none is too large."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_zinf.checkpoint.manifest import Buffer, Param, Stored
from lightning_zinf.layout import Part
from lightning_zinf.parameters import Origin
from lightning_zinf.tiling.grid import Grid, fit

sizes = st.integers(1, 40)


def elements(part: Part) -> list[int]:
    return [i for start, numel in part.runs(0, part.numel) for i in range(start, start + numel)]


@settings(deadline=None)
@given(height=sizes, width=sizes, rows=sizes, columns=sizes)
def test_blocks_cover_a_matrix(height: int, width: int, rows: int, columns: int) -> None:
    grid = Grid.splits(height, width, rows, columns)
    matrix = torch.arange(height * width).view(height, width)
    assert len(grid.rows) <= rows
    assert len(grid.columns) <= columns
    found: list[int] = []
    parts, shapes = grid.parts(), grid.shapes((width,))
    for i, j in itertools.product(range(len(grid.rows)), range(len(grid.columns))):
        part, shape = parts[grid.index(i, j)], shapes[grid.index(i, j)]
        block = matrix[slice(*grid.rows[i]), slice(*grid.columns[j])]
        assert elements(part) == block.flatten().tolist()
        assert tuple(block.shape) == shape
        assert part.numel == math.prod(shape)
        found += elements(part)
    assert sorted(found) == list(range(height * width))


@given(
    height=sizes,
    width=sizes,
    itemsize=st.sampled_from([2, 4]),
    limit=st.integers(1, 4000),
    columns_first=st.booleans(),
    both=st.booleans(),
)
def test_fit_keeps_to_the_limit(
    height: int, width: int, itemsize: int, limit: int, columns_first: bool, both: bool
) -> None:
    grid = fit(height, width, itemsize, limit, columns_first=columns_first, both=both)
    line = (height if columns_first else width) * itemsize
    if grid is None:
        assert line > limit
        assert not both or limit < itemsize
        return
    assert max(part.numel for part in grid.parts()) * itemsize <= limit
    assert sum(part.numel for part in grid.parts()) == height * width
    if line <= limit:  # what may stay together does
        assert len(grid.rows if columns_first else grid.columns) == 1


@settings(deadline=None)
@given(height=sizes, width=sizes, rows=sizes, columns=sizes, data=st.data())
def test_parts_are_found_again(height: int, width: int, rows: int, columns: int, data: st.DataObject) -> None:
    """Whatever range of a parameter is asked for is put together from its parts, in order."""
    numel = height * width
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    grid = Grid.splits(height, width, rows, columns)
    whole = torch.randperm(numel).view(height, width)
    places, flat, offset = [], [], 7
    for number, part in enumerate(grid.parts()):
        buffer = Buffer(str(number), 0, {}, ())
        places.append((buffer, Param(("a",), (height, width), offset, "F32", part)))
        values = torch.empty(offset + part.numel, dtype=whole.dtype)
        origin = Origin(nn.Parameter(torch.empty(0)), (height, width), part)
        values[offset:] = origin.of(whole).reshape(-1)
        flat.append(values)
        cut = torch.empty(part.numel, dtype=whole.dtype)
        origin.cut(whole, 0, cut)
        assert torch.equal(cut, values[offset:])
        offset += 3
    found = [flat[int(b.name)][low : low + n] for b, low, n in Stored(tuple(places)).runs(start, stop)]
    assert torch.equal(torch.cat([torch.empty(0, dtype=whole.dtype), *found]), whole.view(-1)[start:stop])


def test_steps_are_round_where_they_can_be() -> None:
    grid = fit(1000, 64, 4, 256 * 200, columns_first=False, both=True)
    assert grid is not None
    assert {bottom - top for top, bottom in grid.rows[:-1]} == {192}
