"""Gradients that do not fit into memory rest on NVMe between backward and the update, with the same bits."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from delays import delayed
from driver import Session, Where, session
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import ZOO
from oracle import Recipe, assert_same, train_plain
from test_moving import PLACES, planned
from test_norms import EDITS
from tiled_models import TILED

from lightning_zinf.engine.guard import KeptGradient
from lightning_zinf.engine.partition import residency
from lightning_zinf.engine.placing import move
from lightning_zinf.engine.spilled import SpilledGradients
from lightning_zinf.memory.planner.decide import _Decider
from lightning_zinf.memory.planner.residency import staging_of_gradients
from lightning_zinf.memory.planner.traffic import spill_traffic
from lightning_zinf.monitor.trace import Trace

partition_module = importlib.import_module("lightning_zinf.engine.partition")
NVME = Where("nvme", "nvme", tight=True)
RECIPES = {
    "clip": Recipe(steps=3, accumulate=1),
    "accumulate": Recipe(steps=3, accumulate=3),
    "plain": Recipe(steps=4, accumulate=1, clip_norm=None),
    "plain-accumulate": Recipe(steps=3, accumulate=2, clip_norm=None),
    "momentum": Recipe(steps=3, optimizer=torch.optim.SGD, options={"momentum": 0.9}),
}


@contextmanager
def spilling(*args: Any, **kwargs: Any) -> Iterator[Session]:
    """Open a session where the planner finds that gradients do not fit."""

    def too_few(self: Any, where: Any, rings: int) -> tuple[int, int]:
        return 0, staging_of_gradients(self.sizes.buffers)

    with mock.patch.object(_Decider, "_gradients", too_few), session(*args, **kwargs) as it:
        learning = [b for u in it.engine.units for b in u.buffers if any(p.requires_grad for p in b.params)]
        assert learning
        assert all(isinstance(b.gradients, SpilledGradients) for b in learning)
        yield it


def check(name: str, where: Where, precision: str, recipe: Recipe, folder: Path) -> None:
    case = {**ZOO, **TILED}[name]
    with spilling(case, folder, where, precision, recipe) as it:
        found = it.train().result()
        assert it.engine.context.spill._slots
    assert_same(found, train_plain(case, precision, recipe))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_same_bits(precision: str, recipe: str, tmp_path: Path) -> None:
    check("gpt", replace(NVME, ahead=True, early=True), precision, RECIPES[recipe], tmp_path)


@pytest.mark.parametrize(
    ("name", "precision"),
    [("late", "32-true"), ("late", "16-mixed"), ("gpt-recompute-reentrant", "bf16-mixed"), ("tiled-gpt", "bf16-mixed")],
)
def test_other_models(name: str, precision: str, tmp_path: Path) -> None:
    check(name, Where("none", "nvme"), precision, Recipe(steps=2), tmp_path)


@pytest.mark.parametrize(("first", "then"), [("some on nvme", "all on nvme"), ("all on nvme", "all in memory")])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("recipe", ["accumulate", "plain"])
def test_planes_move_and_gradients_stay(recipe: str, precision: str, first: str, then: str, tmp_path: Path) -> None:
    """They rest where they are while planes move there and back, sums of two backwards among them."""
    found = Recipe(steps=5, accumulate=RECIPES[recipe].accumulate, clip_norm=RECIPES[recipe].clip_norm)
    start, other = replace(PLACES[first], early=True, ahead=True), PLACES[then]
    with spilling(ZOO["gpt"], tmp_path, start, precision, found) as it:
        ring, decision = it.engine.context.spill, it.engine.plan.decision
        buffers = [b for u in it.engine.units for b in u.buffers if isinstance(b.gradients, SpilledGradients)]
        gradients = [b.gradients for b in buffers]
        it.train(2)
        rest = [g.nbytes for g in gradients]  # type: ignore[attr-defined]
        for where in (other, start, other):
            plan = planned(it.engine, it.case, where, precision)
            assert plan.decision.buffers != it.engine.plan.decision.buffers
            assert move(it.engine, plan)
            assert it.engine.plan.decision.spill == ring.budget == decision.spill
            assert it.engine.context.spill is ring
            assert [b.gradients for b in buffers] == gradients
            assert [g.nbytes for g in gradients] == rest  # type: ignore[attr-defined]
            it.train(1)
        assert ring.peak <= ring.budget
        assert_same(it.result(), train_plain(ZOO["gpt"], precision, found))


def test_gradients_of_half_a_step_outlive_a_move(tmp_path: Path) -> None:
    """A plan changes between steps, but who steps by hand may have left gradients there then."""
    found = []
    for moves in (False, True):
        with spilling(ZOO["gpt"], tmp_path / str(moves), PLACES["some on nvme"], "bf16-mixed", Recipe()) as it:
            it.train(1)
            it.optimizer.zero_grad()
            for _ in range(2):
                it.micro_step()
            if moves:
                assert move(it.engine, planned(it.engine, it.case, PLACES["all on nvme"], "bf16-mixed"))
            it.micro_step()
            it.update()
            found.append(it.result())
    assert_same(found[1], found[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "where", "precision", "recipe"),
    [
        (name, where, precision, list(RECIPES)[(row + column) % 4])
        for row, name in enumerate([*ZOO, *TILED])
        for column, where in enumerate([NVME, Where("none", "nvme"), replace(NVME, ahead=True, early=True)])
        for precision in [("32-true", "bf16-mixed", "16-mixed")[(row + column) % 3]]
        if (name, precision) != ("bfloat16-born", "16-mixed")  # torch has no such LayerNorm
    ],
    ids=str,
)
def test_every_model(name: str, where: Where, precision: str, recipe: str, tmp_path: Path) -> None:
    check(name, where, precision, RECIPES[recipe], tmp_path)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_bytes_are_the_formula(precision: str, clip: float | None, accumulate: int, tmp_path: Path) -> None:
    recipe = Recipe(accumulate=accumulate, clip_norm=clip)
    where = Where("nvme", "nvme", ahead=True, prefetch=False)
    with spilling(ZOO["gpt"], tmp_path, where, precision, recipe) as it:
        buffers = [b for u in it.engine.units for b in u.buffers if isinstance(b.gradients, SpilledGradients)]
        once = sum(b.weight_bytes for b in buffers)
        sums = sum(4 * b.layout.padded_numel for b in buffers)
        assert it.engine.plan.decision.spilled == once
        assert ("staging for gradients", "host", it.engine.plan.decision.spill) in residency(it.engine)
        it.train(2)
        it.engine.flush()
        assert sum(b.gradients.nbytes for b in buffers) == once + (sums if accumulate > 1 else 0)  # type: ignore[attr-defined]
        trace = it.engine.counters.trace = Trace(0)
        it.step()
        it.engine.flush()
        it.engine.counters.trace = None
    moved = {
        stage: sum(e.nbytes for e in trace.events() if e.stage == stage and "/gradient" in e.name)
        for stage in ("nvme_read", "nvme_write")
    }
    written = accumulate * once + (accumulate - 1) * sums
    again = once + sums if clip is not None and accumulate > 1 else 0
    assert moved == {"nvme_read": written + again, "nvme_write": written}
    planned = [
        spill_traffic(b, accumulate, norm=clip is not None) for b in it.engine.plan.decision.buffers if b.spec.learns
    ]
    assert moved == {n: sum(getattr(t, n) for t in planned) for n in ("nvme_read", "nvme_write")}


def test_memory_has_the_gradients_of_one_unit(tmp_path: Path) -> None:
    with spilling(ZOO["gpt"], tmp_path, NVME, "bf16-mixed", Recipe(accumulate=2)) as it:
        most = 0

        def count(*_: Any) -> None:
            nonlocal most
            present = {
                u.index
                for u in it.engine.units
                for b in u.buffers
                for p in b.params
                if p.grad is not None and not isinstance(p.grad, KeptGradient)
            }
            most = max(most, len(present))

        for unit in it.engine.units:
            for buffer in unit.buffers:
                for param in buffer.params:
                    if param.requires_grad:
                        param.register_post_accumulate_grad_hook(count)
        it.train(2)
        assert most <= 2  # one that is complete when autograd goes on, and the root's


_BACKWARD = st.tuples(st.sampled_from(["backward", "watched", "early"]), st.just(0))
_OPERATIONS = st.one_of(
    _BACKWARD,
    st.tuples(st.sampled_from(["replace", "drop", "norm", "clip", "step", "zero", "eval"]), st.integers(0, 99)),
)


def _do(it: Session, name: str, number: int) -> float | None:
    if name in ("backward", "watched"):
        it.binding.wants_norm = name == "watched"
        with it.binding.norm_ahead():
            return it.micro_step()
    if name == "early":
        it.binding.early = True
        it.optimizer.step(it.micro_step)
    elif name == "norm":
        return it.binding.grad_norm()
    elif name == "clip":
        return it.binding.clip_by_norm(0.5)
    elif name == "step":
        it.optimizer.step()
    elif name == "zero":
        it.optimizer.zero_grad()
    elif name == "eval":
        with torch.no_grad():
            return float(it.forward(kind="validate"))
    else:
        param = list(it.model.parameters())[number % len(list(it.model.parameters()))]
        if name == "drop":
            EDITS["drop"](param)
        else:
            param.grad = torch.full(param.shape, 0.25, dtype=it.engine.places_of(param)[0][1].compute_dtype)
    return None


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@given(st.lists(_OPERATIONS, min_size=3, max_size=12))
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_sequence_is_as_with_gradients_in_memory(precision: str, operations: list[tuple[str, int]]) -> None:
    found = []
    for opened in (spilling, session):
        with (
            tempfile.TemporaryDirectory() as folder,
            opened(ZOO["mlp"], Path(folder), replace(NVME, aliased=True), precision, Recipe(clip_norm=None)) as it,
        ):
            seen = [_do(it, name, number) for name, number in operations]
            found.append((seen, it.result()))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])


def test_delays_change_nothing(tmp_path: Path) -> None:
    recipe = Recipe(steps=3)
    with spilling(ZOO["gpt"], tmp_path, NVME, "bf16-mixed", recipe) as it, delayed(it.engine, 1):
        found = it.train().result()
    assert_same(found, train_plain(ZOO["gpt"], "bf16-mixed", recipe))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_model_whose_gradients_do_not_fit_trains(accumulate: int, tmp_path: Path) -> None:
    """24 layers of 257 KiB: gradients of 6 MiB, where a machine has 5.5 MiB free."""

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(24)))

    def train(free: int, present: int = 0) -> tuple[bool, Any]:
        x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
        with (
            mock.patch.object(partition_module, "free_host_bytes", return_value=free),
            mock.patch.object(partition_module, "free_device_bytes", return_value=free),
            mock.patch.object(partition_module, "_present_bytes", return_value=present),  # 0: built in pages
            session(ZOO["mlp"], tmp_path, Where("nvme", "nvme"), recipe=Recipe(accumulate=1), model=make()) as it,
        ):
            plan = it.engine.plan
            assert plan.fits or present
            for _ in range(2):
                it.optimizer.zero_grad()
                for _ in range(accumulate):
                    it.micro_step(lambda: it.model(x).square().sum())
                it.update()
            host = sum(n for _, tier, n in residency(it.engine) if tier == "host")
            items = {i.what: i.nbytes for i in plan.items if i.tier == "host"}
            assert host == sum(n for what, n in items.items() if not what.startswith("gradients"))
            if plan.decision.spill:
                largest = max(b.weight_bytes for u in it.engine.units for b in u.buffers)
                assert items["gradients of a unit"] == largest >= 4 * (256 * 256 + 256)
                assert host + items["gradients of a unit"] <= free
            return plan.decision.spill > 0, it.result()

    few, much = train(11 * 2**19), train(2**30)
    assert (few[0], much[0]) == (True, False)
    assert_same(few[1], much[1])
    assert not train(11 * 2**19, 2**23)[0]  # they have the room that the model had
    with (
        mock.patch.object(_Decider, "_gradients", lambda self, *_: (self.size.gradients, 0)),
        pytest.raises(
            ValueError, match=r"the model does not fit: a step needs .* of host memory, and 5.50 MiB are free"
        ),
    ):
        train(11 * 2**19)


def test_they_stay_where_they_fit(tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, NVME, "bf16-mixed") as it:
        assert not it.engine.context.spills
        assert it.engine.plan.decision.spilled == it.engine.plan.decision.spill == 0
