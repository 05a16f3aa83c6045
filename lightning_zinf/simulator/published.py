"""Published figures, each with its source, and the same computed here.

Sources: SC21 = the authors' slides of ZeRO-Infinity at SC'21 (with page; "chart" = read off a chart to 1 %); abstract =
arXiv 2104.07857; Z3O = the DeepSpeed post on ZeRO-3 Offload (labels of its charts); MLP = the README and logs of
MLP-Offload's artifact (SC'25), which measured DeepSpeed; notes = public study notes of the paper. "recalled" = from
memory of the paper, not seen; such numbers are settings here and never targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_zinf.memory.planner.machine import Machine, Rates
from lightning_zinf.memory.planner.schedule import Setting, UnitLoad, predict
from lightning_zinf.memory.planner.traffic import Traffic
from lightning_zinf.simulator import strategies as st
from lightning_zinf.simulator.strategies import Model, Run

GB, TB = 1e9, 1e12
REACHED = 50.2e12
"""Operations a second of a V100: the best that Z3O shows, 400B parameters on 512 of them. The one rate of compute."""
PEAK = 70e12
"""What the paper takes for the most that a V100 can reach (SC21 p7); Figure 3 goes by it."""


def dgx2(nodes: int = 1, nvme: float = 25.6 * GB) -> Machine:
    """Return DGX-2 nodes: 16 V100 with 32 GB, 1.5 TB of memory and 28 TB of NVMe each (SC21 p3).

    Links: CPU to GPU 64 GB/s a node and 70 GB/s between GPUs (SC21 p9); NVMe 25.6 GB/s a node, which is the 1.6 GB/s a
    GPU of the paper's table (recalled; the slides say 28: see :func:`sensitivity`). DRAM for Adam: 150 GB/s, assumed.
    """
    per_gpu = 1 / 16
    rates = Rates(
        flops=REACHED,
        adam=150 * GB * per_gpu,
        host_to_device=64 * GB * per_gpu,
        device_to_host=64 * GB * per_gpu,
        gather=70 * GB,
        nvme_read=nvme * per_gpu,
        nvme_write=nvme * per_gpu,
    )
    return Machine("DGX-2", int(32 * GB), int(1.5 * TB), int(28 * TB), rates, ranks_per_node=16, nodes=nodes)


@dataclass(frozen=True)
class Figure:
    """A published number beside the computed one.

    Attributes:
        group: The chart or table.
        what: The point.
        published: Its number.
        computed: Ours.
        unit: Of both.
        source: Where the number was seen.
        tolerance: Largest difference that is accepted, of the published number.
        least: Whether the published number is a lower bound.
    """

    group: str
    what: str
    published: float
    computed: float
    unit: str
    source: str
    tolerance: float = 0.15
    least: bool = False

    @property
    def error(self) -> float:
        """Computed over published, less one."""
        return self.computed / self.published - 1

    @property
    def agrees(self) -> bool:
        """Whether it is close enough."""
        return self.error >= 0 if self.least else abs(self.error) <= self.tolerance


# ---------------------------------------------------------------------- memory


def largest_models() -> list[Figure]:
    """Return the largest model of each strategy on one DGX-2, and of ZeRO-Infinity on 32 (Fig. 6a, and SC21 p14)."""
    one, source = dgx2(), "SC21 p17"
    points = [
        (st.DATA_PARALLEL, 1.4e9),
        (st.ZERO_OFFLOAD, 13e9),
        (st.THREE_D, 20e9),
        (st.ZERO_3, 20e9),
        (st.INFINITY_CPU, 70e9),
        (st.INFINITY_NVME, 1000e9),
    ]
    group = "largest model"
    found = [Figure(group, f"1 DGX-2, {s.name}", p / GB, s.largest(one) / GB, "B", source) for s, p in points]
    big = dgx2(32)
    found.append(Figure(group, "32 DGX-2, 3D parallelism", 650, st.THREE_D.largest(big) / GB, "B", "notes, about"))
    nvme = st.INFINITY_NVME.largest(big) / TB
    found.append(Figure(group, "32 DGX-2, ZeRO-Infinity, NVMe", 32, nvme, "T", "SC21 p14, measured"))
    return found


# ---------------------------------------------------------------------- efficiency


def efficiency(moved_per_param: float, bandwidth: float, tokens: float, layers: int = 8) -> float:
    """Return the share of a step that is compute if ``moved_per_param`` bytes a parameter move, and not under it."""
    params = 1e9 / layers
    load = UnitLoad(
        "layer",
        update=Traffic(nvme_read=moved_per_param * params),
        forward_seconds=2 * params * tokens / PEAK,
        backward_seconds=6 * params * tokens / PEAK,
        tile_bytes=1,
    )
    setting = Setting(Rates(nvme_read=bandwidth), tiles=layers, overlap=False)
    found = predict([replace(load, name=f"layer {i}") for i in range(layers)], setting)
    return found.busy["compute"] / found.seconds


def checkpoint_efficiency(hidden: int, bandwidth: float) -> float:
    """Return the same for activation checkpoints: 2 bytes of each block's input go and come back, under nothing."""
    # A block computes 8 * 12 * hidden^2 a token and moves 4 * hidden bytes: 1 / (3 * hidden) bytes a parameter.
    return efficiency(4 / (12 * hidden), bandwidth, 1.0)


def efficiencies() -> list[Figure]:
    """Return efficiency against bandwidth at the points that were seen (Fig. 3)."""
    group, params, states = "efficiency", 2.0 * 4, 2.0 * 16
    return [
        Figure(group, "weights and gradients, 70 GB/s, 1 x 1024 tokens", 50, 100 * efficiency(params, 70 * GB, 1024),
               "%", "notes, at least", least=True),
        Figure(group, "optimizer states, 1500 GB/s, 2048 tokens", 90, 100 * efficiency(states, 1500 * GB, 2048), "%",
               "SC21 p7"),
        Figure(group, "activation checkpoints, hidden 2048, 1 GB/s", 41, 100 * checkpoint_efficiency(2048, GB), "%",
               "SC21 p8, chart"),
        Figure(group, "activation checkpoints, hidden 2048, 2 GB/s", 50, 100 * checkpoint_efficiency(2048, 2 * GB),
               "%", "notes, at least", least=True),
        Figure(group, "activation checkpoints, hidden 8192, 3 GB/s", 80, 100 * checkpoint_efficiency(8192, 3 * GB),
               "%", "notes, at least", least=True),
    ]  # fmt: skip


# ---------------------------------------------------------------------- throughput

MODELS = {
    "0.5T": Model(124, 18 * 1024),
    "1T": Model(128, 25 * 1024),
    "5T": Model(174, 48 * 1024),
    "10T": Model(195, 64 * 1024),
    "20T": Model(205, 88 * 1024),
}
"""Shapes of the paper's Table 1 (recalled); their parameters agree with the names."""
BATCH = {"0.5T": 7.0, "1T": 5.0, "5T": 3.0, "10T": 2.0, "20T": 1.25}
"""Samples a GPU on 512 GPUs, from the same table (recalled)."""


def throughput(run: Run) -> float:
    """Return the operations a second of one GPU."""
    return run.operations / step_seconds(run) / run.machine.world_size


def step_seconds(run: Run) -> float:
    """Return the time of a step."""
    return st.step(run).seconds


def on_nodes(name: str, nodes: int, nvme: float = 25.6 * GB) -> Run:
    """Return ZeRO-Infinity's run of a model of the paper, its states on the first tier with room."""
    machine = dgx2(nodes, nvme)
    params, optimizer = st.placed(MODELS[name], machine)
    if nodes == 32 and name in ("5T", "10T", "20T"):
        params = "nvme"  # as Table 1 has it (recalled)
    return Run(MODELS[name], machine, BATCH[name], params, optimizer)


def throughputs(nvme: float = 25.6 * GB) -> list[Figure]:
    """Return throughput on 512 GPUs (Fig. 5a) and from 64 to 512 (Fig. 5b), with disks of that rate a node."""
    seen = {"0.5T": 46.3, "1T": 48.9, "5T": 44.0, "10T": 42.8, "20T": 37.2}
    found = [
        Figure(
            "Fig. 5a",
            f"{name} on 512 GPUs",
            tf,
            throughput(on_nodes(name, 32, nvme)) / TB,
            "TFlop/s",
            "SC21 p15, chart",
        )
        for name, tf in seen.items()
    ]
    scaled = {4: 2.81, 8: 6.23, 16: 11.86, 32: 25.09}
    for nodes, pf in scaled.items():
        computed = throughput(on_nodes("1T", nodes, nvme)) * 16 * nodes / 1e15
        found.append(Figure("Fig. 5b", f"1T on {16 * nodes} GPUs", pf, computed, "PFlop/s", "SC21 p16, chart"))
    return found


def sensitivity() -> dict[str, list[tuple[str, float]]]:
    """Return the differences of Fig. 5 with the disk of the paper's table and with the one of the slides."""
    rates = {"25.6 GB/s a node": 25.6 * GB, "28 GB/s a node": 28 * GB}
    return {text: [(f.what, f.error) for f in throughputs(rate)] for text, rate in rates.items()}


# ---------------------------------------------------------------------- measured iterations

MEASURED = {"40B": (48.16e9, 242.3), "52B": (44.28e9, 238.6), "70B": (68.61e9, 370.6), "100B": (105.9e9, 572.0)}
"""Parameters and seconds of an iteration of DeepSpeed ZeRO-3 with its optimizer on NVMe: 4 GPUs, batch 1 (MLP)."""
FORWARD = {"40B": 0.65, "52B": 0.51, "70B": 0.77, "100B": 1.20}
"""Seconds of its forward (MLP); backward without the spilling of gradients is taken as three times that."""
DISK = 6.13 * GB
"""The one constant fitted to the four: the middle of the rates at which each of them moves 32 bytes a parameter."""


def iteration(params: float, forward: float, layers: int = 64) -> float:
    """Return the seconds of an iteration: 4 bytes a parameter spilled in backward, then 16 read and 12 written."""
    layer = params / layers
    load = UnitLoad(
        "layer",
        gradient=Traffic(nvme_write=4 * layer),
        update=Traffic(nvme_read=16 * layer, nvme_write=12 * layer),
        forward_seconds=forward / layers,
        backward_seconds=3 * forward / layers,
        tile_bytes=1,
    )
    servers = {"nvme_read": "nvme", "nvme_write": "nvme"}
    setting = Setting(Rates(nvme_read=DISK, nvme_write=DISK), servers, tiles=4)
    return predict([replace(load, name=f"layer {i}") for i in range(layers)], setting).seconds


def iterations() -> list[Figure]:
    """Return DeepSpeed's measured iterations with the optimizer on NVMe."""
    return [
        Figure("DeepSpeed NVMe", name, seconds, iteration(params, FORWARD[name]), "s", "MLP", tolerance=0.05)
        for name, (params, seconds) in MEASURED.items()
    ]


def figures() -> Sequence[Figure]:
    """Return everything."""
    return [*largest_models(), *efficiencies(), *throughputs(), *iterations()]
