"""Where a buffer's weights rest: made when a model is partitioned, and again when a plan changes.

Note [Moving planes]
~~~~~~~~~~~~~~~~~~~~
A plan that is made anew between two steps may have planes rest elsewhere. Updates are applied first, so what moves are
the bits of each plane as they are, unit after unit: no more than one unit is in memory twice. A buffer keeps its
identity, its parameters and its gradients; it gets weights or state of another kind. With several ranks all of them
move the same, since gathering a unit takes all of them. They plan by the same numbers, so they decide the same; that
they did is compared before anything moves, or stays.

Rings get the size that the new plan has, before planes move where they shrink and after where they grow, so that both
together keep within the budget. The bytes on disk of planes that leave it are not used again.

Whether gradients rest on NVMe between backward and the update is decided once, when a model is partitioned: they may
be there between two steps too, and memory has room for its planes only because of it.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_zinf.config import PartitionConfig, Tier
from lightning_zinf.engine.buffer import FlatBuffer
from lightning_zinf.engine.context import EngineContext
from lightning_zinf.engine.residence import AliasedWeights, DeviceWeights
from lightning_zinf.engine.units import Unit
from lightning_zinf.memory.nvme import NvmeStore
from lightning_zinf.memory.planner import Decision, Plan
from lightning_zinf.memory.slots import Slot, SlotRing
from lightning_zinf.memory.state import NvmeState
from lightning_zinf.memory.tiles import TileRing

if TYPE_CHECKING:
    from lightning_zinf.engine.engine import Engine
    from lightning_zinf.memory.planner.residency import Resident


def is_paged(context: EngineContext, tier: Tier) -> bool:
    """Whether weights that rest on a tier are gathered into slots."""
    sharded = context.shards > 1 and context.stage == 3
    return tier == "nvme" or (tier == "host" and not context.aliased) or sharded


def give_weights(buffer: FlatBuffer) -> None:
    """Make the place where a buffer's weights rest, and have it hold a slot that they are to be written to."""
    context, tier = buffer.context, buffer.params_tier
    aliased, paged = context.aliased, is_paged(context, tier)
    nvme = context.nvme.allocate(buffer.shard_bytes, f"{buffer.name}/weight") if tier == "nvme" else None
    slot = None if paged else Slot(context.allocate_device(buffer.weight_bytes))
    home = None
    if paged and (tier == "device" or (aliased and nvme is None)):
        home = context.allocate_device(buffer.shard_bytes).view(buffer.compute_dtype)
    if aliased:
        buffer.weights = AliasedWeights(buffer, slot, nvme, home)
    else:
        stays = slot is not None or home is not None
        keeps_copy = tier == "host" or (stays and not buffer.on_device)
        plane = context.allocate_host(buffer.shard_bytes).view(buffer.compute_dtype) if keeps_copy else None
        buffer.weights = DeviceWeights(buffer, slot, plane, nvme, home)
    buffer.weights.claim()


def settle(buffer: FlatBuffer) -> None:
    """Bind the parameters of a buffer whose weights have been written, or release them."""
    buffer.bind()
    if is_paged(buffer.context, buffer.params_tier) or buffer.flips:
        buffer.unbind()


def make_rings(config: PartitionConfig, context: EngineContext, decision: Decision, on_nvme: int) -> None:
    """Make the rings and files that were decided on and are not there, with room for so many more bytes on NVMe.

    Raises:
        OSError: If a folder cannot be used, or has not that much room.
    """
    if decision.moves:
        if not context.keeps_planes_on_nvme:
            context.install(nvme=_store(config, context, on_nvme))
        elif on_nvme:
            context.nvme.reserve(on_nvme)
        if not context.has_tiles:
            tiles = decision.tiles
            ring = TileRing(tiles.count, tiles.numel, tiles.width, context.allocate_unpinned, context.counters)
            context.install(tiles=ring)
    if decision.slots and not context.has_ring:
        context.install(ring=SlotRing(decision.slots, context.allocate_device, context.counters))
    if decision.staging and not context.has_staging:
        context.install(staging=SlotRing(decision.staging, context.allocate_host, context.counters, "staging"))
    if decision.spill and not context.spills:
        context.install(spill=SlotRing(decision.spill, context.allocate_host, context.counters, "gradients"))


def _store(config: PartitionConfig, context: EngineContext, nbytes: int) -> NvmeStore:
    store = NvmeStore(config.nvme_paths, config.io, context.counters)
    try:
        store.reserve(nbytes)
    except BaseException:
        store.close()
        raise
    return store


# ---------------------------------------------------------------------- another plan


def agree(engine: Engine, decision: Decision) -> None:
    """With several ranks, see that all have decided the same; call it on all of them, before anything moves.

    Args:
        engine: The engine of a model.
        decision: What this rank is about to go by, be it that all stays where it is.

    Raises:
        RuntimeError: On all ranks, with what each has decided, if it is not the same.
    """
    if engine.rounds is None:
        return
    before = engine.plan.decision
    mine = struct.pack("<I", zlib.crc32(repr((before, decision)).encode())) + _told(before, decision).encode()
    told = engine.rounds.meet("a comparison of plans", mine)
    if len({text[:4] for text in told}) > 1:
        said = "; ".join(
            f"rank {rank} ({struct.unpack('<I', text[:4])[0]:08x}): {text[4:].decode()}"
            for rank, text in enumerate(told)
        )
        raise RuntimeError(
            "the ranks have made different plans of where weights and optimizer state rest, and none of them has moved "
            f"anything: {said}. A plan follows from the model, the options and what all ranks measured together, so "
            "give all ranks the same of them and the same versions of lightning-zinf. To train on without another "
            "plan, say where all rests: set offload_params and offload_optimizer to something else than 'auto'"
        )


def _told(before: Decision, decision: Decision) -> str:
    """Return what a rank decided in words and bytes."""
    moves = sum(
        (a.weights != b.weights) + (a.state != b.state) for a, b in zip(before.buffers, decision.buffers, strict=False)
    )
    resting = dict.fromkeys(("device", "host", "nvme"), 0)
    for buffer in decision.buffers:
        for _, tier, nbytes in buffer.planes():
            resting[tier] += nbytes
    rests = ", ".join(f"{nbytes} bytes on {tier}" for tier, nbytes in resting.items() if nbytes)
    return f"{moves} moves, {rests}, {decision.slots} for slots, {decision.staging + decision.tiles.nbytes} for staging"


def move(engine: Engine, plan: Plan) -> bool:
    """Have every plane rest where another plan has it; call it between two steps, on all ranks.

    Args:
        engine: The engine of a model.
        plan: A plan of the same model under the same options, with gradients resting where they do now.

    Returns:
        Whether it was done. A rank whose disk has no room for it keeps all where they are, with a warning.

    Raises:
        RuntimeError: On all ranks, if they have been given different plans.
    """
    agree(engine, plan.decision)
    if engine.saving is not None:
        engine.saving.wait()
    engine.flush()
    there, decision = engine.plan.decision, plan.decision
    assert decision.spill == there.spill, "another plan leaves gradients where they rest"
    decision = replace(  # a ring that is there may still be in use by somebody who holds on to weights
        decision,
        slots=decision.slots or there.slots,
        staging=decision.staging or there.staging,
        tiles=decision.tiles if decision.tiles.count else there.tiles,
    )
    moves = _moves(engine, decision)
    goes_out = sum(
        nbytes
        for _, _, then, now in moves
        for (_, before, nbytes), (_, after, _) in zip(then.planes(), now.planes(), strict=True)
        if after == "nvme" != before
    )
    if problem := _make_room(engine, decision, goes_out):
        warnings.warn(f"planes stay where they are, though memory is short: {problem}", stacklevel=2)
        return False
    for unit in list(engine.pager.held):
        engine.pager.release(unit)
    grows = _ring_bytes(decision) > _ring_bytes(there)
    if not grows:
        _resize(engine, decision)
    for unit in dict.fromkeys(unit for unit, *_ in moves):
        _move(engine, unit, [(buffer, now) for other, buffer, _, now in moves if other is unit])
    if grows:
        _resize(engine, decision)
    engine.rewire()
    engine.plan, engine.placement = replace(plan, decision=decision), decision.where
    return True


def _make_room(engine: Engine, decision: Decision, on_nvme: int) -> str:
    """Make what was decided on and is not there (``make_rings``); return what is in the way on any rank, or nothing."""
    problem = ""
    try:
        make_rings(engine.config, engine.context, decision, on_nvme)
    except OSError as error:
        problem = str(error)
    if engine.rounds is not None:
        told = engine.rounds.meet("room for another plan", problem.encode())
        problem = next((text.decode() for text in told if text), "")
    return problem


def _ring_bytes(decision: Decision) -> int:
    return decision.slots + decision.staging + decision.tiles.nbytes


def _resize(engine: Engine, decision: Decision) -> None:
    """Make rings as large as was decided; state on NVMe is cut anew if tiles have another size then."""
    context, tiles = engine.context, decision.tiles
    if context.has_ring:
        context.ring.resize(decision.slots)
    if context.has_staging:
        context.staging.resize(decision.staging)
    if context.has_tiles:
        context.tiles.resize(tiles.count, tiles.numel, tiles.width)
        for unit in engine.units:
            for buffer in unit.buffers:
                if isinstance(buffer.state, NvmeState):
                    buffer.state.cut_anew()


def _moves(engine: Engine, decision: Decision) -> list[tuple[Unit, FlatBuffer, Resident, Resident]]:
    """Return what has to move: units, buffers, where they are planned now, and where they are to be."""
    units = {unit.name: unit for unit in engine.units}
    names = [unit.name for unit in engine.plan.model.units]
    buffers = [(units[name], buffer) for name in dict.fromkeys(names) for buffer in units[name].buffers]
    return [
        (unit, buffer, then, now)
        for (unit, buffer), then, now in zip(buffers, engine.plan.decision.buffers, decision.buffers, strict=True)
        if (then.weights, then.state) != (now.weights, now.state)
    ]


def _move(engine: Engine, unit: Unit, moves: Sequence[tuple[FlatBuffer, Resident]]) -> None:
    """Move some buffers of a unit, of which nothing is pending."""
    pager = engine.pager
    values: dict[int, Tensor] = {}
    wanted = [buffer for buffer, to in moves if _weights_move(buffer, to)]
    if wanted:
        with engine.loaded(unit), torch.inference_mode(False), torch.no_grad():
            values = {id(buffer): buffer.weights.flat().clone() for buffer in wanted}
    with torch.inference_mode(False), torch.no_grad():
        pager.release(unit)
        pager.expel(unit)
        for buffer in unit.buffers:
            buffer.unbind()
        for buffer, to in moves:
            _move_buffer(buffer, to, values.get(id(buffer)))
        for buffer in unit.buffers:
            if buffer.weights.slot is not None:
                settle(buffer)
        pager.admit(unit)


def _weights_move(buffer: FlatBuffer, to: Resident) -> bool:
    if buffer.params_tier != to.weights:
        return True
    # With a device apart, which copies there are depends on where updates run.
    return not buffer.context.aliased and buffer.on_device != (to.state == "device")


def _move_buffer(buffer: FlatBuffer, to: Resident, values: Tensor | None) -> None:
    state = buffer.state
    moved = None
    if state is not None and buffer.state_tier != to.state:
        moved = buffer.context.new_state(buffer.shard_numel, state.planes, to.state, buffer.name)
        for plane in state.planes:
            moved.write(plane, state.read(plane))
    buffer.params_tier, buffer.state_tier, buffer.state = to.weights, to.state, moved or state
    if values is not None:
        give_weights(buffer)
        buffer.weights.flat().copy_(values)
        buffer.weights.store()
