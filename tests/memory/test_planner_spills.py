"""Plans whose gradients rest on NVMe between backward and the update."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_zinf.memory.planner import (
    BufferSpec,
    Kept,
    Machine,
    ModelSpec,
    Plan,
    PlanOptions,
    Rates,
    UnitSpec,
    complete,
    make_plan,
)
from lightning_zinf.memory.planner import speeds as speeds_module
from lightning_zinf.memory.planner.plan import schedule_of, shortage
from lightning_zinf.memory.planner.speeds import Speeds, best_rings, with_speeds

NUMEL = 2**18
UNITS = 24


def plan(share: float, precision: str = "bf16-mixed", **options: Any) -> Plan:
    """Plan a model on a machine with so much memory, as a share of its gradients."""
    spec = tuple(UnitSpec(f"u{i}", (BufferSpec.of([NUMEL], precision),), block=True) for i in range(UNITS))
    free = int(share * UNITS * NUMEL * (4 if precision == "32-true" else 2))
    options = {"tile_numel": 2**14, **options}
    machine = Machine("m", 0, free, 2**40, Rates(), aliased=True)
    return make_plan(ModelSpec("test", spec), machine, PlanOptions(**options))


@settings(max_examples=20, deadline=None)
@given(
    share=st.floats(0.6, 2.0),
    precision=st.sampled_from(["32-true", "bf16-mixed", "16-mixed"]),
    kept=st.floats(0.0, 2.0),
    accumulate=st.integers(1, 3),
    clip=st.booleans(),
    back=st.sampled_from([0.0, 0.5, 4.0]),
    disk=st.floats(1e6, 1e9),
)
def test_no_later_plan_has_gradients_elsewhere(
    share: float, precision: str, kept: float, accumulate: int, clip: bool, back: float, disk: float
) -> None:
    """Whatever a run measures, and however much memory has become free since it began."""
    first = plan(share, precision, host_bytes=int(share * UNITS * NUMEL * 2))
    if first.problem is not None:
        return
    free = first.machine.host_bytes
    measured = Kept({"u0": int(kept * free)}, {}, 1)
    then = complete(first, measured, accumulate=accumulate, clip=clip, given_back=int(back * free))
    later = with_speeds(then, Speeds(0.1, 0.01, disk, disk, disk))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speeds_module, "WORTH", 1.0)
        last = best_rings(later)
    for found in (then, later, last):
        assert found.decision.spill == first.decision.spill
        assert found.decision.spilled == first.decision.spilled
    assert shortage(last) <= shortage(then)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_they_are_there_where_they_do_not_fit(precision: str) -> None:
    assert plan(1.1, precision).decision.spill
    assert not plan(2.4, precision).decision.spill
    assert not plan(1.1, precision, present=2**30).decision.spill
    assert not plan(1.1, precision, offload_params="none", offload_optimizer="cpu").decision.spill


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_memory_that_planes_leave_is_kept_to(accumulate: int, clip: bool) -> None:
    """Sums of several backwards take disk, not memory; those of one unit do while it is updated in backward."""
    first = plan(1.1)
    gap = first.tiers[0].available - first.tiers[0].needed
    then = complete(first, Kept({"u0": gap + 2 * NUMEL}, {}, 1), accumulate=accumulate, clip=clip)
    items = {(i.what, i.tier): i.nbytes for i in then.items}
    assert then.fits
    assert items["gradients", "nvme"] == UNITS * NUMEL * (2 if accumulate == 1 else 6)
    assert ("gradients", "host") not in items
    assert items["gradients of a unit", "host"] == NUMEL * (2 if clip or accumulate == 1 else 6)
    assert items["staging for gradients", "host"] == then.decision.spill == 6 * NUMEL


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_predicted_step_has_their_transfers(accumulate: int, clip: bool) -> None:
    """What the stages of a step are given is what the plan says that a step moves."""
    found = plan(1.1, accumulate=accumulate, clip=clip)
    assert found.decision.spill
    loads, _ = schedule_of(found)
    read = sum(u.update.nvme_read + u.gather.nvme_read * u.gathers * accumulate for u in loads)
    write = sum(u.update.nvme_write + u.gradient.nvme_write * accumulate for u in loads)
    assert read == found.traffic.nvme_read
    assert write == pytest.approx(found.traffic.nvme_write, rel=1e-12)
    now = with_speeds(found, Speeds(1e-3, 1e-4, 1e8, 1e8))
    assert now.prediction is not None
    assert now.prediction.seconds >= now.prediction.busy["nvme_write"] >= 0.99 * found.traffic.nvme_write / 1e8
