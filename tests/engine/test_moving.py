"""Planes that move to other tiers between two steps: bits stay, and traffic is that of the new plan."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Session, Where, buffer_sizes, part_of_memory, session, tight_memory, train_paged
from models import ZOO
from oracle import Recipe, Result, assert_same
from tiled_models import TILED

from lightning_zinf.engine.engine import Engine
from lightning_zinf.engine.placing import move
from lightning_zinf.engine.snapshot import Snapshot
from lightning_zinf.memory.planner import Plan, make_plan
from lightning_zinf.memory.planner.decide import Tiles
from lightning_zinf.memory.state import NvmeState
from lightning_zinf.monitor.counters import Counters

RECIPE = Recipe(steps=5)
LARGEST = max(n for unit in buffer_sizes(ZOO["gpt"].make(), "bf16-mixed", ZOO["gpt"].units).values() for n, _ in unit)
"""Elements of the largest buffer of the model that most tests here train."""
PLACES: dict[str, Where] = {
    "all in memory": Where("none", "none"),
    "state on nvme": Where("none", "nvme"),
    "some on nvme": Where("auto", "auto", share=0.5),
    "all on nvme": Where("nvme", "nvme", tight=True),
}
ROUTES = [(a, b) for a in PLACES for b in PLACES if a != b]


def planned(engine: Engine, case: Any, where: Where, precision: str) -> Plan:
    """Plan a model that is training as if ``where`` had been asked for."""
    memory = engine.config.memory
    if where.share is not None:
        memory = part_of_memory(case.make(), precision, case.units, where.share)
    elif where.tight:
        memory = tight_memory(case.make(), precision, case.units)
    options = replace(
        engine.plan.options,
        offload_params=where.params,
        offload_optimizer=where.optimizer,
        host_bytes=memory.host_bytes,
        device_bytes=memory.device_bytes,
    )
    return make_plan(engine.plan.model, engine.plan.machine, options)


def tiers_of(engine: Engine) -> list[tuple[str, str]]:
    return [(b.params_tier, b.state_tier) for unit in engine.units for b in unit.buffers]


def moved(running: Session, where: Where) -> None:
    engine = running.engine
    plan = planned(engine, running.case, where, running.precision)
    assert move(engine, plan)
    by_name = {u.name: i for i, u in enumerate(engine.plan.model.units)}
    order = [(by_name[unit.name], b) for unit in engine.units for b in unit.buffers]
    expected = {
        i: [(r.weights, r.state) for r in plan.decision.buffers if r.unit == i] for i in sorted({i for i, _ in order})
    }
    found: dict[int, list[tuple[str, str]]] = {i: [] for i in expected}
    for i, buffer in order:
        found[i].append((buffer.params_tier, buffer.state_tier))
    assert found == expected


def train_and_move(
    name: str, folder: Path, first: Where, then: Where, precision: str, recipe: Recipe, early: bool = False
) -> Result:
    case = {**ZOO, **TILED}[name]
    with session(case, folder, replace(first, early=early), precision, recipe) as running:
        running.train(2)
        moved(running, then)
        running.train(1)
        moved(running, first)
        moved(running, then)
        return running.train(recipe.steps - 3).result()


@pytest.mark.parametrize("aliased", [None, False], ids=["cpu", "device"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("first", "then"), ROUTES)
def test_bits_stay(first: str, then: str, precision: str, aliased: bool | None, tmp_path: Path) -> None:
    """With two micro-batches a step and clipping by norm."""
    before, after = (replace(PLACES[p], aliased=aliased) for p in (first, then))
    if aliased is False and "none" in (before.params, after.params):
        before, after = (replace(w, optimizer="cpu") if w.params == "none" else w for w in (before, after))
    expected = train_paged(ZOO["gpt"], tmp_path / "there", before, precision, RECIPE)
    assert_same(train_and_move("gpt", tmp_path / "moved", before, after, precision, RECIPE), expected)


@pytest.mark.parametrize("name", [*ZOO, *TILED])
def test_every_model(name: str, tmp_path: Path) -> None:
    first, then = PLACES["all in memory"], PLACES["some on nvme"]
    recipe = Recipe(steps=4)
    expected = train_paged({**ZOO, **TILED}[name], tmp_path / "there", first, "bf16-mixed", recipe)
    assert_same(train_and_move(name, tmp_path / "moved", first, then, "bf16-mixed", recipe), expected)


@pytest.mark.parametrize(("first", "then"), [("all on nvme", "some on nvme"), ("all in memory", "all on nvme")])
def test_with_updates_in_backward(first: str, then: str, tmp_path: Path) -> None:
    recipe = Recipe(steps=6, clip_norm=None)
    expected = train_paged(ZOO["gpt"], tmp_path / "there", PLACES[first], "bf16-mixed", recipe)
    found = train_and_move("gpt", tmp_path / "moved", PLACES[first], PLACES[then], "bf16-mixed", recipe, early=True)
    assert_same(found, expected)


@pytest.mark.parametrize("precision", ["bf16-true", "16-mixed"])
def test_other_precisions(precision: str, tmp_path: Path) -> None:
    first, then = PLACES["all in memory"], PLACES["all on nvme"]
    expected = train_paged(ZOO["gpt"], tmp_path / "there", first, precision, RECIPE)
    assert_same(train_and_move("gpt", tmp_path / "moved", first, then, precision, RECIPE), expected)


@pytest.mark.parametrize("optimizer", [torch.optim.RMSprop, torch.optim.SGD, torch.optim.NAdam])
def test_other_optimizers(optimizer: type[torch.optim.Optimizer], tmp_path: Path) -> None:
    recipe = Recipe(steps=5, optimizer=optimizer, options={"momentum": 0.9} if optimizer is torch.optim.SGD else {})
    first, then = PLACES["some on nvme"], PLACES["all in memory"]
    expected = train_paged(ZOO["gpt"], tmp_path / "there", first, "bf16-mixed", recipe)
    assert_same(train_and_move("gpt", tmp_path / "moved", first, then, "bf16-mixed", recipe), expected)


def test_traffic_and_memory_are_those_of_the_plan(tmp_path: Path) -> None:
    """Before the move nothing goes to disk; after it steps move what they do where it was so from the beginning."""
    case, recipe = ZOO["gpt"], Recipe(steps=2, accumulate=1)
    with session(case, tmp_path, PLACES["all in memory"], "bf16-mixed", recipe) as running:
        engine, counters = running.engine, running.engine.counters
        running.train(2)
        assert counters.nvme_read_bytes == counters.nvme_write_bytes == 0
        moved(running, PLACES["all on nvme"])
        elements = sum(n for unit in buffer_sizes(case.make(), "bf16-mixed", case.units).values() for n, _ in unit)
        assert counters.nvme_write_bytes == 12 * elements  # each plane goes out once
        assert counters.nvme_read_bytes == 0
        grown = grown_in_two_steps(running)
        plan = engine.plan
        assert engine.context.ring.peak <= plan.decision.slots
        assert engine.context.tiles.nbytes == plan.decision.tiles.nbytes
        assert counters.overcommits == counters.orphaned_slots == 0
    with session(case, tmp_path, PLACES["all on nvme"], "bf16-mixed", recipe) as running:
        running.train(2)
        assert running.engine.plan.decision == plan.decision
        assert grown_in_two_steps(running) == grown
    assert grown["nvme_write_bytes"] == 2 * plan.traffic.nvme_write


def grown_in_two_steps(running: Session) -> dict[str, float]:
    """Return what two steps move, with the orders recorded and the slots full."""
    running.train(3)
    before = running.engine.counters.snapshot()
    running.train(2)
    grown = running.engine.counters.since(before)
    return {k: v for k, v in grown.items() if k.endswith("bytes") or k in ("gathers", "updates", "faults", "refills")}


@pytest.mark.parametrize("aliased", [None, False], ids=["cpu", "device"])
@pytest.mark.parametrize("recipe", [RECIPE, Recipe(steps=6, clip_norm=None)], ids=["clipped", "early"])
def test_rings_take_another_share_of_a_budget(recipe: Recipe, aliased: bool | None, tmp_path: Path) -> None:
    """Rings shrink and grow, while planes move or stay; state on disk is cut into other tiles, and every bit stays."""
    where = replace(PLACES["some on nvme"], share=0.2, aliased=aliased, early=recipe.clip_norm is None)
    expected = train_paged(ZOO["gpt"], tmp_path / "there", where, "bf16-mixed", recipe)
    with session(ZOO["gpt"], tmp_path / "moved", where, "bf16-mixed", recipe) as running:
        engine = running.engine
        running.train(2)
        for share, tiles, more in ((0.75, Tiles(4, 8192, 10), 4096), (0.5, Tiles(2, 4096, 10), 0), (0.9, None, 0)):
            plan = make_plan(engine.plan.model, engine.plan.machine, engine.plan.options, rings=share)
            decision = replace(plan.decision, slots=plan.decision.slots + more, tiles=tiles or plan.decision.tiles)
            assert decision != engine.plan.decision
            assert move(engine, replace(plan, decision=decision))
            assert engine.plan.decision == decision
            assert engine.context.ring.budget == decision.slots
            assert engine.context.ring.total <= decision.slots
            assert engine.context.tiles.nbytes == decision.tiles.nbytes
            cut = {b.state.num_tiles for u in engine.units for b in u.buffers if isinstance(b.state, NvmeState)}
            assert max(cut) == -(-LARGEST // decision.tiles.numel)
            running.train(1)
        found = running.train(recipe.steps - 5).result()
    assert_same(found, expected)


def test_a_disk_without_room_leaves_all_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = PLACES["all in memory"]
    with session(ZOO["gpt"], tmp_path, first, "bf16-mixed", RECIPE) as running:
        running.train(2)
        plan, before = planned(running.engine, running.case, PLACES["all on nvme"], "bf16-mixed"), running.engine.plan

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("lightning_zinf.memory.nvme.NvmeStore.reserve", full)
        places = tiers_of(running.engine)
        with pytest.warns(UserWarning, match=r"planes stay where they are.*No space left"):
            assert not move(running.engine, plan)
        assert tiers_of(running.engine) == places
        assert running.engine.plan is before
        found = running.train(RECIPE.steps - 2).result()
    assert_same(found, train_paged(ZOO["gpt"], tmp_path / "there", first, "bf16-mixed", RECIPE))


def test_room_of_planes_is_given_back_only_when_a_checkpoint_has_read_them(tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, Where("none", "nvme"), "bf16-mixed") as running:
        running.train(1).engine.flush()
        store = running.engine.context.nvme
        buffer = max((b for u in running.engine.units for b in u.buffers), key=lambda b: b.shard_bytes)
        state = buffer.state
        assert isinstance(state, NvmeState)
        expected = {plane: state.read(plane) for plane in state.planes}
        found = {plane: torch.zeros_like(values) for plane, values in expected.items()}
        snapshot, old = Snapshot([(buffer, dict.fromkeys(expected, 0))], 0, in_order=False), state._extent

        def read() -> None:
            while (work := snapshot.take()) is not None:
                time.sleep(0.01)
                piece = work.piece
                assert piece.extent is not None
                into = found[piece.plane][piece.start : piece.start + piece.numel]
                store.read(piece.extent, into, piece.offset, Counters()).wait()
                snapshot.done_with_source(work)

        reader = threading.Thread(target=read)
        reader.start()
        snapshot.begin()
        buffer.need_planes(("average",))
        room = store.allocate(old.nbytes, again=True)
        assert (room.volume, room.offset) == (old.volume, old.offset)
        store.write(room, torch.full((room.nbytes,), 0xA5, dtype=torch.uint8)).wait()
        reader.join()
        for plane, values in expected.items():
            assert torch.equal(found[plane], values), plane
            assert torch.equal(state.read(plane), values), plane
