"""What the user chooses, as far as it decides a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lightning_zinf.config import Offload, OffloadActivations

When = Literal["after", "deferred", "backward"]
"""When an update runs: after backward, right before the weights' next use, or as each gradient is complete."""


@dataclass(frozen=True)
class PlanOptions:
    """Options of a plan.

    Attributes:
        offload_params: Where weights rest, as the strategy's option.
        offload_optimizer: Where optimizer state rests.
        stage: What is partitioned over ranks, as the strategy's option.
        batch: Samples of a micro-batch of one rank.
        accumulate: Micro-batches between two optimizer steps.
        recompute: Whether units are recomputed in backward, as ``activation_checkpointing``.
        offload_activations: Where what is kept for backward waits, as the strategy's option: the inputs of recomputed
            units, or else all that is saved.
        host_bytes: Budget of host memory, as ``memory.host_bytes``.
        device_bytes: Budget of the accelerator's memory, as ``memory.device_bytes``.
        tile_numel: Elements of state read, updated and written as one piece, as ``io.tile_numel``.
        clip: Whether gradients are clipped by their norm, so that no update can run before all of them are there.
        update: When updates of offloaded state run; None takes what the engine does, and anything else asks what if.
        present: Bytes of host memory of a rank that are taken now and free in training: the model as it was built.
    """

    offload_params: Offload = "auto"
    offload_optimizer: Offload = "auto"
    stage: int = 3
    batch: int = 1
    accumulate: int = 1
    recompute: bool = False
    offload_activations: OffloadActivations = "none"
    host_bytes: int | None = None
    device_bytes: int | None = None
    tile_numel: int = 2**20
    clip: bool = False
    update: When | None = None
    present: int = 0

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3):
            raise ValueError(f"stage must be 1, 2 or 3, got {self.stage!r}")
        for name in ("batch", "accumulate", "tile_numel"):
            value: Any = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        if self.stage < 3 and self.offload_params in ("cpu", "nvme"):
            raise ValueError(
                f"offload_params={self.offload_params!r} needs stage=3: stages 1 and 2 keep weights on the device"
            )
