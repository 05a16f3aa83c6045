"""A single weight that memory has no room for is made in a file, and nobody can tell from its values."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from driver import CPU
from oracle import bits
from torch import Tensor, nn

from lightning_zinf.config import IOConfig, MemoryConfig, TilingConfig
from lightning_zinf.engine.construction import paged_construction
from lightning_zinf.engine.mapped import LargeTensors
from lightning_zinf.engine.partition import PartitionConfig, partition

ROWS, COLUMNS = 1531, 777  # no multiples of what kernels vectorize by
LIMIT = ROWS * COLUMNS * 4 - 1


class Wide(nn.Module):
    """One weight for each way to make a large one, and small ones."""

    def __init__(self, rows: int = ROWS, columns: int = COLUMNS) -> None:
        super().__init__()
        self.layer = nn.Linear(columns, rows)
        self.embed = nn.Embedding(rows, columns)
        self.drawn = nn.Parameter(torch.randn(rows, columns))
        self.even = nn.Parameter(torch.rand((rows, columns), requires_grad=True))
        self.zero = nn.Parameter(torch.zeros(size=(rows, columns)))
        self.one = nn.Parameter(torch.ones(rows, columns, dtype=torch.float32))
        self.cut = nn.Parameter(torch.empty(rows, columns, device="cpu"))
        nn.init.trunc_normal_(self.cut, std=0.02)
        self.square = nn.Parameter(torch.empty(rows, columns))
        nn.init.orthogonal_(self.square)
        self.tied = nn.Linear(columns, rows, bias=False)
        self.tied.weight = self.embed.weight


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: bits(p).clone() for name, p in model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_random_numbers_are_those_of_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.set_default_dtype(dtype)
    kind = Wide if dtype is torch.float32 else lambda: nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.Embedding(5, 3))
    try:
        torch.manual_seed(7)
        expected, generator = values(kind()), torch.get_rng_state()
        torch.manual_seed(7)
        with LargeTensors([str(tmp_path / "a"), str(tmp_path / "b")], ROWS * COLUMNS * dtype.itemsize - 1) as large:
            model = kind()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same(values(model), expected)
    for name, param in model.named_parameters():
        assert large.made(param) == (param.numel() == ROWS * COLUMNS), name
        assert param.requires_grad
        assert param.is_leaf
    assert [list(folder.iterdir()) for folder in tmp_path.iterdir() if folder.is_dir()] == [[]] * len(
        os.listdir(tmp_path)
    )


def test_what_is_not_a_plain_tensor_on_the_cpu_is_as_ever(tmp_path: Path) -> None:
    with LargeTensors([str(tmp_path)], 15) as large:
        with torch.device("meta"):
            assert torch.empty(100).is_meta
        assert torch.empty(100, device="meta").is_meta
        assert not large.made(torch.empty(15, dtype=torch.uint8))
        assert large.made(torch.empty(16, dtype=torch.uint8))
        assert not large.made(torch.rand(100, generator=torch.Generator().manual_seed(0)))
        assert not large.made(torch.empty(100, out=torch.empty(0)))
        assert torch.empty(()).shape == ()
        assert torch.zeros([4, 5]).tolist() == [[0.0] * 5] * 4
    assert not large.made(torch.empty(100))


def test_memory_does_not_grow_with_the_layer(tmp_path: Path) -> None:
    def anonymous() -> int:
        """Bytes of this process that only swap could hold."""
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmData"].split()[0]) * 1024

    before = anonymous()
    with LargeTensors([str(tmp_path)], 2**20):
        layer = nn.Linear(2**12, 2**13, bias=False)
    assert anonymous() - before < layer.weight.nbytes / 8


@pytest.mark.filterwarnings("ignore:zinf. 6 parameters larger")
@pytest.mark.parametrize("tiles", [None, 2**16])
def test_partitioning_takes_the_values(tiles: int | None, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = values(Wide(300, 200))
    memory, io = MemoryConfig(host_bytes=300_000), IOConfig(tile_numel=4096)
    config = PartitionConfig(
        CPU, "32-true", "nvme", "nvme", (str(tmp_path),), memory=memory, io=io, tiling=TilingConfig(tiles)
    )
    torch.manual_seed(3)
    with paged_construction(config) as pager:
        model = Wide(300, 200)
    assert pager is not None
    assert pager.large is not None
    assert pager.large.made(model.layer.weight)
    assert pager.pages == 0
    config = replace(config, memory=MemoryConfig())
    engine = partition(model, config, list(model.parameters()))
    assert_same(values(model), expected)
    assert not any(param.is_shared() for param in model.parameters())
    engine.dissolve()


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        LargeTensors([str(tmp_path)], 2**20),
        pytest.raises(
            OSError,
            match=r"\(1024, 1024\) of torch.float32 takes 4.0 MiB, more than the 1.0 MiB.*No space left.*nvme_path",
        ) as info,
    ):
        nn.Linear(2**10, 2**10)
    assert info.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
