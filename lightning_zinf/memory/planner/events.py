"""A discrete-event simulation of stages with queues and byte budgets.

Note [Stages, servers and pools]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
A *stage* is a queue: its tasks start in the order in which they were issued, so one that has to wait holds up those
behind it, as in the engine. A *server* does one task at a time and serves one or several stages (a disk that cannot
read and write at once serves two; a CPU that computes and updates serves two). A *pool* is a byte budget: a task takes
bytes of it to start, and the task that ends their use gives them back. A task starts when it is at the head of its
stage, all tasks that it comes after have ended, its server is idle and its pools have room.

If nothing runs and tasks are left, they wait for each other for ever: that is reported with what each of them lacks.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


class DeadlockError(Exception):
    """Tasks wait for each other."""


@dataclass
class Task:
    """A piece of work.

    Attributes:
        name: For the reader.
        stage: The queue that it waits in.
        seconds: Time that its server takes.
        after: Indices of tasks that have to end before it starts.
        takes: Bytes that it takes of pools when it starts.
        gives: Bytes that it gives back to pools when it ends.
    """

    name: str
    stage: str
    seconds: float
    after: list[int] = field(default_factory=list)
    takes: dict[str, int] = field(default_factory=dict)
    gives: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Timeline:
    """What happened when.

    Attributes:
        start: When each task began, in seconds.
        end: When it ended.
        peak: Most bytes taken of each pool.
    """

    start: list[float]
    end: list[float]
    peak: dict[str, int]

    @property
    def seconds(self) -> float:
        """When the last task ended."""
        return max(self.end, default=0.0)


class _Run:
    def __init__(self, tasks: Sequence[Task], servers: Mapping[str, str], pools: Mapping[str, int]) -> None:
        self.tasks = tasks
        self.pools = pools
        self.taken = dict.fromkeys(pools, 0)
        self.peak = dict.fromkeys(pools, 0)
        self.start = [0.0] * len(tasks)
        self.end = [0.0] * len(tasks)
        self.waits = [len(set(t.after)) for t in tasks]
        self.then: list[list[int]] = [[] for _ in tasks]
        self.queues: dict[str, deque[int]] = {}
        self.stages_of: dict[str, list[str]] = {}
        for index, task in enumerate(tasks):
            for before in set(task.after):
                if not 0 <= before < len(tasks):
                    raise ValueError(f"task {task.name!r} comes after task {before}, which there is not")
                self.then[before].append(index)
            if task.stage not in self.queues:
                self.queues[task.stage] = deque()
                self.stages_of.setdefault(servers.get(task.stage, task.stage), []).append(task.stage)
            self.queues[task.stage].append(index)
            for pool, nbytes in task.takes.items():
                if nbytes > pools[pool]:
                    raise ValueError(f"task {task.name!r} takes {nbytes} bytes of {pool}, which has {pools[pool]}")
        self.server_of = {stage: server for server, stages in self.stages_of.items() for stage in stages}
        self.busy: set[str] = set()

    def next_of(self, server: str) -> int | None:
        """Return the task that an idle server starts: of the heads that can, the one issued first."""
        heads = [self.queues[s][0] for s in self.stages_of[server] if self.queues[s]]
        ready = [i for i in heads if not self.waits[i] and self.has_room(i)]
        return min(ready, default=None)

    def has_room(self, index: int) -> bool:
        return all(self.taken[p] + n <= self.pools[p] for p, n in self.tasks[index].takes.items())

    def begin(self, index: int, now: float) -> None:
        task = self.tasks[index]
        self.queues[task.stage].popleft()
        self.busy.add(self.server_of[task.stage])
        self.start[index] = now
        for pool, nbytes in task.takes.items():
            self.taken[pool] += nbytes
            self.peak[pool] = max(self.peak[pool], self.taken[pool])

    def finish(self, index: int, now: float) -> None:
        task = self.tasks[index]
        self.busy.discard(self.server_of[task.stage])
        self.end[index] = now
        for pool, nbytes in task.gives.items():
            self.taken[pool] -= nbytes
            assert self.taken[pool] >= 0, (task.name, pool)
        for later in self.then[index]:
            self.waits[later] -= 1

    def stuck(self) -> str:
        lines = []
        for queue in self.queues.values():
            if queue:
                task = self.tasks[queue[0]]
                short = [f"{n} bytes of {p} ({self.pools[p] - self.taken[p]} left)" for p, n in task.takes.items()]
                lacks = f"{self.waits[queue[0]]} tasks before it" if self.waits[queue[0]] else ", ".join(short)
                lines.append(f"{task.stage}: {task.name} waits for {lacks}")
        return "; ".join(lines)


def simulate(
    tasks: Sequence[Task],
    servers: Mapping[str, str] | None = None,
    pools: Mapping[str, int] | None = None,
    delay: Callable[[Task], float] | None = None,
) -> Timeline:
    """Run tasks to their end.

    Args:
        tasks: In the order in which they are issued.
        servers: The server of each stage; a stage that is not named has one of its own.
        pools: Bytes of each pool.
        delay: Seconds that a task takes beside its own, to shake the schedule.

    Raises:
        DeadlockError: If tasks wait for each other, with what they wait for.
        ValueError: If a task takes more than a pool has.
    """
    run = _Run(tasks, servers or {}, pools or {})
    under_way: list[tuple[float, int]] = []
    now, left = 0.0, len(tasks)
    while left:
        started = True
        while started:
            started = False
            for server in run.stages_of:
                if server in run.busy or (index := run.next_of(server)) is None:
                    continue
                run.begin(index, now)
                extra = delay(tasks[index]) if delay else 0.0
                heapq.heappush(under_way, (now + tasks[index].seconds + extra, index))
                started = True
        if not under_way:
            raise DeadlockError(f"{left} tasks wait for each other: {run.stuck()}")
        now, index = heapq.heappop(under_way)
        run.finish(index, now)
        left -= 1
        while under_way and under_way[0][0] == now:
            run.finish(heapq.heappop(under_way)[1], now)
            left -= 1
    return Timeline(run.start, run.end, run.peak)
