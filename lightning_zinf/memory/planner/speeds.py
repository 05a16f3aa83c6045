"""What speeds decide: how much of a budget goes to rings, and how much to planes that stay.

Note [What speeds decide]
~~~~~~~~~~~~~~~~~~~~~~~~~
Which planes should stay in memory does not depend on speeds: a byte of a weight saves more transfers than a byte of
state whatever a transfer takes (see ``residency.py``). Nor does it matter much when updates run: for one of three units
left to the next forward, the predicted step is within 5 % of the best share over a wide range of speeds. But a budget
is for two things, planes that stay and the rings that all others pass through. Where the disk is what a step waits for,
each byte in a ring would be better used by a plane; where disk and compute take about the same time, small rings have
them wait for each other; where compute takes longest, neither matters. Nothing is known of compute before a run, so it
begins with half and half, and once speeds have been measured the step is simulated with other shares.

The best is taken if it saves enough to be more than the error of a prediction. Planes move once for that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_zinf.memory.planner.machine import Rates
from lightning_zinf.memory.planner.model import ModelSpec
from lightning_zinf.memory.planner.plan import Plan, make_plan, shortage

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Shares of a budget for rings that are tried."""
WORTH = 0.9
"""A step that is predicted to take this part of the present one's time is worth a move."""


@dataclass(frozen=True)
class Speeds:
    """What was measured of a run.

    Attributes:
        compute_seconds: Of an optimizer step, forward and backward.
        update_seconds: Of its updates, without waiting.
        nvme_read: Bytes a second that were read while anything was being read.
        nvme_write: The same of writes.
        nvme_mixed: Bytes a second of both while anything was under way.
    """

    compute_seconds: float
    update_seconds: float
    nvme_read: float | None = None
    nvme_write: float | None = None
    nvme_mixed: float | None = None


def with_speeds(plan: Plan, speeds: Speeds) -> Plan:
    """Return the same plan on a machine that is as fast as was measured, with its step predicted."""
    model = _with_operations(plan.model)
    options = plan.options
    operations = model.operations(recompute=options.recompute) * options.batch * options.accumulate
    kernel = 0.0
    for b in plan.decision.buffers:
        if b.spec.learns:
            grad = 4 if plan.world_size > 1 or options.accumulate > 1 else b.spec.weight_bytes
            kernel += b.shard * (2 * (b.spec.weight_bytes + b.spec.state_bytes) + grad)
    rates = replace(
        Rates(),
        flops=operations / speeds.compute_seconds if speeds.compute_seconds and operations else None,
        adam=kernel / speeds.update_seconds if speeds.update_seconds and kernel else None,
        nvme_read=speeds.nvme_read,
        nvme_write=speeds.nvme_write,
        nvme_mixed=speeds.nvme_mixed,
    )
    return make_plan(model, replace(plan.machine, rates=rates), options, plan.decision)


def may_choose(plan: Plan) -> bool:
    """Whether there is a budget that planes and rings share, and planes that are ours to place."""
    options = plan.options
    ours = "auto" in (options.offload_optimizer, options.offload_params if options.stage == 3 else "none")
    return plan.decision.moves and options.host_bytes is not None and ours


def best_rings(plan: Plan) -> Plan:
    """Return a plan with the share of the budget for rings that is predicted to be best, or itself if none is better.

    Args:
        plan: A plan on a machine whose rates are known.
    """
    if plan.prediction is None or not may_choose(plan):
        return plan
    best, least = plan, WORTH * plan.prediction.seconds
    for share in SHARES:
        spills = plan.decision.spill > 0
        found = make_plan(plan.model, plan.machine, plan.options, rings=share, spills=spills)
        worse = found.problem is not None or shortage(found) > shortage(plan)
        if not worse and found.prediction is not None and found.prediction.seconds < least:
            best, least = found, found.prediction.seconds
    return best


def _with_operations(model: ModelSpec) -> ModelSpec:
    """Spread operations over units by their parameters where they are not known: two for each, a sample."""
    if model.flops:
        return model
    return replace(model, units=tuple(replace(u, flops=2.0 * u.numel) for u in model.units))
