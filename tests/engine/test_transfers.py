"""Copies to and from a device that take their time: what they read stays, and what they keep is let go."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from driver import Where, session
from models import ZOO
from oracle import Recipe, assert_same
from torch import Tensor

from lightning_zinf.comm.group import Ranks, ranks_of
from lightning_zinf.engine import partition, squares
from lightning_zinf.engine.context import EngineContext
from lightning_zinf.memory.machine import free_device_bytes
from lightning_zinf.memory.slots import Slot
from lightning_zinf.monitor.counters import Counters


class Upload:
    """A copy that may read its source until it is waited for."""

    def __init__(self, host: Tensor) -> None:
        self._host, self._content, self.changed = host, host.clone(), False

    def wait(self, timeout: float | None = None) -> int:
        self.changed = self.changed or not torch.equal(self._host, self._content)
        self._host = self._content
        return self._content.nbytes

    def done(self) -> bool:
        return self._host is self._content


@pytest.mark.parametrize(
    "where",
    [
        Where("cpu", "cpu", aliased=False),
        Where("none", "cpu", aliased=False),
        Where("nvme", "nvme", aliased=False, tight=True),
        Where("nvme", "nvme", aliased=False, early=True),
    ],
    ids=str,
)
def test_the_host_changes_no_weights_that_are_on_their_way(
    where: Where, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[Upload] = []

    def slow(self: EngineContext, host: Tensor, slot: Slot, device: Tensor) -> Any:
        device.copy_(host)
        uploads.append(Upload(host))
        slot.writes.append(uploads[-1])
        return uploads[-1]

    recipe = Recipe(clip_norm=None if where.early else 1.0, steps=4)
    with session(ZOO["gpt"], tmp_path / "expected", where, "bf16-mixed", recipe) as it:
        expected = it.train().result()
    monkeypatch.setattr(EngineContext, "_upload", slow)
    with session(ZOO["gpt"], tmp_path / "slow", where, "bf16-mixed", recipe) as it:
        found = it.train().result()
    assert_same(found, expected)
    for upload in uploads:
        upload.wait()
    assert len(uploads) > recipe.steps
    assert not any(upload.changed for upload in uploads)


class Event:
    """A copy under way, until the host waits for it."""

    def __init__(self) -> None:
        self.over = False

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        self.over = True


def test_what_leaves_the_device_is_kept_within_a_bound() -> None:
    context = EngineContext(torch.device("cpu"), Counters(), aliased=False)
    context.leaving_bytes = 100
    events = [Event() for _ in range(6)]
    for event, nbytes in zip(events, (40, 50, 30, 300, 10, 10), strict=True):
        context._keep_until(event, torch.empty(nbytes, dtype=torch.uint8))
        under_way = [t.nbytes for e, t in context._leaving if not e.over]
        assert sum(under_way) <= 100 or under_way == [nbytes]
    assert [event.over for event in events] == [True, True, True, True, False, False]
    events[4].over = True  # by itself
    context._keep_until(Event(), torch.empty(1, dtype=torch.uint8))
    assert next(e for e, _ in context._leaving) is events[5]


def test_memory_of_gradients_is_that_of_the_step_before(tmp_path: Path) -> None:
    for where in (Where("cpu", "cpu", aliased=False), Where("nvme", "nvme", aliased=False, early=True)):
        recipe = Recipe(clip_norm=None if where.early else 1.0, steps=6)
        with session(ZOO["gpt"], tmp_path, where, "bf16-mixed", recipe) as it:
            it.train(3)
            before = it.engine.context._lent.total
            assert 0 < before <= sum(b.weight_bytes for u in it.engine.units for b in u.buffers)
            it.train(3)
            assert it.engine.context._lent.total == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_squares_on_a_device(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squares, "_SLICE", 1000)
    draw = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=draw).to(dtype) for shape in ((3, 700), (0,), (1,), (999,), (40, 40))]
    for found, grad in zip(squares._sums_on_device(grads), grads, strict=True):
        exact = math.fsum(float(x) ** 2 for x in grad.flatten())  # squares of so few bits are exact in float64
        assert abs(found - exact) <= grad.numel() * 2.0**-53 * exact
    assert squares._sums_on_device([]) == []


def test_what_is_free_when_a_model_is_partitioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory of the model counts as given back on an accelerator too, and what torch keeps there as free."""
    taken = sum(p.nbytes for p in ZOO["gpt"].make().parameters())
    with session(ZOO["gpt"], tmp_path, Where("cpu", "cpu", aliased=False), "bf16-mixed", Recipe()) as it:
        assert it.engine.given_back == taken
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 600)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert free_device_bytes(torch.device("cuda", 0)) == 1500


class Download:
    """A copy that happens when it is waited for, or now and then when it is asked whether it is done."""

    def __init__(self, device: Tensor, host: Tensor, noise: random.Random) -> None:
        self._ends, self._noise, self._over = (device, host), noise, False

    def wait(self, timeout: float | None = None) -> int:
        if not self._over:
            self._ends[1].copy_(self._ends[0])
            self._over = True
        return self._ends[0].nbytes

    def done(self) -> bool:
        if self._noise.random() < 0.3:
            self.wait()
        return self._over


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "where",
    [
        Where("cpu", "cpu", aliased=False, ahead=True),
        Where("none", "nvme", aliased=False, early=True),
        Where("nvme", "nvme", aliased=False, tight=True),
    ],
    ids=str,
)
def test_what_comes_down_is_read_when_it_is_there(
    where: Where, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, accumulate = None if where.early else 1.0, 1 if shared else 2
    recipe, noise = Recipe(clip_norm=clip, accumulate=accumulate, steps=4), random.Random(0)
    with session(ZOO["gpt"], tmp_path / "expected", where, "bf16-mixed", recipe) as it:
        expected = it.train().result()
    monkeypatch.setattr(EngineContext, "_download", lambda self, device, host: Download(device, host, noise))
    with (
        _one_rank(monkeypatch) if shared else nullcontext() as ranks,
        session(ZOO["gpt"], tmp_path / "later", where, "bf16-mixed", recipe, ranks=ranks) as it,
    ):
        assert (it.engine.reducer is not None) == shared
        found = it.train().result()
    assert_same(found, expected)


@contextmanager
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """Have the engine take one rank for several, which share nothing but the code."""
    monkeypatch.setattr(partition, "needs_no_others", lambda ranks: ranks is None)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield ranks_of(None, timedelta(seconds=60))
    finally:
        dist.destroy_process_group()
