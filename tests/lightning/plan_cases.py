"""A deep model, and stand-ins for memory and speeds, for the tests of plans that a run makes again."""

from __future__ import annotations

from typing import Any

import pytest
from lightning_cases import Net, block
from torch import nn

from lightning_zinf.engine import partition
from lightning_zinf.engine.engine import Engine
from lightning_zinf.engine.partition import engine_of
from lightning_zinf.memory.planner.speeds import Speeds

SLOW = Speeds(compute_seconds=1e-4, update_seconds=1e-5, nvme_read=1e6, nvme_write=1e6, nvme_mixed=1e6)
FAST = Speeds(compute_seconds=1.0, update_seconds=1e-5, nvme_read=1e9, nvme_write=1e9, nvme_mixed=1e9)


class Deep(Net):
    """A model of several units."""

    depth = 8

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.blocks = nn.Sequential(*(block() for _ in range(self.depth)))


def engine(module: Any) -> Engine:
    found = engine_of(module)
    assert found is not None
    return found


def resident(module: Any) -> int:
    """Return the bytes of planes that rest in memory."""
    total = 0
    for unit in engine(module).units:
        for b in unit.buffers:
            total += b.shard_bytes if b.params_tier != "nvme" else 0
            total += b.state.nbytes if b.state is not None and b.state_tier != "nvme" else 0
    return total


def free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """Have so many bytes of memory be free."""
    for name in ("free_host_bytes", "free_device_bytes"):
        monkeypatch.setattr(partition, name, lambda *_: nbytes)
