"""The strategies of the ZeRO-Infinity paper: what each keeps where, and what it moves when. Ours is the planner's.

Note [Assumptions]
~~~~~~~~~~~~~~~~~~
One set of assumptions serves every figure:

- A tier's memory may be filled with model states to ``FILL`` = 80 %: the rest is for activations, fragments, contexts.
  This is the one number of the figures of memory that was chosen to agree with them: one for all tiers and strategies.
- The paper's accounting is 20 bytes of states a parameter: float16 weights and gradients (2 + 2), and float32 master,
  two moments and gradient (16).
- A step of P parameters computes 8 operations a parameter and token: forward, recomputation, and twice in backward.
- ZeRO-Infinity's optimizer runs when backward has ended. With states on NVMe it reads the 16 bytes and writes master
  and moments (12), and float16 weights (2) where they rest there too; float32 gradients (4) are spilled in backward.
  That is 32 bytes a parameter in all, which DeepSpeed's measured iterations confirm.
- A disk reads or writes at one rate and takes turns.
- Of weights and optimizer states, each kind rests on one tier as a whole, as DeepSpeed offloads them.
- A GPU reaches one rate on any layer. It is an end-to-end figure, so tensor slicing and small kernels are in it.

What no figure can be had from: efficiency of kernels at a shape, allocator fragmentation, latency of small messages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_zinf.config import Tier
from lightning_zinf.memory.planner.machine import Machine
from lightning_zinf.memory.planner.schedule import Prediction, Setting, UnitLoad, predict
from lightning_zinf.memory.planner.traffic import Traffic

FILL = 0.8
FLOPS = 8.0
STATES = 20.0
"""Bytes of states a parameter, in the paper's accounting."""


@dataclass(frozen=True)
class Model:
    """A GPT as the paper counts it.

    Attributes:
        layers: Its blocks.
        hidden: Their width.
        seq: Tokens of a sample.
    """

    layers: int
    hidden: int
    seq: int = 1024

    @property
    def params(self) -> float:
        """Parameters: 12 times the layers times the square of the width."""
        return 12.0 * self.layers * self.hidden**2


@dataclass(frozen=True)
class Kept:
    """Bytes of states a parameter on one tier: a part that every GPU has, and a part that all of them share."""

    tier: Tier
    replicated: float = 0.0
    shared: float = 0.0


@dataclass(frozen=True)
class Strategy:
    """What is kept where.

    Attributes:
        name: For the reader.
        kept: Bytes of states on each tier.
    """

    name: str
    kept: tuple[Kept, ...]

    def largest(self, machine: Machine) -> float:
        """Return the parameters of the largest model whose states fit."""
        most = float("inf")
        have = {
            "device": machine.device_bytes * machine.world_size,
            "host": machine.host_bytes * machine.nodes,
            "nvme": machine.nvme_bytes * machine.nodes,
        }
        for kept in self.kept:
            each = kept.replicated * machine.world_size + kept.shared
            most = min(most, FILL * have[kept.tier] / each)
        return most


DATA_PARALLEL = Strategy("data parallel", (Kept("device", replicated=STATES),))
ZERO_2 = Strategy("ZeRO-2", (Kept("device", replicated=2, shared=18),))
ZERO_OFFLOAD = Strategy("ZeRO-Offload", (Kept("device", replicated=2), Kept("host", shared=18)))
THREE_D = Strategy("3D parallelism", (Kept("device", shared=STATES),))
ZERO_3 = Strategy("ZeRO-3", (Kept("device", shared=STATES),))
INFINITY_CPU = Strategy("ZeRO-Infinity, CPU", (Kept("host", shared=STATES),))
INFINITY_NVME = Strategy("ZeRO-Infinity, NVMe", (Kept("nvme", shared=STATES),))
PAPER = (DATA_PARALLEL, ZERO_2, ZERO_OFFLOAD, THREE_D, ZERO_3, INFINITY_CPU, INFINITY_NVME)


@dataclass(frozen=True)
class Run:
    """A training step on a cluster.

    Attributes:
        model: The model.
        machine: The cluster.
        batch: Samples a GPU; may be a fraction where several GPUs share a sample.
        params: Tier of the float16 weights.
        optimizer: Tier of the optimizer's states.
    """

    model: Model
    machine: Machine
    batch: float
    params: Tier
    optimizer: Tier

    @property
    def tokens(self) -> float:
        """Tokens of a step of the whole cluster."""
        return self.batch * self.model.seq * self.machine.world_size

    @property
    def operations(self) -> float:
        """Operations of a step of the whole cluster."""
        return FLOPS * self.model.params * self.tokens


def placed(model: Model, machine: Machine) -> tuple[Tier, Tier]:
    """Return where ZeRO-Infinity keeps weights and optimizer states: each kind on the first tier with room for all.

    Optimizer states with gradients are 18 bytes a parameter, weights 2; GPUs take both or none.
    """
    have = {
        "device": FILL * machine.device_bytes * machine.world_size,
        "host": FILL * machine.host_bytes * machine.nodes,
    }
    if STATES * model.params <= have["device"]:
        return "device", "device"
    if STATES * model.params <= have["host"]:
        return "host", "host"
    return ("host" if 2 * model.params <= have["host"] else "nvme"), "nvme"


def step(run: Run) -> Prediction:
    """Return how long a step takes, layer by layer, on one GPU's share of everything."""
    return predict(*loads_of(run))


def loads_of(run: Run) -> tuple[list[UnitLoad], Setting]:
    """Return what each layer puts on the stages, and what they share."""
    rates, world = run.machine.rates, run.machine.world_size
    layer = run.model.params / run.model.layers
    share = layer / world
    assert rates.flops is not None
    forward = run.operations / FLOPS * 2 / run.model.layers / world / rates.flops
    partitioned = Traffic(
        nvme_read=2 * share * (run.params == "nvme"),
        host_to_device=2 * share * (run.params != "device"),
        all_gather=2 * layer,
    )
    gradient = Traffic(
        nvme_write=4 * share * (run.optimizer == "nvme"),
        device_to_host=2 * share * (run.optimizer != "device"),
        reduce_scatter=2 * layer,
    )
    update = Traffic(
        nvme_read=16 * share * (run.optimizer == "nvme"),
        nvme_write=12 * share * (run.optimizer == "nvme") + 2 * share * (run.params == "nvme"),
        host_to_device=2 * share * (run.params == "device" and run.optimizer != "device"),
    )
    kernel = 34 * share  # 16 read and 12 written by Adam, 6 to cast the weights
    load = UnitLoad(
        "layer",
        partitioned,
        gradient,
        update,
        forward_seconds=forward,
        backward_seconds=3 * forward,
        update_seconds=kernel / rates.adam if rates.adam and run.optimizer != "device" else 0.0,
        when="after",
        slot_bytes=int(2 * layer),
        tile_bytes=int(update.nvme_read),
    )
    loads = [replace(load, name=f"layer {i}") for i in range(run.model.layers)]
    servers = {"compute": "device", "update": "host", "nvme_read": "nvme", "nvme_write": "nvme"}
    # A few layers ahead, as prefetching does; states stream through buffers of that size.
    setting = Setting(rates, servers, slots=4 * load.slot_bytes, tiles=4 * load.tile_bytes, keeps=False)
    return loads, setting
