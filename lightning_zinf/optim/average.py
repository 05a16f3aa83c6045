"""Running averages of the masters, kept as one more plane of the shard.

Note [Averages]
~~~~~~~~~~~~~~~
The plane ``ema`` lies beside the optimizer's planes, on whatever tier they are, and is brought up to date by the update
that has the new masters in hand. Exchanging averages and masters is an update too, applied like any other when the
weights are next needed: no rank ever holds more than its shard.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_zinf.memory.state import Record
from lightning_zinf.optim.update import Update, master_of, set_master

PLANE = "ema"


@dataclass
class Average(Update):
    """Take the masters into the average, without a step.

    Attributes:
        average: Weight of the old average.
    """

    average: float | None = 0.0

    def update_record(self, weight: Tensor, record: Record) -> None:
        """The masters stay as they are."""


class Swap(Update):
    """Exchange masters and averages."""

    def update_record(self, weight: Tensor, record: Record) -> None:
        """Exchange those of a range of elements."""
        if PLANE in record.planes:
            averages = record.planes[PLANE].clone()
            record.planes[PLANE].copy_(master_of(weight, record.planes))
            set_master(weight, record.planes, averages)
