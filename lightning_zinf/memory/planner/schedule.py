"""The engine's schedule of a step as tasks of stages: one model for prediction, planning and deadlock tests.

Note [The schedule]
~~~~~~~~~~~~~~~~~~~
Forward, unit after unit: ``nvme read -> h2d -> gather -> compute``; backward, in the opposite order, the same again
and ``reduce -> d2h``; an update: ``nvme read -> update -> write back``. Every arrow is a stage with its own queue;
reads run ahead as far as slots for gathered weights and tiles for state have room. Updates run

- ``after``: when backward has ended, and the next forward when they have (state in memory; DeepSpeed);
- ``deferred``: right before the weights' next use, so that their reads and writes hide under the next forward;
- ``backward``: as each unit's gradients are complete.

Several steps are simulated one after the other, and the last is measured: the first has no update to defer.

Weights that a slot still has are not fetched again: at the turn from forward to backward those of the last units, at
the turn to the next step those of the first. What the slots hold beside the root's unit and one in use counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_zinf.memory.planner.events import Task, Timeline, simulate
from lightning_zinf.memory.planner.machine import Rates
from lightning_zinf.memory.planner.options import When
from lightning_zinf.memory.planner.traffic import Traffic

STEPS = 3
STAGES = {
    "nvme_read": "nvme_read",
    "nvme_write": "nvme_write",
    "host_to_device": "host_to_device",
    "device_to_host": "device_to_host",
    "all_gather": "gather",
    "reduce_scatter": "gather",
}
"""The rate that each link of :class:`Traffic` goes by, which is the name of its server too."""


@dataclass(frozen=True)
class UnitLoad:
    """What one unit puts on the stages.

    Attributes:
        name: For the reader.
        gather: Bytes of one gather.
        gradient: Bytes of its gradients in one backward.
        update: Bytes of an update, beside a gather.
        leaves: Bytes of activations that go out after forward, and come back before backward.
        forward_seconds: Compute of the forward of a micro-batch.
        backward_seconds: Compute of its backward, with recomputation.
        update_seconds: Time of the optimizer's kernel.
        when: When updates run.
        slot_bytes: Bytes of its gathered weights, if they pass through slots.
        tile_bytes: Bytes of its state, if it passes through tiles.
        gathers: Gathers of a micro-batch, forward and backward together.
        root: Whether it stays gathered throughout a step.
    """

    name: str
    gather: Traffic = field(default_factory=Traffic)
    gradient: Traffic = field(default_factory=Traffic)
    update: Traffic = field(default_factory=Traffic)
    leaves: Traffic = field(default_factory=Traffic)
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    update_seconds: float = 0.0
    when: When = "after"
    slot_bytes: int = 0
    tile_bytes: int = 0
    gathers: int = 2
    root: bool = False


@dataclass(frozen=True)
class Setting:
    """What the stages of all units share.

    Attributes:
        rates: Of the links.
        servers: Stages that share a server, by the server's name.
        slots: Bytes of slots.
        tiles: Bytes of tiles.
        accumulate: Micro-batches of a step.
        overlap: False has one task run at a time, in order.
        keeps: Whether weights that a slot still has at the end of a step serve the next one: they do on one rank whose
            device is the host.
    """

    rates: Rates
    servers: Mapping[str, str] = field(default_factory=dict)
    slots: int = 0
    tiles: int = 0
    accumulate: int = 1
    overlap: bool = True
    keeps: bool = True


@dataclass(frozen=True)
class Prediction:
    """How long a step takes.

    Attributes:
        seconds: Of a step.
        busy: Seconds that each server is at work in a step.
    """

    seconds: float
    busy: dict[str, float]

    @property
    def binding(self) -> str:
        """The server that is busy longest."""
        return max(self.busy, key=lambda s: self.busy[s], default="nothing")

    @property
    def bound(self) -> float:
        """Its seconds: no schedule can be faster."""
        return max(self.busy.values(), default=0.0)


class Schedule:
    """Builds the tasks of consecutive steps.

    Args:
        loads: The units in the order of forward.
        setting: What they share.
    """

    def __init__(self, loads: Sequence[UnitLoad], setting: Setting) -> None:
        self.loads = list(loads)
        self.setting = setting
        self.tasks: list[Task] = []
        self.ends: list[int] = []  # the task that ends each step's compute
        self.slots = max([setting.slots - sum(u.slot_bytes for u in loads if u.root)] + [_slot(u) for u in loads])
        self.tiles = max(setting.tiles, 1)
        self._fresh: dict[int, list[int]] = {}  # tasks after which a unit's weights can be used where they are
        self._written: dict[int, list[int]] = {}  # tasks after which they, and its state, can be read again
        self._computed: list[int] = []  # the last compute, which the next comes after
        self._graded: dict[int, list[int]] = {}  # tasks that end a unit's gradients
        self._gone: dict[int, list[int]] = {}  # tasks after which a unit's activations are where they wait
        self._barrier: list[int] = []  # the end of backward and of updates "after"
        self._kept = self._keep(self.loads[::-1])
        self._kept_first = self._keep(self.loads)
        self._resident: set[int] = set()

    def pools(self) -> dict[str, int]:
        """Return the bytes of each pool."""
        return {"slots": self.slots, "tiles": self.tiles}

    def build(self, steps: int = STEPS) -> list[Task]:
        """Return the tasks of ``steps`` steps."""
        for step in range(steps):
            for micro in range(self.setting.accumulate):
                self._forward(step, micro)
                self._backward(step, micro)
            self._end(step)
        return self.tasks

    def _keep(self, order: Sequence[UnitLoad]) -> set[int]:
        """Return the units whose slots survive a turn before which ``order`` is used last to first."""
        room = self.slots - max((_slot(u) for u in self.loads), default=0)
        kept = set()
        for unit in order:
            if not _slot(unit):
                continue
            room -= unit.slot_bytes
            if room < 0:
                break
            kept.add(self.loads.index(unit))
        return kept

    def _forward(self, step: int, micro: int) -> None:
        for index, unit in enumerate(self.loads):
            ready = self._fetch(index, f"{unit.name} forward {step}.{micro}")
            pending = unit.when == "deferred" and micro == 0 and step > 0
            if pending:
                ready = self._update(index, f"{unit.name} update {step}", ready)
            if unit.gathers and micro == 0 and step > 0 and not pending:
                ready = ready + self._fresh.get(index, [])
            given = {} if index in self._kept or unit.root or not _slot(unit) else {"slots": unit.slot_bytes}
            if given:
                self._resident.discard(index)
            self._compute(f"{unit.name} forward {step}.{micro}", unit.forward_seconds, ready, given)
            out = self._move(f"{unit.name} out", {"device_to_host": unit.leaves.device_to_host}, self._computed)
            self._gone[index] = self._move(f"{unit.name} out", {"nvme_write": unit.leaves.nvme_write}, out)

    def _backward(self, step: int, micro: int) -> None:
        last = micro == self.setting.accumulate - 1
        for index in reversed(range(len(self.loads))):
            unit = self.loads[index]
            name = f"{unit.name} backward {step}.{micro}"
            ready = self._fetch(index, name) if unit.gathers > 1 else []
            back = self._move(f"{name} in", {"nvme_read": unit.leaves.nvme_read}, self._gone[index])
            ready = ready + self._move(f"{name} in", {"host_to_device": unit.leaves.host_to_device}, back)
            stays = index in self._kept_first and (self.setting.keeps or not last)
            held = index in self._resident and bool(_slot(unit)) and not stays
            if held:
                self._resident.discard(index)
            self._compute(name, unit.backward_seconds, ready, {"slots": unit.slot_bytes} if held else {})
            chain = self._move(f"{name} reduce", {"reduce_scatter": unit.gradient.reduce_scatter}, [self._computed[-1]])
            chain = self._move(f"{name} down", {"device_to_host": unit.gradient.device_to_host}, chain)
            chain = self._move(f"{name} spill", {"nvme_write": unit.gradient.nvme_write}, chain)
            self._graded[index] = chain
            if unit.when == "backward" and last:
                self._update(index, f"{unit.name} update {step}", chain)

    def _end(self, step: int) -> None:
        graded = [t for chain in self._graded.values() for t in chain]
        self._resident -= {i for i, u in enumerate(self.loads) if u.root}
        self.ends.append(self._add(f"step {step}", "step", 0.0, [*self._computed[-1:], *graded]))
        self._barrier = [self.ends[-1]]
        done = []
        for index, unit in enumerate(self.loads):
            if unit.when == "after":
                done += self._update(index, f"{unit.name} update {step}", self._barrier)
        if done:
            self._barrier = [self._add(f"updates {step}", "step", 0.0, done)]
        self._computed = [*self._computed[-1:], *self._barrier]

    def _fetch(self, index: int, name: str) -> list[int]:
        """Bring a unit's weights to where compute reads them, unless they are still there."""
        unit = self.loads[index]
        if not unit.gathers or index in self._resident:
            return self._fresh.get(index, [])
        takes = {"slots": unit.slot_bytes} if _slot(unit) and not unit.root else {}
        chain = [*self._fresh.get(index, []), *self._written.get(index, [])]
        links = {k: v for k in ("nvme_read", "host_to_device", "all_gather") if (v := getattr(unit.gather, k))}
        if not links:
            return self._fresh.get(index, [])
        for link, nbytes in links.items():
            chain = self._move(f"{name} {link}", {link: nbytes}, chain, takes)
            takes = {}
        if unit.slot_bytes:
            self._resident.add(index)
        return chain

    def _update(self, index: int, name: str, ready: list[int]) -> list[int]:
        unit = self.loads[index]
        takes = {"tiles": min(unit.tile_bytes, self.tiles)} if unit.tile_bytes else {}
        chain = [*ready, *self._graded.get(index, []), *self._barrier]
        read = [*self._barrier, *self._written.get(index, [])]
        read = (
            self._move(f"{name} read", {"nvme_read": unit.update.nvme_read}, read, takes)
            if takes or unit.update.nvme_read
            else []
        )
        update = self._add(name, "update", unit.update_seconds, [*chain, *read])
        wrote = self._move(f"{name} write", {"nvme_write": unit.update.nvme_write}, [update], gives=takes)
        up = self._move(f"{name} up", {"host_to_device": unit.update.host_to_device}, [update])
        up = self._move(f"{name} gather", {"all_gather": unit.update.all_gather}, up)
        self._fresh[index], self._written[index] = up, wrote
        return up if unit.when == "deferred" else [*wrote, *up]

    def _compute(self, name: str, seconds: float, ready: list[int], gives: dict[str, int]) -> None:
        self._computed = [self._add(name, "compute", seconds, [*ready, *self._computed], gives=gives)]

    def _move(
        self,
        name: str,
        links: Mapping[str, float],
        after: list[int],
        takes: dict[str, int] | None = None,
        gives: dict[str, int] | None = None,
    ) -> list[int]:
        """Add a transfer over one link; return what comes after it."""
        ((link, nbytes),) = links.items()
        if not nbytes and not takes and not gives:
            return after
        rate = getattr(self.setting.rates, STAGES[link])
        return [self._add(name, link, nbytes / rate if rate else 0.0, after, takes, gives)]

    def _add(
        self,
        name: str,
        stage: str,
        seconds: float,
        after: list[int],
        takes: dict[str, int] | None = None,
        gives: dict[str, int] | None = None,
    ) -> int:
        if not self.setting.overlap and self.tasks:
            after = [*after, len(self.tasks) - 1]
        self.tasks.append(Task(name, stage, seconds, list(after), takes or {}, gives or {}))
        return len(self.tasks) - 1


def _slot(unit: UnitLoad) -> int:
    return 0 if unit.root else unit.slot_bytes


def run(loads: Sequence[UnitLoad], setting: Setting, steps: int = STEPS) -> tuple[Schedule, Timeline]:
    """Simulate some steps; return the tasks and when each ran."""
    schedule = Schedule(loads, setting)
    tasks = schedule.build(steps)
    servers = {link: STAGES.get(link, link) for link in {t.stage for t in tasks}}
    servers.update(setting.servers)
    return schedule, simulate(tasks, servers, schedule.pools())


def predict(loads: Sequence[UnitLoad], setting: Setting) -> Prediction:
    """Return how long a step takes once the pipeline is full, and what bounds it."""
    schedule, timeline = run(loads, setting)
    shorter = len(Schedule(loads, setting).build(STEPS - 1))
    seconds = timeline.end[schedule.ends[-1]] - timeline.end[schedule.ends[-2]]
    servers = {**{s: STAGES.get(s, s) for s in {t.stage for t in schedule.tasks}}, **setting.servers}
    busy: dict[str, float] = {}
    for task in schedule.tasks[shorter:]:  # what one more step adds
        busy[servers[task.stage]] = busy.get(servers[task.stage], 0.0) + task.seconds
    busy.pop("step", None)
    return Prediction(seconds, busy)
