"""What the ranks of a test do: the engine without Lightning, as the strategy drives it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from delays import delayed
from driver import TILE, Session, Where, session
from models import ZOO
from oracle import Recipe, Result
from pool import PATIENCE
from tiled_models import TILED
from together import Setting

from lightning_zinf.comm.group import Ranks, ranks_of
from lightning_zinf.config import IOConfig
from lightning_zinf.monitor.trace import Trace

partition_module = importlib.import_module("lightning_zinf.engine.partition")


def ranks(setting: Setting, timeout: Any = PATIENCE) -> Ranks:
    return ranks_of(setting.shard, timeout, setting.world)


def train(
    rank: int,
    size: int,
    name: str,
    folder: Path,
    where: Where,
    precision: str,
    recipe: Recipe,
    setting: Setting,
    observe: Callable[..., Any] | None = None,
) -> tuple[Result, Any]:
    """Train a model of the zoo on this rank; return the result, and what ``observe`` says of the session."""
    case = {**ZOO, **TILED}[name]
    io = IOConfig(tile_numel=TILE // 2, threads=2, backend="threads")
    with session(
        case,
        folder,
        where,
        precision,
        recipe,
        io=io,
        model=case.make(seed=rank),  # rank 0's values have to win
        ranks=ranks(setting),
        stage=setting.stage,
        shard=setting.shard,
    ) as running:
        running.train()
        seen = None if observe is None else observe(running)
        return running.result(), seen


def delayed_recipe(where: Where) -> Recipe:
    """Return a recipe in which an update may be early, if it is to be."""
    return Recipe(steps=4, clip_norm=None) if where.early else Recipe(steps=3)


def train_delayed(rank: int, size: int, folder: Path, where: Where, setting: Setting, seed: int) -> tuple[Result, Any]:
    """Train with random delays in every stage, other ones on each rank; return the result and the bytes traced."""
    recipe = delayed_recipe(where)
    trace = Trace(rank)
    options = {"ranks": ranks(setting), "stage": setting.stage, "shard": setting.shard}
    with session(ZOO["gpt"], folder / str(rank), where, "bf16-mixed", recipe, **options) as running:
        counters = running.engine.counters
        before = counters.snapshot()
        counters.trace = trace
        with delayed(running.engine, 1000 * seed + rank) as delays:
            running.train()
            result = running.result()
        counters.trace = None
        grown = counters.since(before)
    events = trace.events()
    assert all(e.end is not None for e in events)
    for stage, counter in (("all_gather", "all_gather_bytes"), ("reduce_scatter", "reduce_scatter_bytes")):
        assert sum(e.nbytes for e in events if e.stage == stage) == grown[counter] > 0, stage
    assert {"all_gather", "reduce_scatter", "reduce_wait"} <= set(delays.count)
    return result, grown


def norms(running: Session) -> tuple[int, int, int]:
    """Return bytes of gradients that were summed as they came, those summed for a norm, and those of the shard."""
    shard = 0
    for unit in running.engine.units:
        for buffer in unit.buffers:
            pieces = buffer.layout.overlaps(*buffer.shard_range)
            shard += sum(4 * numel for index, _, _, numel in pieces if buffer.params[index].requires_grad)
    return running.engine.counters.norm_ahead_bytes, running.engine.counters.norm_bytes, shard


def traffic(running: Session) -> dict[str, int]:
    """Return the bytes that went between ranks, what this rank keeps, and what was planned of both."""
    buffers = [b for unit in running.engine.units for b in unit.buffers]
    counters, plan = running.engine.counters, running.engine.plan
    return {
        "planned_gather_bytes": int(plan.traffic.all_gather),
        "planned_reduce_bytes": int(plan.traffic.reduce_scatter),
        "planned_state": sum(n for _, plane, _, n in plan.residency() if plane != "weight"),
        "all_gather_bytes": counters.all_gather_bytes,
        "reduce_scatter_bytes": counters.reduce_scatter_bytes,
        "reused_bytes": counters.reused_bytes,
        "elements": sum(b.layout.padded_numel for b in buffers),
        "weights": sum(b.weight_bytes for b in buffers),
        "resident": sum(b.weights.host_bytes for b in buffers),
        "state": sum(b.state.nbytes for b in buffers if b.state is not None),
    }


def set_up_in_little_memory(rank: int, size: int, folder: Path, setting: Setting, free: int) -> str:
    """Set 24 layers of 257 KiB up where so many bytes are free for each rank; return why that is refused."""
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(24)))
    options = {"ranks": ranks(setting), "stage": setting.stage, "shard": setting.shard, "model": model}
    with ExitStack() as stack:
        for name, nbytes in (("free_host_bytes", size * free), ("free_device_bytes", size * free)):
            stack.enter_context(mock.patch.object(partition_module, name, return_value=nbytes))
        stack.enter_context(mock.patch.object(partition_module, "_present_bytes", return_value=0))
        try:
            running = stack.enter_context(session(ZOO["mlp"], folder, Where("nvme", "nvme"), **options))
        except ValueError as error:
            return str(error)
        assert not running.engine.context.spills
        return ""


def touch_gradients(rank: int, size: int, folder: Path, precision: str, setting: Setting) -> tuple[list[str], Result]:
    """Train while user code tries to clip and to read gradients between backward and step."""
    said: list[str] = []
    case, recipe = ZOO["gpt"], Recipe(steps=3)
    with session(
        case, folder, Where(), precision, recipe, ranks=ranks(setting), stage=setting.stage, shard=setting.shard
    ) as running:
        params = list(running.model.parameters())
        for _ in range(recipe.steps):
            running.optimizer.zero_grad()
            for _ in range(recipe.accumulate):
                running.micro_step()
                for attempt in (
                    lambda: torch.nn.utils.clip_grad_norm_(params, 1e-3),
                    lambda: torch.nn.utils.clip_grad_value_(params, 1e-3),
                    lambda: params[0].grad.norm(),
                    lambda: params[0].grad.data.mul_(2),
                ):
                    try:
                        attempt()
                        said.append("nothing raised")
                    except RuntimeError as error:
                        said.append(str(error))
                assert params[0].grad is not None
                assert params[0].grad.shape == params[0].shape
            running.update()
        return said, running.result()
