"""Loading a sharded checkpoint into shards: any number of ranks, stage, tier, grouping and precision into any other.

Note [Loading]
~~~~~~~~~~~~~~
Where a range of a target buffer comes from is interval arithmetic on the names and offsets of parameters. The values
go in as an update does, record by record, where the planes lie: so a rank never holds more than a few tiles, and paged
weights are written when their unit is settled. Checksums are compared before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_zinf.checkpoint.manifest import Buffer, CheckpointError
from lightning_zinf.checkpoint.source import Averages, Checkpoint, ShardedStateDict
from lightning_zinf.memory.state import LOW_PLANES, Record, State
from lightning_zinf.optim.average import PLANE
from lightning_zinf.optim.update import Update, set_master

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer
    from lightning_zinf.engine.engine import Engine
    from lightning_zinf.optim.binding import OptimizerBinding

_CHUNK = 1 << 20
"""Elements that are read at a time."""


@dataclass(frozen=True)
class Move:
    """Elements that come from the checkpoint.

    Attributes:
        start: First element in this rank's shard.
        numel: How many.
        source: The buffer that they come from.
        first: First element there.
    """

    start: int
    numel: int
    source: Buffer
    first: int


class Load(Update):
    """Put values from a checkpoint into this rank's shard of a buffer.

    Args:
        moves: From where to where.
        put: Called with a move's part, and the weights and planes of just its elements.
        weights_only: It changes nothing but weights, and the planes that make masters of them.
    """

    def __init__(
        self,
        moves: Sequence[Move],
        put: Callable[[Move, Tensor, dict[str, Tensor]], None],
        *,
        weights_only: bool = False,
    ) -> None:
        self._moves = moves
        self._put = put
        self._weights_only = weights_only

    def needs(self, planes: Sequence[str]) -> bool:
        """Whether it reads or changes any of these planes."""
        return not self._weights_only or not set(LOW_PLANES).isdisjoint(planes)

    def apply(self, weight: Tensor, state: State) -> None:
        """Fill the shard; planes that it does not need stay where they are."""
        if self.needs(state.planes):
            super().apply(weight, state)
        else:
            with torch.no_grad():
                self.update_record(weight, Record(0, weight.numel(), {}))

    def update_record(self, weight: Tensor, record: Record) -> None:
        """Fill a range of elements."""
        for move in self._moves:
            low, high = max(record.start, move.start), min(record.stop, move.start + move.numel)
            for at in range(low, high, _CHUNK):
                end = min(at + _CHUNK, high)
                inside = slice(at - record.start, end - record.start)
                part = Move(at, end - at, move.source, move.first + at - move.start)
                self._put(part, weight[inside], {n: p[inside] for n, p in record.planes.items()})


def load_weights(engine: Engine, state: ShardedStateDict, strict: bool = True) -> None:
    """Load the weights, and what else the state dict has.

    Raises:
        RuntimeError: For keys and shapes that do not match, as ``load_state_dict`` does.
        CheckpointError: If the checkpoint is damaged, on all ranks; the model stays as it was.
    """
    source = state.source
    expected = engine.root.state_dict(keep_vars=True)
    _check_keys(engine, state, expected, strict)
    moves = {id(b): _moves(source, b, b.names, state) for u in engine.units for b in u.buffers}
    _verify(engine, source, [m for found in moves.values() for m in found], [source.manifest.module])

    def put(move: Move, weight: Tensor, planes: dict[str, Tensor]) -> None:
        master = weight if weight.dtype == torch.float32 else planes.get("master")
        if master is None:
            master = state.read(move.source, move.first, move.first + move.numel).to(weight.device)
        else:
            state.fill(move.source, move.first, master)
        set_master(weight, planes, master)

    # All ranks update the same buffers, also those of which one has nothing but padding.
    found = [b for u in engine.units for b in u.buffers if any(n in state and n in source.locations for n in b.names)]
    _apply(engine, [(b, Load(moves[id(b)], put, weights_only=True)) for b in found])
    # A buffer of the checkpoint may be something here that the engine does not keep: others draw the line elsewhere.
    kept = {n for n in source.locations if isinstance(p := expected.get(n), nn.Parameter) and engine.places_of(p)}
    others = {n: state[n] for n in state if n in expected and n not in kept}
    others.update({n: v for n, v in state.changed().items() if n in expected})
    engine.root.load_state_dict(others, strict=False)
    engine.flush()


def _check_keys(engine: Engine, state: ShardedStateDict, expected: Mapping[str, Any], strict: bool) -> None:
    missing, unexpected = [n for n in expected if n not in state], [n for n in state if n not in expected]
    lines = []
    if strict and missing:
        lines.append(f"Missing key(s) in state_dict: {', '.join(map(repr, missing))}. ")
    if strict and unexpected:
        lines.append(f"Unexpected key(s) in state_dict: {', '.join(map(repr, unexpected))}. ")
    for name in state:
        value = expected.get(name)
        if isinstance(value, Tensor) and tuple(value.shape) != state.shape(name):
            lines.append(
                f"size mismatch for {name}: copying a param with shape {state.shape(name)} from checkpoint, the "
                f"shape in current model is {tuple(value.shape)}."
            )
    if lines:
        kind = type(engine.root).__name__
        raise RuntimeError(f"Error(s) in loading state_dict for {kind}:\n\t" + "\n\t".join(lines))


def _moves(source: Checkpoint, buffer: FlatBuffer, names: Sequence[str], wanted: Any) -> list[Move]:
    """Return where this rank's shard of a buffer comes from.

    Args:
        source: The checkpoint.
        buffer: The buffer.
        names: For each of its parameters the name in the checkpoint.
        wanted: The names to be loaded.
    """
    first, end = buffer.shard_range
    found = []
    for index, offset, low, numel in buffer.layout.overlaps(first, end):
        name = names[index]
        if name not in wanted or name not in source.locations:
            continue
        at = low - first
        for start, length in buffer.origins[index].part.runs(offset, offset + numel):
            for kept, position, count in source.locations[name].runs(start, start + length):
                found.append(Move(at, count, kept, position))
                at += count
    return found


def _verify(engine: Engine, source: Checkpoint, moves: Sequence[Move], names: Sequence[str] = ()) -> None:
    """Compare the checksums of all files that are needed; all ranks raise if one does."""
    files = {n for m in moves for n, _, _ in source.pieces(m.source, m.first, m.first + m.numel)} | set(names)
    error = ""
    try:
        source.verify(sorted(files))
    except (CheckpointError, OSError) as problem:
        error = str(problem)
    if engine.rounds is not None:
        told = [a.decode() for a in engine.rounds.meet("checking a checkpoint", error.encode())]
        error = next((t for t in told if t), "")
    if error:
        raise CheckpointError(error)


def _apply(engine: Engine, updates: Sequence[tuple[FlatBuffer, Update]]) -> None:
    engine.flush()
    engine.begin_updates("loading a checkpoint")
    for unit in engine.units:
        for buffer, update in updates:
            if buffer in unit.buffers:
                if buffer.state is None:
                    buffer.need_planes(())
                engine.update(buffer, update)
    engine.stepped()
    engine.flush()


def load_averages(engine: Engine, source: Checkpoint, averages: Averages) -> None:
    """Load the weights of the last step, and averages into the buffers that have the plane.

    Raises:
        CheckpointError: If the checkpoint is damaged, on all ranks.
    """
    found = [b for u in engine.units for b in u.buffers if b.state is not None and PLANE in b.state.planes]
    moves = {id(b): _moves(source, b, b.names, source.locations) for b in found}
    _verify(engine, source, [m for some in moves.values() for m in some])

    def put(move: Move, weight: Tensor, planes: dict[str, Tensor]) -> None:
        span = (move.source, move.first, move.first + move.numel, averages)
        set_master(weight, planes, source.values(*span, average=False).to(weight.device))
        planes[PLANE].copy_(source.values(*span, average=True))

    _apply(engine, [(b, Load(moves[id(b)], put)) for b in found])


def load_optimizer(binding: OptimizerBinding, source: Checkpoint, number: int, rest: Mapping[str, Any]) -> None:
    """Load the state of an optimizer.

    Args:
        binding: The optimizer.
        source: The checkpoint.
        number: Which of its optimizers.
        rest: What ``torch.optim`` keeps of it beside tensors of a parameter's shape.

    Raises:
        ValueError: If the param groups do not match the optimizer's.
        CheckpointError: If the checkpoint is damaged, on all ranks.
    """
    engine, optimizer = binding.engine, binding.optimizer
    theirs = source.manifest.optimizers[number]
    sizes = [len(g["params"]) for g in rest["param_groups"]]
    if sizes != [len(g["params"]) for g in optimizer.param_groups] or sum(sizes) != len(theirs):
        raise ValueError(
            f"the saved optimizer has param groups of {sizes} parameters, this one of "
            f"{[len(g['params']) for g in optimizer.param_groups]}: build the optimizer as it was when it was saved"
        )
    where = {
        id(p): (theirs[i], rest["state"].get(i), group)
        for i, (p, group) in enumerate((p, g) for g in optimizer.param_groups for p in g["params"])
    }
    moves: dict[int, list[Move]] = {}
    for buffer in binding.buffers():
        names = [where[id(o.param)][0] if id(o.param) in where else "" for o in buffer.origins]
        moves[id(buffer)] = _moves(source, buffer, names, {n for n in names if n})
    _verify(engine, source, [m for found in moves.values() for m in found])
    updates: list[tuple[FlatBuffer, Update]] = []
    for buffer in binding.buffers():
        planes: set[str] = set()
        for index, origin in enumerate(buffer.origins):
            if id(origin.param) in where:
                name, entry, group = where[id(origin.param)]
                own = binding.rule.planes(group)
                planes |= set(own)
                found = _state_of(source, name, entry)
                binding.rule.refuse_another(found, group)
                there = {p: True for p in own if p in found}
                binding.rule.restore(buffer, index, {**there, **(entry or {})}, group)
        buffer.need_planes(tuple(sorted(planes)))
        updates.append((buffer, Load(moves[id(buffer)], _putter(source, sorted(planes)))))
    _apply(engine, updates)
    for group, packed in zip(optimizer.param_groups, rest["param_groups"], strict=True):
        group.update({k: v for k, v in packed.items() if k not in ("params", "param_names")})


def _state_of(source: Checkpoint, name: str, entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a parameter's entry of the state of its optimizers, with True for planes: nobody asks what is in them.

    Args:
        source: The checkpoint.
        name: The parameter's name there.
        entry: What is kept beside planes: nothing, for SGD with momentum. None if the parameter had no state.
    """
    if entry is None:
        return {}
    planes = (p for p in source.locations[name].planes if p not in ("weight", *LOW_PLANES, PLANE))
    return {**dict.fromkeys(planes, True), **entry}


def _putter(source: Checkpoint, planes: Sequence[str]) -> Callable[[Move, Tensor, dict[str, Tensor]], None]:
    def put(move: Move, weight: Tensor, found: dict[str, Tensor]) -> None:
        for plane in planes:
            if plane in move.source.planes:
                source.fill(move.source, plane, move.first, found[plane])
            else:
                found[plane].zero_()

    return put
