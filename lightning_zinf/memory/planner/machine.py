"""The machines that a plan is for, as numbers.

Note [Rates]
~~~~~~~~~~~~
Every rate is that of one rank while all ranks of its node are at work: where ranks share a link, its share. A rate
that is None is no limit. A disk whose ``nvme_mixed`` is given moves reads and writes one at a time at that rate where
both are wanted; without it the two directions are independent.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Rates:
    """What one rank's links and processors do in a second, in bytes unless it says otherwise.

    Attributes:
        flops: Floating-point operations that the model's layers reach, not the processor's peak.
        adam: Bytes of memory that the optimizer's kernel reads and writes.
        host_to_device: From host memory to the accelerator.
        device_to_host: Back.
        gather: Bytes of a gathered buffer that arrive from all ranks.
        nvme_read: Read from disk, with nothing written.
        nvme_write: Written to disk, with nothing read.
        nvme_mixed: Read and written together, as one sum; None if the directions are independent.
        host_copy: Copied in host memory, counted once.
    """

    flops: float | None = None
    adam: float | None = None
    host_to_device: float | None = None
    device_to_host: float | None = None
    gather: float | None = None
    nvme_read: float | None = None
    nvme_write: float | None = None
    nvme_mixed: float | None = None
    host_copy: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and not value > 0:
                raise ValueError(f"the rate {item.name} must be positive, got {value!r}")


@dataclass(frozen=True)
class Machine:
    """One or more equal nodes.

    Attributes:
        name: For the reader.
        device_bytes: Accelerator memory of one rank that training may use; not used if ``aliased``.
        host_bytes: Host memory of one node that training may use.
        nvme_bytes: Disk of one node that training may use.
        rates: What a rank's links do.
        ranks_per_node: Ranks (accelerators) of a node.
        nodes: Number of nodes.
        aliased: Whether the accelerator is the CPU, so that device and host are one memory.
    """

    name: str
    device_bytes: int
    host_bytes: int
    nvme_bytes: int
    rates: Rates
    ranks_per_node: int = 1
    nodes: int = 1
    aliased: bool = False

    def __post_init__(self) -> None:
        for name in ("device_bytes", "host_bytes", "nvme_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} of {self.name!r} must not be negative, got {getattr(self, name)}")
        if self.ranks_per_node < 1 or self.nodes < 1:
            raise ValueError(
                f"{self.name!r} must have at least one node and one rank, got {self.nodes} and {self.ranks_per_node}"
            )

    @property
    def world_size(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.ranks_per_node

    def with_nodes(self, nodes: int) -> Machine:
        """Return as many of the same nodes."""
        return replace(self, nodes=nodes)

    def told(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)
