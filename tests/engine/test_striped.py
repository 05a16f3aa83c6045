"""State striped over several paths: the same bits, every byte counted, and a path that fails is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from delays import delayed
from driver import Where, session, train_paged
from models import ZOO
from oracle import Recipe, assert_same

from lightning_zinf.config import IOConfig

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
RECIPE = Recipe(steps=3)
IO = IOConfig(tile_numel=4096, threads=2, backend="threads", block_bytes=4096)
PLACES = [
    Where("nvme", "nvme", tight=True),
    Where("nvme", "nvme", aliased=False, tight=True),
    Where("nvme", "nvme"),
    Where("none", "nvme"),
]


@pytest.mark.parametrize("paths", [2, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("where", PLACES, ids=str)
def test_the_same_bits_and_every_byte_counted(where: Where, precision: str, paths: int, tmp_path: Path) -> None:
    expected = train_paged(ZOO["gpt"], tmp_path / "one", where, precision, RECIPE)
    folders = tuple(str(tmp_path / f"disk{number}") for number in range(paths))
    with session(ZOO["gpt"], tmp_path, where, precision, RECIPE, io=IO, nvme=folders) as running:
        assert_same(running.train().result(), expected)
        counters, traffic = running.engine.counters, running.engine.context.nvme.traffic()
        running.engine.context.drain()
        assert sum(read for read, _ in traffic) == counters.nvme_read_bytes > 0
        assert sum(written for _, written in traffic) == counters.nvme_write_bytes > 0
        # Everything that is read and written is many stripes, so no path has much more to do than another.
        for moved in zip(*traffic, strict=True):
            assert max(moved) < 1.25 * min(moved)


@pytest.mark.timeout(120)
def test_paths_of_any_speed(tmp_path: Path) -> None:
    """One of the paths is slow, for each request anew."""
    where = Where("nvme", "nvme", tight=True)
    expected = train_paged(ZOO["gpt"], tmp_path / "one", where, "bf16-mixed", RECIPE)
    folders = tuple(str(tmp_path / f"disk{number}") for number in range(3))
    with session(ZOO["gpt"], tmp_path, where, "bf16-mixed", RECIPE, io=IO, nvme=folders) as running:
        with delayed(running.engine, 0):
            running.train()
            result = running.result()
        assert_same(result, expected)


class FailsOnce:
    """An I/O engine one of whose reads finds the file cut off."""

    def __init__(self, engine: Any, number: int) -> None:
        self._engine, self._left = engine, number

    def read(self, file: Any, offset: int, tensor: Any) -> Any:
        self._left -= 1
        return self._engine.read(file, offset + (file.size if self._left == -1 else 0), tensor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.mark.parametrize("number", [0, 7, 20])
def test_a_path_that_fails_is_named_and_the_run_goes_on(number: int, tmp_path: Path) -> None:
    where = Where("nvme", "nvme", tight=True)
    expected = train_paged(ZOO["gpt"], tmp_path / "one", where, "bf16-mixed", RECIPE)
    folders = tuple(str(tmp_path / f"disk{number}") for number in range(3))
    with session(ZOO["gpt"], tmp_path, where, "bf16-mixed", RECIPE, io=IO, nvme=folders) as running:
        store = running.engine.context.nvme
        store.engines = (store.engines[0], FailsOnce(store.engines[1], number), store.engines[2])
        steps, errors = 0, list[OSError]()
        while steps < RECIPE.steps:
            before, losses = running.number, list(running.losses)
            try:
                running.step()
                steps += 1
            except OSError as error:
                errors.append(error)
                running.engine.reset()
                running.number, running.losses = before, losses
        (said,) = errors
        assert str(said.filename).startswith(folders[1])
        assert "past the end of the file" in str(said)
        assert_same(running.result(), expected)
