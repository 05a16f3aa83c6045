"""What the planner says moves and lies where is what the engine's counters and rings say, to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from driver import TILE, Session, Where, part_of_memory, session, tight_memory
from models import ZOO
from oracle import Recipe

from lightning_zinf.config import MemoryConfig
from lightning_zinf.engine.drafts import describe_model, draft_buffers
from lightning_zinf.engine.units import find_units
from lightning_zinf.memory.planner import Machine, ModelSpec, Plan, PlanOptions, Rates, make_plan
from lightning_zinf.memory.state import plane_dtype

LOTS = 2**44
PLACES = [
    Where("auto", "auto", share=0.3),
    Where("auto", "auto", share=0.6, aliased=False),
    Where("none", "none"),
    Where("none", "nvme"),
    Where("nvme", "none"),
    Where("nvme", "nvme"),
    Where("nvme", "nvme", tight=True),
    Where("none", "cpu", aliased=False),
    Where("none", "nvme", aliased=False),
    Where("cpu", "cpu", aliased=False),
    Where("cpu", "nvme", aliased=False),
    Where("nvme", "nvme", aliased=False),
    Where("nvme", "cpu", aliased=False, tight=True),
]
CASES = {"mlp": {}, "gpt": {"embed": 3}, "lstm": {}, "frozen": {}}


def spec_of(name: str, precision: str) -> ModelSpec:
    case = ZOO[name]
    model = case.make()
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    plans = find_units(model, MemoryConfig().unit_bytes, case.units)
    spec = describe_model(draft_buffers(plans, precision, learning), name)  # type: ignore[arg-type]
    times = CASES[name]
    return replace(spec, units=tuple(replace(u, gathers=times.get(u.name, 2)) for u in spec.units))  # type: ignore[attr-defined]


def plan_of(name: str, where: Where, precision: str, accumulate: int) -> Plan:
    memory = tight_memory(ZOO[name].make(), precision, ZOO[name].units) if where.tight else MemoryConfig()
    if where.share is not None:
        memory = part_of_memory(ZOO[name].make(), precision, ZOO[name].units, where.share)
    machine = Machine("here", LOTS, LOTS, LOTS, Rates(), aliased=where.aliased is not False)
    options = PlanOptions(
        where.params,
        where.optimizer,
        accumulate=accumulate,
        tile_numel=TILE,
        host_bytes=memory.host_bytes,
        device_bytes=memory.device_bytes,
        update="deferred",
    )
    return make_plan(spec_of(name, precision), machine, options)


def seen_in_a_step(running: Session) -> dict[str, int]:
    running.train(2)
    before = running.engine.counters.snapshot()
    running.step()
    return {k: int(v) for k, v in running.engine.counters.since(before).items() if k.endswith("bytes")}


@pytest.mark.parametrize(
    ("name", "accumulate", "where"),
    [
        (name, accumulate, where)
        for name, accumulate in (("mlp", 3), ("gpt", 1))
        for where in PLACES
        # How often a tied weight is gathered in backward depends on what the slots hold.
        if name != "gpt" or where.share is None
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_bytes_of_a_step(name: str, precision: str, where: Where, accumulate: int, tmp_path: Path) -> None:
    planned = plan_of(name, where, precision, accumulate)
    on_demand = replace(where, prefetch=False)
    with session(ZOO[name], tmp_path, on_demand, precision, Recipe(accumulate=accumulate)) as running:
        seen = seen_in_a_step(running)
    told = planned.traffic
    assert told.nvme_write == seen["nvme_write_bytes"]
    assert told.device_to_host == seen["device_to_host_bytes"]
    if where.aliased is not False or planned.decision.where.params != "nvme":
        assert told.nvme_read + told.host_to_device == (
            seen["nvme_read_bytes"] + seen["host_to_device_bytes"] + seen["reused_bytes"]
        )
    else:  # a reuse saves a read, or a read and a copy
        fetched = told.nvme_read + told.host_to_device
        assert seen["nvme_read_bytes"] + seen["host_to_device_bytes"] <= fetched
        assert told.nvme_read <= seen["nvme_read_bytes"] + seen["reused_bytes"]


@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", ["lstm", "frozen"])
def test_planes_and_rings(name: str, precision: str, where: Where, tmp_path: Path) -> None:
    """Every plane and every ring has the size that was planned, on the tier that was planned."""
    planned = plan_of(name, where, precision, 1)
    with session(ZOO[name], tmp_path, where, precision) as running:
        engine = running.engine
        aliased = engine.context.aliased
        found: dict[tuple[str, bool], int] = {}
        buffers = [b for u in engine.units for b in u.buffers]
        for b in buffers:
            key = ("weights", b.params_tier == "nvme")
            found[key] = found.get(key, 0) + (b.weight_bytes if b.persistent else b.shard_bytes)
            for plane in b.state.planes if b.state else ():
                key = (plane, b.state.offloaded)  # type: ignore[union-attr]
                found[key] = found.get(key, 0) + b.shard_numel * plane_dtype(plane).itemsize
        found.update({(what, False): nbytes for what, _, nbytes in engine.context.pages()})
        assert engine.placement == planned.decision.where
    told: dict[tuple[str, bool], int] = {}
    for item in planned.items:
        assert not (aliased and item.tier == "device")
        if not item.what.startswith(("gradients", "copy")):
            key = (item.what, item.tier == "nvme")
            told[key] = told.get(key, 0) + item.nbytes
    assert told == found
