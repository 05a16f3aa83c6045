"""What is fetched ahead comes in the order in which it is wanted, and the computation does not wait for it in vain."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from driver import Session, Where, buffer_sizes, least_memory, session
from models import WIDTH, Case, vectors
from oracle import Recipe
from torch import nn

from lightning_zinf.config import IOConfig
from lightning_zinf.monitor.trace import Trace

LAYERS = 8
DEEP = Case(lambda: nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))), vectors, units=("Linear",))


@contextmanager
def deep(folder: Path, where: Where, recipe: Recipe, *, more: int) -> Iterator[Session]:
    """Have room for ``more`` layers than it takes, and for two tiles."""
    memory, io = least_memory(DEEP, "bf16-mixed"), IOConfig(tile_numel=4096, threads=2, backend="threads")
    assert memory.host_bytes is not None
    largest = 2 * max(n for unit in buffer_sizes(DEEP.make(), "bf16-mixed", DEEP.units).values() for n, _ in unit)
    memory = replace(memory, host_bytes=memory.host_bytes + more * largest)
    with session(DEEP, folder, where, "bf16-mixed", recipe, memory=memory, io=io) as running:
        yield running


class Held:
    """A write that is not done before it may be."""

    def __init__(self, ticket: Any, may: threading.Event) -> None:
        self._ticket = ticket
        self._may = may

    def done(self) -> bool:
        return self._may.is_set() and bool(self._ticket.done())

    def wait(self, timeout: float | None = None) -> int:
        if not self._may.wait(20):
            raise TimeoutError("the computation waited for a write that nothing on its way depends on")
        return int(self._ticket.wait())


def test_slots_that_are_being_written_are_not_waited_for_while_others_are_on_their_way(tmp_path: Path) -> None:
    with deep(tmp_path, Where("nvme", "nvme"), Recipe(accumulate=1), more=2) as running:
        running.train(3)
        first, third = running.engine.units[0], running.model[2]
        assert first.label == "0"
        may, store, write = threading.Event(), running.engine.context.nvme, running.engine.context.nvme.write
        extent, held = first.buffers[0].weights.extent, []

        def hold(to: Any, *args: Any, **kwargs: Any) -> Any:
            ticket = write(to, *args, **kwargs)
            if to is not extent or may.is_set():
                return ticket
            held.append(Held(ticket, may))
            return held[-1]

        store.write = hold  # type: ignore[method-assign]
        handle = third.register_forward_hook(lambda *_: may.set())
        try:
            running.train(1)
        finally:
            handle.remove()
            del store.write
    assert len(held) == 1


def test_state_of_this_backward_comes_before_that_of_the_next_forward(tmp_path: Path) -> None:
    recipe = Recipe(accumulate=1, clip_norm=None)
    with deep(tmp_path, Where("nvme", "nvme", early=True), recipe, more=1) as running:
        running.train(3)
        trace = running.engine.counters.trace = Trace()
        running.train(3)
        running.engine.counters.trace = None
        updated = {f"{running.engine.units[i].label}/bfloat16" for i in running.engine.early.updated}
    events = trace.events()
    forwards = [e for e in events if e.stage == "step"]
    later = 0
    for before, after in itertools.pairwise(forwards):
        assert before.end is not None
        backward = [e for e in events if before.end < e.begin < after.begin and e.stage == "nvme_read"]
        reads = [(e.begin, e.name.removesuffix("/state")) for e in backward if e.name.endswith("/state")]
        ours = [begin for begin, name in reads if name in updated]
        others = [begin for begin, name in reads if name not in updated]
        assert len(ours) == len(updated) > 2
        later += len(others)
        assert all(begin > max(ours) for begin in others)
    assert later > 0
