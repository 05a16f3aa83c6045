"""The simulated device does what a GPU does, and says where a program forgets to wait."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import simdevice
from lightning_zinf.engine.context import EngineContext
from lightning_zinf.memory.slots import Slot
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.ops.memory import host_pinned
from simdevice import device as sim

DEVICE = simdevice.register()
LONG = 20000
"""Microseconds: longer than the host takes to submit what comes next."""


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    sim.set_delays(0)
    sim.reports()
    yield
    sim.set_delays(0)
    sim.reports()


def slowly(count: int = 24) -> None:
    """Have the current stream be busy for a while."""
    sim.set_delays(1, LONG, LONG)
    busy = torch.empty(1, device=DEVICE)
    for _ in range(count):
        busy.fill_(0)
    sim.set_delays(0)


def host(nbytes: int) -> Tensor:
    return host_pinned(nbytes, "sim")


# ---------------------------------------------------------------------- what it computes


def work(device: torch.device, precision: str) -> list[Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1),
        torch.nn.BatchNorm2d(4),
        torch.nn.GELU(),
        torch.nn.Flatten(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(64, 16),
        torch.nn.LayerNorm(16),
    ).to(device)
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        out = model(x)
        loss = torch.nn.functional.cross_entropy(out.float(), torch.tensor([1, 0, 3], device=device))
    loss.backward()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    optimizer.step()
    values = [out, loss, x.grad, *(p for p in model.parameters()), *(p.grad for p in model.parameters())]
    return [v.detach().cpu() for v in values if v is not None]


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_has_the_bits_of_the_cpu(precision: str) -> None:
    sim.set_delays(3, 100, 100)
    expected = work(torch.device("cpu"), precision)
    found = work(DEVICE, precision)
    assert [f.dtype for f in found] == [e.dtype for e in expected]
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert sim.reports() == []


def test_views_share_memory() -> None:
    x = torch.arange(24, device=DEVICE, dtype=torch.float32)
    x.view(4, 6)[1:3, ::2].mul_(10)
    x.view(torch.int32)[0] = 7
    x[20:].copy_(torch.ones(4))
    y = torch.arange(24, dtype=torch.float32)
    y.view(4, 6)[1:3, ::2].mul_(10)
    y.view(torch.int32)[0] = 7
    y[20:].copy_(torch.ones(4))
    assert torch.equal(x.cpu(), y)
    out = torch.empty(0, device=DEVICE)
    torch.add(x, 1, out=out)
    assert torch.equal(out.cpu(), y + 1)
    assert torch.equal(x.to(torch.bfloat16).t().cpu(), y.bfloat16())
    assert x.sum().item() == y.sum().item()
    assert sim.reports() == []


def test_the_host_cannot_touch_it() -> None:
    x = torch.ones(4, device=DEVICE)
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        ctypes.string_at(x.data_ptr(), 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


def test_counts_memory() -> None:
    before = sim.memory_allocated()
    x = torch.empty(1000, device=DEVICE)
    assert sim.memory_allocated() - before == 4096
    del x
    assert sim.memory_allocated() == before
    sim.set_capacity(before + 4096)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            torch.empty(2000, device=DEVICE)
    finally:
        sim.set_capacity(1 << 30)


# ---------------------------------------------------------------------- what waits, and what does not


def test_a_copy_takes_time_and_events_tell() -> None:
    pinned = host(64).fill_(1)
    slowly()
    x = torch.zeros(64, dtype=torch.uint8, device=DEVICE)
    pinned.copy_(x, non_blocking=True)
    event = torch.Event(DEVICE)
    event.record()
    assert not event.query()
    assert bool((pinned == 1).all())
    event.synchronize()
    assert event.query()
    assert not pinned.any()


def test_a_copy_from_memory_that_is_not_pinned_takes_it_at_once() -> None:
    slowly()
    x, y = torch.zeros(64, device=DEVICE), torch.ones(64)
    x.copy_(y, non_blocking=True)
    y.fill_(2)
    assert bool((x.cpu() == 1).all())
    assert sim.reports() == []


def other_stream(waits: bool) -> tuple[Tensor, Tensor, Any]:
    """Fill memory on the current stream, and read it on another one; return it, what was computed, and the other."""
    x = torch.zeros(64, device=DEVICE)
    other = sim.Stream(DEVICE)
    slowly()
    x.fill_(3)
    if waits:
        other.wait_stream(sim.current_stream())
    with sim.stream(other):
        y = x * 2
    return x, y, other


def test_another_stream_has_to_wait() -> None:
    _x, y, other = other_stream(waits=True)
    sim.current_stream().wait_stream(other)
    assert bool((y.cpu() == 6).all())
    assert sim.reports() == []
    _x, y, other = other_stream(waits=False)
    assert any("mul" in r for r in sim.reports())


def test_what_another_stream_still_reads_must_not_be_changed() -> None:
    for waits in (True, False):
        x, other = torch.zeros(64, device=DEVICE), sim.Stream(DEVICE)
        other.wait_stream(sim.current_stream())
        with sim.stream(other):
            slowly()
            y = x + 1
        if waits:
            sim.current_stream().wait_stream(other)
        x.fill_(9)
        sim.synchronize()
        assert bool(sim.reports()) is not waits
        assert bool((y.cpu() == 1).all()) is waits


def test_memory_that_another_stream_reads_has_to_be_recorded() -> None:
    for recorded in (True, False):
        x, other = torch.zeros(64, device=DEVICE), sim.Stream(DEVICE)
        other.wait_stream(sim.current_stream())
        with sim.stream(other):
            slowly()
            x + 1
        if recorded:
            x.record_stream(other)
        address = x.data_ptr()
        del x
        again = torch.ones(64, device=DEVICE)
        assert (again.data_ptr() == address) is not recorded
        assert bool(sim.reports()) is not recorded


def test_pinned_memory_must_stay_until_it_is_copied() -> None:
    for waits in (True, False):
        pinned, x = host(256).fill_(1), torch.zeros(256, dtype=torch.uint8, device=DEVICE)
        slowly()
        x.copy_(pinned, non_blocking=True)
        if waits:
            sim.synchronize()
        pinned.fill_(2)
        assert bool((x.cpu() == 1).all()) is waits
        assert bool(sim.reports()) is not waits


def test_backward_runs_on_the_stream_of_forward() -> None:
    sim.set_delays(5, 200, 200)
    other = sim.Stream(DEVICE)
    x = torch.ones(64, device=DEVICE, requires_grad=True)
    other.wait_stream(sim.current_stream())
    with sim.stream(other):
        y = (x * 3).exp().sum()
    y.backward()
    assert x.grad is not None
    assert torch.equal(x.grad.cpu(), 3 * torch.full((64,), 3.0).exp())
    assert sim.reports() == []


# ---------------------------------------------------------------------- pinned memory


def test_pinned_memory_is_registered_for_as_long_as_it_is_there() -> None:
    before = sim.pinned_bytes()
    memory = host(5000)
    view = memory[100:].view(torch.uint8)
    assert memory.data_ptr() % 4096 == 0
    assert sim.pinned_bytes() == before + 5000
    del memory
    assert sim.pinned_bytes() == before + 5000
    del view
    assert sim.pinned_bytes() == before


# ---------------------------------------------------------------------- copies of the engine


def upload_twice(context: EngineContext) -> tuple[Slot, list[Tensor]]:
    """Fill a slot that was used before, have compute read it for a while, and fill it again."""
    slot, hosts = Slot(context.allocate_device(4096)), [context.allocate_host(4096).fill_(i) for i in (1, 2)]
    context.mark_used(slot)
    context.upload(hosts[0], slot, slot.memory, "first")
    slowly()
    read = slot.memory + 0
    context.upload(hosts[1], slot, slot.memory, "second")
    assert bool((read.cpu() == 1).all())
    assert bool((slot.memory.cpu() == 2).all())
    return slot, hosts


def test_a_slot_is_filled_again_when_it_has_been_read() -> None:
    context = EngineContext(DEVICE, Counters())
    slot, hosts = upload_twice(context)
    assert sim.reports() == []
    with sim.stream(context._copy_stream):
        slowly()
    context.upload(hosts[0], slot, slot.memory, "third")
    slot.wait_writes(context.counters)
    hosts[0].fill_(3)  # as the next read from NVMe would
    assert sim.reports() == []
    for _ in range(5):
        context.upload(hosts[0], slot, slot.memory, "more")
        sim.synchronize()
    assert len(slot.writes) == 1  # what is done is not kept where nobody waits


def test_a_slot_is_filled_beside_compute_that_does_not_use_it() -> None:
    context = EngineContext(DEVICE, Counters())
    slot, memory = Slot(context.allocate_device(4096)), context.allocate_host(4096)
    sim.synchronize()
    context.mark_used(slot)
    slowly()
    context.upload(memory, slot, slot.memory, "weights")
    slot.wait_writes(context.counters)
    assert not sim.current_stream().query()
    assert sim.reports() == []
