"""A model as the planner sees it: units, their flat buffers, and what computing them takes.

Plain numbers, made from a partitioned model, a configuration or the shape of a transformer; nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_zinf.layout import FlatLayout

Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]

WEIGHT_BYTES: dict[Precision, int] = {"32-true": 4, "bf16-mixed": 2, "bf16-true": 2, "16-mixed": 2}
"""Bytes an element of the weight plane, which compute reads."""
LOW_PLANE: dict[Precision, tuple[tuple[str, int], ...]] = {
    "32-true": (),
    "bf16-mixed": (("residual", 2),),
    "bf16-true": (("residual", 2),),
    "16-mixed": (("master", 4),),
}
"""The plane that makes float32 masters of the weights, and its bytes an element."""
MOMENTS = (("exp_avg", 4), ("exp_avg_sq", 4))
"""What Adam keeps, and its bytes an element."""


@dataclass(frozen=True)
class BufferSpec:
    """A flat buffer: parameters of a unit that share a dtype and whether they learn.

    Attributes:
        numels: Elements of each parameter.
        weight_bytes: Bytes an element of the weight plane.
        planes: ``(name, bytes an element)`` of what is kept beside it: the low halves of masters, moments.
        learns: Whether an optimizer updates it.
    """

    numels: tuple[int, ...]
    weight_bytes: int
    planes: tuple[tuple[str, int], ...]
    learns: bool = True

    @classmethod
    def of(cls, numels: Sequence[int], precision: Precision, *, learns: bool = True) -> BufferSpec:
        """Describe the buffer of parameters in a precision, trained by Adam if they learn."""
        planes = LOW_PLANE[precision] + (MOMENTS if learns else ())
        return cls(tuple(numels), WEIGHT_BYTES[precision], planes, learns)

    @property
    def numel(self) -> int:
        """Elements without padding."""
        return sum(self.numels)

    @property
    def state_bytes(self) -> int:
        """Bytes an element of the planes beside the weights."""
        return sum(width for _, width in self.planes)

    def padded(self, shards: int = 1) -> int:
        """Return the elements of the whole buffer, padding included, if it is cut into ``shards``."""
        return FlatLayout.build([(n,) for n in self.numels], self.weight_bytes, shards).padded_numel


@dataclass(frozen=True)
class UnitSpec:
    """A unit: what is gathered and released together.

    Attributes:
        name: Its name; "" is the root.
        buffers: Its flat buffers.
        flops: Floating-point operations of the forward of one sample.
        saved_bytes: Bytes of activations that one sample leaves for backward.
        input_bytes: Bytes of its input for one sample: all that is left for backward if it is recomputed.
        staying_bytes: Of what is left, bytes that stay on the device also where activations are offloaded.
        block: Whether it is a block, or part of one, so that recomputation computes it twice.
        gathers: Times that a micro-batch gathers it: for forward and for backward, and once more for each further use.
    """

    name: str
    buffers: tuple[BufferSpec, ...]
    flops: float = 0.0
    saved_bytes: float = 0.0
    input_bytes: float = 0.0
    staying_bytes: float = 0.0
    block: bool = False
    gathers: int = 2

    @property
    def numel(self) -> int:
        """Parameters."""
        return sum(b.numel for b in self.buffers)


@dataclass(frozen=True)
class ModelSpec:
    """A model, in the order in which forward uses its units.

    Attributes:
        name: For the reader.
        units: Its units; the one named "" is there throughout a step.
        tokens: Tokens of a sample; 1 where samples have none.
        measured: Whether ``saved_bytes`` are known; if not, plans say that activations are not counted.
        profiled: Whether they are what a training step was seen to keep, with recomputation if it had any.
    """

    name: str
    units: tuple[UnitSpec, ...]
    tokens: int = 1
    measured: bool = True
    profiled: bool = False

    @property
    def numel(self) -> int:
        """Parameters."""
        return sum(u.numel for u in self.units)

    @property
    def trained(self) -> int:
        """Parameters that an optimizer updates."""
        return sum(b.numel for u in self.units for b in u.buffers if b.learns)

    @property
    def flops(self) -> float:
        """Floating-point operations of the forward of one sample."""
        return sum(u.flops for u in self.units)

    def operations(self, *, recompute: bool) -> float:
        """Return the floating-point operations of forward and backward of one sample."""
        return sum(u.flops * (4 if recompute and u.block else 3) for u in self.units)
