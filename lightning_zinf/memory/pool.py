"""Blocks of host memory that are kept and used again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor

from lightning_zinf.memory.slots import Slot
from lightning_zinf.monitor.counters import Counters


class BlockPool:
    """Memory that things rest in, as much as is needed: a :class:`.SlotRing` without budget.

    A block that comes back is used again for what needs at least half of it, so that a training step takes the blocks
    of the step before, without page faults and without pinning.

    Args:
        allocate: Makes a ``uint8`` tensor of that many bytes.
        counters: Where waits are counted.
    """

    def __init__(self, allocate: Callable[[int], Tensor], counters: Counters) -> None:
        self.total = 0
        self.peak = 0
        self._allocate = allocate
        self._counters = counters
        self._free: list[Slot] = []

    def acquire(self, nbytes: int, holder: object, *, force: bool = False) -> tuple[Slot, bool]:
        """Take a block of at least ``nbytes``; the flag says that it has not the content of ``holder``."""
        fits = [s for s in self._free if nbytes <= s.nbytes <= 2 * nbytes]
        if fits:
            slot = min(fits, key=lambda s: s.nbytes)
            slot.wait_writes(self._counters)
            self._free.remove(slot)
        else:
            slot = Slot(self._allocate(nbytes))
            self.total += nbytes
            self.peak = max(self.peak, self.total)
        slot.free, slot.holder = False, holder
        return slot, False

    def release(self, slot: Slot) -> None:
        """Give a block back."""
        slot.free, slot.holder = True, None
        self._free.append(slot)

    def find(self, holder: object) -> Slot | None:
        """Return None: what is given back is gone."""
        return None

    def forget(self, slot: Slot) -> None:
        """Let the content of a block go."""
        slot.holder = None

    def drain(self) -> None:
        """Wait for every copy from a free block."""
        for slot in self._free:
            slot.wait_writes(self._counters)


_LOOKED_AT = 4


class LentBlocks:
    """Memory that is lent for as long as somebody sees it, and lent again after that.

    What comes and goes in every step (gradients on their way to the update) finds the blocks of the step before, which
    need not be pinned again. They are asked for in the order in which they were lent, so the oldest is free as a rule.
    """

    def __init__(self) -> None:
        self.total = 0
        self._blocks: dict[int, deque[Slot]] = {}

    def lend(self, nbytes: int, allocate: Callable[[int], Tensor]) -> Tensor:
        """Return a block of exactly ``nbytes``, with whatever content.

        Args:
            nbytes: Size.
            allocate: Makes a ``uint8`` tensor of that many bytes, where no block is free.
        """
        blocks = self._blocks.setdefault(nbytes, deque())
        for _ in range(min(_LOOKED_AT, len(blocks))):
            blocks.rotate(-1)
            if not blocks[-1].visible:
                return blocks[-1].memory[:nbytes]
        blocks.append(Slot(allocate(nbytes)))
        self.total += nbytes
        return blocks[-1].memory[:nbytes]

    def forget(self) -> None:
        """Let go of all blocks; those that somebody has stay his."""
        self._blocks.clear()
        self.total = 0
