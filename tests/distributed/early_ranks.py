"""What the ranks do in the tests of updates in backward."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from driver import TILE, Session, Where, session
from models import ZOO
from oracle import Recipe, Result
from ranks import ranks
from test_early import Late
from tiled_models import TILED
from together import Setting

from lightning_zinf.comm.rounds import Want
from lightning_zinf.config import IOConfig
from lightning_zinf.engine import reduction
from lightning_zinf.engine.early import LEFT_TO_FORWARD


def _open(name: str, folder: Path, where: Where, precision: str, recipe: Recipe, setting: Setting) -> Any:
    case = {**ZOO, **TILED}[name]
    io = IOConfig(tile_numel=TILE // 2, threads=2, backend="threads")
    options = {"ranks": ranks(setting), "stage": setting.stage, "shard": setting.shard, "io": io}
    return session(case, folder, where, precision, recipe, **options)


def _patient(running: Session, stack: ExitStack) -> None:
    """Have a backward wait for each reduction, as one does that has no room for more."""
    assert running.engine.reducer is not None
    stack.enter_context(mock.patch.object(reduction, "PATIENCE_SECONDS", 20.0))
    running.engine.reducer._budget = 0


def train(
    rank: int,
    size: int,
    name: str,
    folder: Path,
    where: Where,
    precision: str,
    recipe: Recipe,
    setting: Setting,
    wait: bool,
) -> tuple[Result, list[set[int]], set[int]]:
    """Return the result, what was updated in each step's backward, and what all ranks agree may be."""
    updated = []
    with ExitStack() as stack:
        running = stack.enter_context(_open(name, folder, where, precision, recipe, setting))
        if wait:
            _patient(running, stack)
        early = running.engine.early
        for _ in range(recipe.steps):
            running.step()
            updated.append(set(early.updated))
        may = {
            u.index
            for u in running.engine.units
            if u.index in early._clean_everywhere and u.index % LEFT_TO_FORWARD and any(b.deferred for b in u.buffers)
        }
        return running.result(), updated, may


def mix(rank: int, size: int, folder: Path, where: Where, recipe: Recipe, setting: Setting) -> Result:
    """Update in backward on rank 0 only, and have everything gathered between backward and the optimizer step."""
    with ExitStack() as stack:
        running = stack.enter_context(_open("gpt", folder, where, "bf16-mixed", recipe, setting))
        _patient(running, stack)
        engine = running.engine
        if rank:
            stack.enter_context(mock.patch.object(engine.reducer, "poll", return_value=None))

        def closure() -> None:
            running.micro_step()
            engine.pager.collect([Want(unit.index) for unit in engine.units])

        for step in range(recipe.steps):
            running.optimizer.zero_grad()
            running.binding.early = True
            running.optimizer.step(closure)
            running.schedule.step()
            assert bool(engine.early.updated) == (step > 0 and rank == 0)
        return running.result()


def traffic(rank: int, size: int, folder: Path, where: Where, recipe: Recipe, setting: Setting) -> dict[str, float]:
    """Return the bytes between ranks, and the rounds."""
    with ExitStack() as stack:
        running = stack.enter_context(_open("gpt", folder, where, "bf16-mixed", recipe, setting))
        _patient(running, stack)
        running.train()
        running.engine.flush()
        assert bool(running.engine.early.updated) == where.early
        assert running.engine.rounds is not None
        grown = running.engine.counters.snapshot()
        found = {name: grown[name] for name in ("all_gather_bytes", "reduce_scatter_bytes", "updates")}
        return {**found, "rounds": running.engine.rounds.count}


def late(rank: int, size: int, folder: Path, where: Where, setting: Setting, lates: list[bool]) -> Any:
    """Train a model that on rank 1 uses a weight late where it says so; return what was updated, or the error."""
    updated, model = [], Late()
    with ExitStack() as stack:
        options = {"ranks": ranks(setting), "stage": setting.stage, "model": model}
        it = stack.enter_context(session(ZOO["mlp"], folder, where, "32-true", **options))
        _patient(it, stack)
        x = torch.nn.Parameter(torch.randn(4, 16))
        first = torch.nn.Linear(16, 16)

        def closure() -> None:
            it.backward(it.forward(lambda: model(first(x)).square().sum()))

        try:
            for step in lates:
                model.late = step and rank == 1
                it.binding.early = True
                it.optimizer.step(closure)
                updated.append(set(it.engine.early.updated))
        except RuntimeError as error:
            assert it.engine.rounds is not None
            it.engine.rounds.channel.abort(str(error))
            return str(error)
        return updated


def disagree(rank: int, size: int, folder: Path, setting: Setting) -> str:
    """Have rank 1 stop taking steps in backward."""
    with ExitStack() as stack:
        it = stack.enter_context(
            _open("mlp", folder, Where("nvme", "nvme", early=True), "32-true", Recipe(clip_norm=None), setting)
        )
        _patient(it, stack)
        it.train(3)
        assert it.engine.early.updated
        it.binding.early = rank == 0
        try:
            it.optimizer.step(it.micro_step)
        except ValueError as error:
            return str(error)
    return "nothing raised"
