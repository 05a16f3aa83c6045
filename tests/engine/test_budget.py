"""Pages stay within their budget, and how small it is changes no result."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from driver import CPU, Where, session, tight_memory, train_paged
from hypothesis import given, settings
from hypothesis import strategies as st
from models import WIDTH, ZOO, Case, vectors
from oracle import Recipe, Result, assert_same
from torch import nn

from lightning_zinf.config import IOConfig, MemoryConfig
from lightning_zinf.engine.partition import PartitionConfig, engine_of, partition, residency

HOST = Where("nvme", "nvme", tight=True)
DEVICE = Where("nvme", "nvme", aliased=False, tight=True)
PAGED = [HOST, DEVICE, Where("cpu", "cpu", aliased=False, tight=True), Where("nvme", "cpu")]
RECIPE = Recipe(steps=3)


@pytest.mark.parametrize("where", PAGED, ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["mlp", "gpt", "gpt-recompute", "mixture", "late"])
def test_slots_never_take_more_than_their_budget(name: str, precision: str, where: Where, tmp_path: Path) -> None:
    with session(ZOO[name], tmp_path, where, precision, RECIPE) as running:
        context = running.engine.context
        rings = [ring for ring in (context._ring, context._staging) if ring is not None]
        assert len(rings) == 1 + (where is DEVICE)
        running.train().result()
        for ring in rings:
            assert 0 < ring.peak <= ring.budget or context.counters.overcommits > 0
            assert ring.total == sum(slot.nbytes for slot in ring._slots)


@pytest.mark.parametrize("where", [HOST, DEVICE], ids=str)
def test_what_was_fetched_ahead_gives_way_before_a_budget_is_exceeded(where: Where, tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, where, "bf16-mixed", RECIPE) as running:
        running.train().engine.flush()
        assert running.engine.counters.overcommits == 0


@pytest.mark.parametrize("aliased", [True, False])
def test_too_small_a_budget_is_refused_with_the_numbers(aliased: bool, tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(3)])
    memory = MemoryConfig(host_bytes=2**19, device_bytes=2**19)
    config = PartitionConfig(CPU, "32-true", "nvme", "cpu", (str(tmp_path),), memory=memory, aliased=aliased)
    option = "memory.host_bytes" if aliased else "memory.device_bytes"
    with pytest.raises(ValueError, match=rf"needs 1\.00 MiB .* only (0\.\d\d) MiB are allowed by {option}"):
        partition(model, config)
    assert engine_of(model) is None
    assert all(type(p) is nn.Parameter and not p.isnan().any() for p in model.parameters())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("aliased", [True, False])
def test_host_memory_too_small_for_the_largest_unit_is_refused(aliased: bool, tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(3)])
    memory = MemoryConfig(host_bytes=2**19)
    config = PartitionConfig(CPU, "32-true", "nvme", "cpu", (str(tmp_path),), memory=memory, aliased=aliased)
    with pytest.raises(ValueError, match=r"allowed by memory\.host_bytes"):
        partition(model, config)


def test_a_budget_that_holds_everything_reads_no_weights_in_a_step(tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, Where("nvme", "cpu"), memory=MemoryConfig(host_bytes=2**24)) as running:
        running.train(2).engine.flush()
        assert running.engine.counters.nvme_read_bytes == 0
        assert running.engine.counters.reused_bytes > 0


def funnel(widths: list[int]) -> Case:
    """Return a model of blocks that are units each, with a narrow part of the given width."""

    def build() -> nn.Module:
        blocks = [nn.Sequential(nn.Linear(WIDTH, w), nn.GELU(), nn.Linear(w, WIDTH, bias=w % 2 == 0)) for w in widths]
        return nn.Sequential(nn.ModuleDict({"in": nn.Identity()})["in"], *blocks, nn.Linear(WIDTH, 10))

    return Case(build, vectors)


@settings(max_examples=30, deadline=None)
@given(
    widths=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    precision=st.sampled_from(["32-true", "bf16-mixed"]),
    where=st.sampled_from(PAGED),
    more=st.integers(0, 200_000),
    tile=st.sampled_from([4096, 8192, 2**20]),
)
def test_any_budget_gives_the_same_bits(widths: list[int], precision: str, where: Where, more: int, tile: int) -> None:
    case, recipe = funnel(widths), Recipe(steps=2)
    with tempfile.TemporaryDirectory() as folder:
        expected = train_paged(case, Path(folder), Where(), precision, recipe)
        least = tight_memory(case.make(), precision, case.units)
        assert least.host_bytes is not None
        assert least.device_bytes is not None
        memory = MemoryConfig(host_bytes=3 * least.host_bytes + more, device_bytes=least.device_bytes + more)
        io = IOConfig(tile_numel=tile, threads=2, backend="threads")
        with session(case, Path(folder), where, precision, recipe, memory=memory, io=io) as running:
            found: Result = running.train().result()
            ring = running.engine.context.ring
            assert ring.peak <= ring.budget or running.engine.counters.overcommits > 0
        assert_same(found, expected)


def test_an_operator_that_needs_more_than_the_budget_gets_it_and_is_counted(tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, HOST) as running:
        model, counters = running.model, running.engine.counters
        expected = [p.detach().norm() for p in ZOO["gpt"].make().parameters()]
        norms = torch._foreach_norm(list(model.parameters()))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(norms, expected, strict=True))
        assert counters.overcommits > 0
        assert running.engine.context.ring.peak > running.engine.context.ring.budget


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_larger_budget_keeps_more_in_memory_and_never_more_than_it_allows(precision: str, tmp_path: Path) -> None:
    """From all on disk to all in memory without a jump: bytes of disk traffic fall as the budget grows."""
    traffic, kept = [], []
    for number, share in enumerate([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1]):
        with session(ZOO["gpt"], tmp_path / str(number), Where("auto", "auto", share=share), precision) as it:
            for _ in range(3):
                before = it.engine.counters.nvme_read_bytes + it.engine.counters.nvme_write_bytes
                it.step()
                it.engine.flush()
            traffic.append(it.engine.counters.nvme_read_bytes + it.engine.counters.nvme_write_bytes - before)
            buffers = [b for u in it.engine.units for b in u.buffers]
            gradients = sum(b.weight_bytes for b in buffers)
            in_memory = sum(n for _, tier, n in residency(it.engine) if tier != "nvme")
            kept.append(in_memory)
            budget = it.engine.config.memory.host_bytes
            assert budget is not None
            assert in_memory + gradients <= budget or traffic[-1] == max(traffic)
    assert traffic == sorted(traffic, reverse=True)
    assert traffic[-1] == 0
    assert len(set(traffic)) >= 5
    assert kept == sorted(kept)
