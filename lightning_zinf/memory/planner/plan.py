"""A plan: does a model fit a machine, where does everything live, what moves, and how long does a step take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_zinf.config import Tier
from lightning_zinf.memory.placement import ModelSize
from lightning_zinf.memory.planner.decide import RINGS, Decision, decide
from lightning_zinf.memory.planner.kept import Kept, leaving_bytes, with_kept
from lightning_zinf.memory.planner.machine import Machine, Rates
from lightning_zinf.memory.planner.model import ModelSpec, UnitSpec
from lightning_zinf.memory.planner.options import PlanOptions, When
from lightning_zinf.memory.planner.peaks import Item, items
from lightning_zinf.memory.planner.residency import Resident, Sizes, held_in_memory, least_moved
from lightning_zinf.memory.planner.schedule import Prediction, Setting, UnitLoad, predict
from lightning_zinf.memory.planner.traffic import (
    Traffic,
    activation_traffic,
    gather_traffic,
    gradient_traffic,
    spill_traffic,
    step_traffic,
    times,
    update_traffic,
)

LEFT_TO_FORWARD = 3
"""Where updates run in backward, of so many units one is updated in the next forward (``engine/early.py``)."""
_AMPLE = 2**62
TIERS: tuple[Tier, ...] = ("device", "host", "nvme")


@dataclass(frozen=True)
class TierUse:
    """Memory of one tier.

    Attributes:
        tier: Which.
        needed: Bytes at the worst moment: of one rank on the device, of one node elsewhere.
        available: Bytes that there are.
    """

    tier: Tier
    needed: int
    available: int

    @property
    def fits(self) -> bool:
        """Whether it is enough."""
        return self.needed <= self.available


@dataclass(frozen=True)
class Plan:
    """Where a model lives on a machine, and what its training step costs.

    Attributes:
        model: The model.
        machine: The machine.
        options: The options.
        size: Totals of one rank.
        decision: Where everything rests, and what pages pass through.
        items: What takes memory on one rank.
        traffic: Bytes that a step of one rank moves.
        prediction: How long a step takes; None if the machine's rates say nothing.
        problem: Why pages cannot have the memory that they need at once, or None.
    """

    model: ModelSpec
    machine: Machine
    options: PlanOptions
    size: ModelSize
    decision: Decision
    items: tuple[Item, ...]
    traffic: Traffic
    prediction: Prediction | None
    problem: str | None = None

    @property
    def world_size(self) -> int:
        """Ranks that share the model."""
        return self.machine.world_size

    @property
    def tiers(self) -> list[TierUse]:
        """What each tier that the machine has needs."""
        machine, needed = self.machine, dict.fromkeys(TIERS, 0)
        for item in self.items:
            needed[item.tier] += item.nbytes * (1 if item.tier == "device" else machine.ranks_per_node)
        have: dict[Tier, int] = {
            "device": machine.device_bytes,
            "host": machine.host_bytes,
            "nvme": machine.nvme_bytes,
        }
        return [TierUse(t, needed[t], have[t]) for t in TIERS if t != "device" or not machine.aliased]

    @property
    def fits(self) -> bool:
        """Whether every tier has the memory that it needs."""
        return self.problem is None and all(t.fits for t in self.tiers)

    @property
    def tokens(self) -> int:
        """Tokens of a step of all ranks."""
        return self.model.tokens * self.options.batch * self.options.accumulate * self.world_size

    @property
    def nvme_least(self) -> float:
        """Bytes over NVMe that a step cannot do without, if as many bytes of planes stay in memory as do."""
        buffers = self.decision.buffers
        return least_moved(buffers, held_in_memory(buffers), self.options.accumulate)

    def residency(self) -> list[tuple[str, str, Tier, int]]:
        """Return ``(unit, plane, tier, bytes of a rank)`` of every plane."""
        return [
            (self.model.units[b.unit].name or "<root>", plane, tier, nbytes)
            for b in self.decision.buffers
            for plane, tier, nbytes in b.planes()
        ]

    def measured(self) -> dict[str, Any] | None:
        """Return what a micro-batch was measured to keep for backward, as plain data; None if it was not."""
        if not self.model.profiled:
            return None
        batch = self.options.batch
        return {
            "samples": batch,
            "units": [
                {"unit": u.name, "saved": round(u.saved_bytes * batch), "staying": round(u.staying_bytes * batch)}
                for u in self.model.units
            ],
        }

    def told(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        rates = {k: v for k, v in asdict(self.machine.rates).items() if v is not None}
        return {
            "model": {"name": self.model.name, "parameters": self.model.numel, "units": len(self.model.units)},
            "machine": {**self.machine.told(), "rates": rates},
            "options": asdict(self.options),
            "world_size": self.world_size,
            "fits": self.fits,
            "problem": self.problem,
            "placement": asdict(self.decision.where),
            "rings": {
                "share": self.decision.rings,
                "slots": self.decision.slots,
                "staging": self.decision.staging,
                "tiles": self.decision.tiles.nbytes,
                "gradients": self.decision.spill,
            },
            "tiers": [{**asdict(t), "fits": t.fits} for t in self.tiers],
            "items": [asdict(i) for i in self.items],
            "residency": [
                {"unit": unit, "plane": plane, "tier": tier, "bytes": nbytes}
                for unit, plane, tier, nbytes in self.residency()
            ],
            "traffic": self.traffic.told(),
            "nvme_least_bytes": self.nvme_least,
            "activations_counted": self.model.measured,
            "activations_measured": self.measured(),
            "tokens": self.tokens,
            "step": None
            if self.prediction is None
            else {
                "seconds": self.prediction.seconds,
                "binding": self.prediction.binding,
                "bound_seconds": self.prediction.bound,
                "busy_seconds": self.prediction.busy,
            },
        }


def make_plan(
    model: ModelSpec,
    machine: Machine,
    options: PlanOptions | None = None,
    decision: Decision | None = None,
    rings: float = RINGS,
    spills: bool | None = None,
) -> Plan:
    """Plan the training of a model on a machine.

    Args:
        model: The model, in the precision that it is trained in.
        machine: The machine; all of its ranks share the model.
        options: The user's choices.
        decision: Where everything rests, if that has been decided.
        rings: Share of a budget that pages may pass through; see ``decide``.
        spills: Whether gradients rest on NVMe between backward and update, if that has been decided.
    """
    options = options or PlanOptions()
    world = machine.world_size
    sizes = Sizes.of(model, world, options.stage)
    host = machine.host_bytes // machine.ranks_per_node
    device = host if machine.aliased else machine.device_bytes
    problem = None
    try:
        if decision is None:
            decision = decide(
                model,
                sizes,
                options,
                free_host=host,
                free_device=device,
                aliased=machine.aliased,
                rings=rings,
                spills=spills,
            )
    except ValueError as error:  # shown in the plan, with what would take memory if there were enough
        problem = str(error)
        large = replace(options, host_bytes=None, device_bytes=None)
        large = replace(large, offload_optimizer="auto") if options.offload_optimizer == "none" else large
        decision = decide(model, sizes, large, free_host=_AMPLE, free_device=_AMPLE, aliased=machine.aliased)
    size = sizes.summary(model)
    listed = tuple(items(model, decision, size, machine, options))
    traffic = step_traffic(
        decision.buffers,
        aliased=machine.aliased,
        world_size=world,
        stage=options.stage,
        accumulate=options.accumulate,
    )
    for unit in model.units:
        traffic += times(_leaves(model, unit, machine, options), options.accumulate)
    for buffer in decision.buffers:
        traffic += _spilled(buffer, decision, options)
    plan = Plan(model, machine, options, size, decision, listed, traffic, None, problem)
    if machine.rates == Rates():
        return plan
    return replace(plan, prediction=predict(*schedule_of(plan)))


def complete(plan: Plan, kept: Kept, *, accumulate: int, clip: bool, given_back: int = 0) -> Plan:
    """Return a plan with the activations that its first training step was measured to keep.

    What rests where stays as it is, unless memory is short then and planes of which the user has not said where they
    are to be can make room; see Note [Measured activations]. Gradients rest where they do.

    Args:
        plan: The plan that the run was set up by.
        kept: What was measured.
        accumulate: Micro-batches of a step.
        clip: Whether gradients are clipped by their norm.
        given_back: Bytes of host memory of a rank that were taken when the plan was made, and are free since.
    """
    host = plan.machine.host_bytes + given_back * plan.machine.ranks_per_node
    machine = replace(plan.machine, host_bytes=host)
    model = with_kept(plan.model, kept)
    options = replace(plan.options, batch=max(1, kept.samples), accumulate=accumulate, clip=clip)
    options = replace(options, present=max(0, options.present - given_back))
    same = make_plan(model, machine, options, plan.decision)
    if not shortage(same):
        return same
    other = make_plan(model, machine, options, spills=plan.decision.spill > 0)
    return other if other.problem is None and shortage(other) < shortage(same) else same


def shortage(plan: Plan) -> int:
    """Return the bytes of memory that are missing. Free disk does not count: each rank sees another amount of it."""
    return sum(max(0, tier.needed - tier.available) for tier in plan.tiers if tier.tier != "nvme")


# ---------------------------------------------------------------------- time


def update_of(plan: Plan, unit: int) -> When:
    """Return when the updates of a unit run: as the engine does it, unless the options say otherwise."""
    options = plan.options
    sharded = plan.world_size > 1 and options.stage == 3
    if not sharded and not any(b.offloaded for b in plan.decision.buffers if b.unit == unit):
        return "after"
    if options.update is not None:
        return options.update
    early = (plan.world_size == 1 or options.stage > 1) and not options.clip and not _scaled(plan.decision)
    return "backward" if early and unit % LEFT_TO_FORWARD else "deferred"


def _scaled(decision: Decision) -> bool:
    """Whether the loss is scaled, as in 16-mixed."""
    return any(p == ("master", 4) for b in decision.buffers for p in b.spec.planes)


def schedule_of(plan: Plan) -> tuple[list[UnitLoad], Setting]:
    """Return what each unit puts on the stages of a step, and what they share."""
    machine, options, decision = plan.machine, plan.options, plan.decision
    by_unit: dict[int, list[Resident]] = {}
    for buffer in decision.buffers:
        by_unit.setdefault(buffer.unit, []).append(buffer)
    loads = [_load(plan, index, by_unit.get(index, [])) for index in range(len(plan.model.units))]
    servers, rates = _disk(machine.rates, plan.traffic)
    if machine.aliased:
        servers.update(compute="cpu", update="cpu")
    else:
        servers.update(compute="device", update="host")
    setting = Setting(
        rates,
        servers,
        slots=decision.slots,
        tiles=decision.tiles.nbytes,
        accumulate=options.accumulate,
        keeps=machine.aliased and plan.world_size == 1,
    )
    return loads, setting


def _spilled(buffer: Resident, decision: Decision, options: PlanOptions) -> Traffic:
    """Return what a buffer's gradients move in a step that rest on NVMe between backward and update."""
    if not decision.spill:
        return Traffic()
    scaled = _scaled(decision)
    early = not options.clip and not scaled and options.update is None and buffer.unit % LEFT_TO_FORWARD
    backwards = options.accumulate - bool(early and buffer.offloaded)
    return spill_traffic(buffer, backwards, norm=options.clip or scaled)


def _leaves(model: ModelSpec, unit: UnitSpec, machine: Machine, options: PlanOptions) -> Traffic:
    """Return what a unit's activations move between the forward and the backward of a micro-batch."""
    nbytes = leaving_bytes(model, unit, options)
    return activation_traffic(nbytes, options.offload_activations, aliased=machine.aliased)


def _load(plan: Plan, index: int, buffers: Sequence[Resident]) -> UnitLoad:
    machine, options, rates = plan.machine, plan.options, plan.machine.rates
    aliased, world, stage = machine.aliased, plan.world_size, options.stage
    unit, kernel = plan.model.units[index], 0.0
    gather, gradient, after = Traffic(), Traffic(), Traffic()
    paged = False
    for b in buffers:
        gather += gather_traffic(b, aliased=aliased, world_size=world, stage=stage)
        gradient += gradient_traffic(b, aliased=aliased, world_size=world)
        after += update_traffic(b, aliased=aliased, world_size=world, stage=stage)
        spilled = _spilled(b, plan.decision, options)  # all reads count with the update, which does most of them
        gradient += Traffic(nvme_write=spilled.nvme_write / options.accumulate)
        after += Traffic(nvme_read=spilled.nvme_read)
        paged = paged or b.weights != "device" or (world > 1 and stage == 3)
        if b.spec.learns:
            grad = 4 if world > 1 or options.accumulate > 1 else b.spec.weight_bytes
            kernel += b.shard * (2 * (b.spec.weight_bytes + b.spec.state_bytes) + grad)
    forward = unit.flops * options.batch / rates.flops if rates.flops else 0.0
    return UnitLoad(
        unit.name or "<root>",
        gather,
        gradient,
        after,
        leaves=_leaves(plan.model, unit, machine, options),
        forward_seconds=forward,
        backward_seconds=forward * (3 if options.recompute and unit.block else 2),
        update_seconds=kernel / rates.adam if rates.adam else 0.0,
        when=update_of(plan, index),
        slot_bytes=sum(b.whole_bytes for b in buffers) if paged else 0,
        tile_bytes=sum(b.state_bytes for b in buffers if b.state == "nvme" and b.spec.learns),
        gathers=unit.gathers,
        root=unit.name == "",
    )


def _disk(rates: Rates, traffic: Traffic) -> tuple[dict[str, str], Rates]:
    """Return how a disk serves reads and writes, and its rates then."""
    read, write, mixed = rates.nvme_read, rates.nvme_write, rates.nvme_mixed
    if not (read and write and mixed and traffic.nvme_read and traffic.nvme_write):
        return {}, rates
    # Taking turns, equal parts of both would move at the harmonic mean; what was measured says how much better it is.
    gain = mixed / (2 / (1 / read + 1 / write))
    shared = replace(rates, nvme_read=read * gain, nvme_write=write * gain)
    return {"nvme_read": "nvme", "nvme_write": "nvme"}, shared
