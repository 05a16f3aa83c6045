"""Collectives on flat buffers, over torch.distributed.

Note [Exact reduction]
~~~~~~~~~~~~~~~~~~~~~~
The reduce-scatter is an all-to-all of slices and a sum in rank order in float32: each rank gets its slice of every
rank's gradients, and adds them up. That moves the bytes that a ring moves, in the dtype that the gradients have, but
the result has one rounding less per hop, does not depend on the algorithm of the backend, and can be computed by a
serial oracle to the bit. (A ring in bfloat16 rounds to bfloat16 at each of its steps.)

With hybrid sharding, ranks form groups that have one copy of the model each. The slices' sums then go all-to-all among
the ranks that have the same slice, in float32, and are added up in the order of the groups.
"""

from __future__ import annotations

import atexit
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_zinf.comm.channel import Channel, StarChannel, connect
from lightning_zinf.comm.rounds import Rounds
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.monitor.trace import Event


@dataclass
class Ranks:
    """The ranks that train a model together, and how it is cut among them.

    Attributes:
        rank: This rank.
        world_size: Number of ranks.
        shard_size: Number of ranks that share one copy of the model.
        shard_group: The ranks that share this rank's copy; never the default group, whose collectives are Lightning's
            and the user's.
        reduce_group: The same ranks once more: what goes out in backward may be ordered otherwise than the gathers,
            on each rank, and a group matches its collectives by their order.
        replica_group: The ranks that have the same shard as this one, or None if there is one copy.
        channel: For agreement.
        world: The process group of all ranks.
        local_size: Number of ranks on this machine.
    """

    rank: int
    world_size: int
    shard_size: int
    shard_group: Any
    reduce_group: Any
    replica_group: Any
    channel: StarChannel
    world: Any = None
    local_size: int = 1

    @property
    def shard_rank(self) -> int:
        """Number of this rank's shard."""
        return self.rank % self.shard_size

    @property
    def replicas(self) -> int:
        """Number of copies of the model."""
        return self.world_size // self.shard_size


_built: dict[tuple[Any, ...], Ranks] = {}
_abandoned: list[Ranks] = []
"""Those whose groups nobody uses any more: after a failure a collective may be under way there that some never join."""
_generation = 0


@atexit.register
def _leave() -> None:
    """Destroy the process groups while threads of theirs can still be joined.

    A thread of gloo's drops the tensors of a collective some time after the collective is done, and needs the
    interpreter for that. If it comes to it only when the interpreter is going down, the process aborts. Lightning
    destroys groups at exit for nccl only. After a failure a collective may be under way that nobody will join, which
    to wait for would take as long as the timeout.
    """
    broken = bool(_abandoned) or any(ranks.channel.broken is not None for ranks in _built.values())
    if broken or not _built or not dist.is_initialized():
        return
    for ranks in _built.values():
        ranks.channel.close()
        ranks.shard_group = ranks.reduce_group = ranks.replica_group = ranks.world = None
    _built.clear()
    dist.destroy_process_group()


def ranks_of(shard_size: int | None, timeout: timedelta, local_size: int = 1) -> Ranks:
    """Return the ranks of the default process group; all of them call this.

    Args:
        shard_size: Number of ranks that share one copy of the model; None for all.
        timeout: Longest time to wait for other ranks.
        local_size: Number of ranks on this machine.

    Raises:
        ValueError: If ``shard_size`` does not divide the number of ranks, or the process group is for an accelerator
            alone.
        ChannelError: If the ranks cannot be connected.
    """
    global _generation
    _check_backend()
    world = dist.get_world_size()
    shard_size = world if shard_size is None else shard_size
    if world % shard_size:
        raise ValueError(
            f"shard_size={shard_size} must divide the number of ranks, {world}: each group of that many ranks has one "
            "copy of the model"
        )
    key = (id(dist.group.WORLD), shard_size, timeout)  # the entry keeps the group, so that its id stays its own
    found = _built.get(key)
    if found is not None and found.channel.broken is None:
        return found
    if found is not None:  # a rank failed: whatever comes next in these groups could meet what is under way in them
        found.channel.close()
        _abandoned.append(found)
    _generation += 1
    rank = dist.get_rank()
    store = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined,unused-ignore]
    channel = connect(store, rank, world, timeout, f"zinf/channel/{_generation}")
    shard_group: Any = None
    reduce_group: Any = None
    replica_group: Any = None
    for start in range(0, world, shard_size):
        members = list(range(start, start + shard_size))
        group = dist.new_group(members, timeout=timeout)
        reduce_group = group if rank in members else reduce_group
        group = dist.new_group(members, timeout=timeout)
        shard_group = group if rank in members else shard_group
    if shard_size < world:
        for offset in range(shard_size):
            group = dist.new_group(list(range(offset, world, shard_size)), timeout=timeout)
            replica_group = group if rank % shard_size == offset else replica_group
    _built[key] = Ranks(
        rank, world, shard_size, shard_group, reduce_group, replica_group, channel, dist.group.WORLD, local_size
    )
    return _built[key]


def _check_backend() -> None:
    """Raise ValueError if the default process group has no backend for tensors in host memory."""
    try:
        dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr,unused-ignore]
    except RuntimeError as error:
        raise ValueError(
            f"the process group has the backend {dist.get_backend()!r}, which moves no tensors in host memory, where "
            "the zinf strategy keeps what is offloaded: leave process_group_backend out, or set it to "
            "'cpu:gloo,cuda:nccl'"
        ) from error


class Collectives:
    """Collectives of one engine, which count their bytes.

    Args:
        ranks: The ranks.
        counters: Where bytes are counted, as the size of the whole buffer that is gathered or reduced.
    """

    def __init__(self, ranks: Ranks, counters: Counters) -> None:
        self.ranks = ranks
        self.counters = counters

    def all_gather(self, whole: Tensor, shard: Tensor, name: str) -> Any:
        """Start to fill ``whole`` with every rank's ``shard``, which may be its own part of ``whole``.

        Returns:
            Something to ``wait()`` for.
        """
        self.counters.all_gather_bytes += whole.nbytes
        trace = self.counters.trace
        event = None if trace is None else trace.observe("all_gather", name, whole.nbytes)
        work = _all_gather(whole, shard, self.ranks.shard_group)
        return work if event is None else _Observed(work, event)

    def reduce_scatter(self, whole: Tensor, name: str) -> Reduction:
        """Start to reduce ``whole``, which must stay untouched until the result is taken."""
        self.counters.reduce_scatter_bytes += whole.nbytes
        trace = self.counters.trace
        event = None if trace is None else trace.observe("reduce_scatter", name, whole.nbytes)
        if self.ranks.shard_size == 1:
            return Reduction(self, whole, whole, None, event)
        received = torch.empty_like(whole)
        work = dist.all_to_all_single(received, whole, group=self.ranks.reduce_group, async_op=True)
        return Reduction(self, whole, received, work, event)

    def broadcast(self, tensor: Tensor) -> None:
        """Give ``tensor`` the value that it has on rank 0."""
        self.counters.broadcast_bytes += tensor.nbytes
        dist.broadcast(tensor, 0)


@dataclass
class _Observed:
    """A collective under way, and its event in a trace."""

    work: Any
    event: Event

    def wait(self) -> None:
        """Block until it is done."""
        self.work.wait()
        self.event.close()


@dataclass
class Reduction:
    """A reduce-scatter under way.

    Attributes:
        collectives: Whose.
        sent: The whole gradients, kept until they are sent.
        received: One slice of each rank.
        work: The transfer, or None if there is none.
        event: Its event in a trace, or None.
        others: With several copies of the model, the sums of all of them, once this one's is on its way there.
        second: That transfer.
    """

    collectives: Collectives
    sent: Tensor | None
    received: Tensor | None
    work: Any
    event: Event | None = None
    others: Tensor | None = None
    second: Any = None

    def arrived(self) -> bool:
        """Whether :meth:`mean` would not wait.

        Ranks that share a shard must ask, or take the mean, of their reductions in the same order: what has come from
        this copy of the model goes on to the others, and a group matches collectives by their order.
        """
        if self.work is not None and not self.work.is_completed():
            return False
        if self.collectives.ranks.replica_group is None:
            return True
        with torch.no_grad():
            self._pass_on()
        return bool(self.second.is_completed())

    def mean(self) -> Tensor:
        """Wait, and return this rank's slice of the mean over all ranks, in float32."""
        ranks = self.collectives.ranks
        if self.work is not None:
            self.work.wait()
        if ranks.replica_group is None:
            total = self._sum_of_copy()
        else:
            self._pass_on()
            self.second.wait()
            assert self.others is not None
            total = _sum(self.others, ranks.replicas)
        if self.event is not None:
            self.event.close()
        return total.mul_(1.0 / ranks.world_size)

    def _sum_of_copy(self) -> Tensor:
        assert self.received is not None
        total = _sum(self.received, self.collectives.ranks.shard_size)
        self.sent = self.received = None
        return total

    def _pass_on(self) -> None:
        """Send the sum over this copy of the model to the others, once."""
        if self.second is not None:
            return
        if self.work is not None:
            self.work.wait()  # it is done, and this is how its result may be used
        ranks, total = self.collectives.ranks, self._sum_of_copy()
        self.others = torch.empty(total.numel() * ranks.replicas, dtype=torch.float32, device=total.device)
        self.collectives.counters.all_reduce_bytes += total.nbytes
        self.second = _all_gather(self.others, total, ranks.replica_group)


def _sum(slices: Tensor, count: int) -> Tensor:
    """Add ``count`` equal slices up in float32, first to last."""
    parts = slices.view(count, -1)
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    return total


def _all_gather(whole: Tensor, shard: Tensor, group: Any) -> Any:
    gather = getattr(dist, "all_gather_single", None)  # the name since torch 2.13
    if gather is not None:
        return gather(whole, shard, group=group, async_op=True)
    return dist.all_gather_into_tensor(whole, shard, group=group, async_op=True)


def sum_over_shards(value: float, ranks: Ranks, rounds: Rounds, place: str) -> float:
    """Return the sum of a float64 over the shards of one copy of the model, added up in rank order."""
    parts = [struct.unpack("<d", p)[0] for p in rounds.meet(place, struct.pack("<d", value))]
    return float(sum(parts[: ranks.shard_size]))


def least(values: Sequence[int], channel: Channel, place: str) -> list[int]:
    """Return the least of each value over all ranks."""
    form = f"<{len(values)}q"
    everyone = [struct.unpack(form, part) for part in channel.exchange(struct.pack(form, *values), f"is at {place}")]
    return [min(column) for column in zip(*everyone, strict=True)]
