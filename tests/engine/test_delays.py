"""Delays in any stage never stop a run and never change a bit."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from delays import delayed
from driver import Session, Where, least_memory, session, train_paged
from models import ZOO
from oracle import Recipe, Result, assert_same

from lightning_zinf.config import IOConfig

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def recipe(where: Where) -> Recipe:
    """Return a recipe in which an update may be early, if it is to be."""
    return Recipe(steps=4, clip_norm=None) if where.early else Recipe(steps=3)


ALIASED = {"forward", "backward", "nvme_read", "nvme_write", "update"}
PLACES: dict[Where, set[str]] = {
    Where("nvme", "nvme"): ALIASED,
    Where("nvme", "nvme", tight=True): ALIASED,
    Where("nvme", "nvme", tight=True, prefetch=False): ALIASED,
    Where("nvme", "nvme", tight=True, early=True): ALIASED,
    Where("none", "nvme", early=True): ALIASED,
    Where("nvme", "nvme", aliased=False, tight=True, early=True): ALIASED | {"h2d", "d2h"},
    Where("none", "nvme"): ALIASED,
    Where("nvme", "nvme", aliased=False): ALIASED | {"h2d", "d2h"},
    Where("nvme", "nvme", aliased=False, tight=True): ALIASED | {"h2d", "d2h"},
    Where("nvme", "nvme", tight=True, recompute=True, activations="nvme", activation_bytes=5 * 8192): ALIASED,
    Where("none", "nvme", aliased=False, recompute=True, activations="nvme"): ALIASED | {"h2d", "d2h"},
    Where("none", "none", aliased=False, recompute=True, activations="cpu"): {"forward", "backward", "h2d", "d2h"},
    Where("cpu", "cpu", aliased=False, tight=True): {"forward", "backward", "update", "h2d", "d2h"},
}


def train_delayed(where: Where, precision: str, seed: int, folder: Path, name: str = "gpt") -> Result:
    """Train with as little memory as there may be, and with what users do in between."""
    memory = least_memory(ZOO[name], precision) if where.tight else None
    io = IOConfig(tile_numel=4096, threads=2, backend="threads")
    given = recipe(where)
    with session(ZOO[name], folder, where, precision, given, memory=memory, io=io) as running:
        with delayed(running.engine, seed) as delays:
            for step in range(given.steps):
                running.step()
                interrupt(running, random.Random(f"{seed} {step}"))
            result = running.result()
        assert set(delays.count) >= PLACES[where]
    return result


def interrupt(running: Session, noise: random.Random) -> None:
    """Do one of the things that come between steps, at random."""
    action = noise.randrange(4)
    if action == 1:
        running.engine.flush()
    elif action == 2:
        with torch.no_grad():
            running.forward(kind="validate")
    elif action == 3:
        assert noise.choice(list(running.model.parameters())).sum().isfinite()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("where", PLACES, ids=str)
def test_delays_change_nothing(where: Where, tmp_path: Path) -> None:
    expected = train_paged(
        ZOO["gpt"], tmp_path / "undisturbed", replace(where, early=False), "bf16-mixed", recipe(where)
    )
    assert_same(train_delayed(where, "bf16-mixed", 0, tmp_path), expected)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("where", PLACES, ids=str)
def test_delays_change_nothing_ever(where: Where, precision: str, seed: int, tmp_path: Path) -> None:
    expected = train_paged(ZOO["gpt"], tmp_path / "undisturbed", replace(where, early=False), precision, recipe(where))
    assert_same(train_delayed(where, precision, seed, tmp_path), expected)


def test_a_late_request_is_late(tmp_path: Path) -> None:
    """The delays do what they are for: the bytes come only after the delay, whatever the disk does."""
    with session(ZOO["mlp"], tmp_path, Where("nvme", "nvme"), "32-true") as running:
        store = running.engine.context.nvme
        extent = store.allocate(4096)
        late = []
        with delayed(running.engine, 0):
            for _ in range(40):
                memory = torch.full((4096,), 7, dtype=torch.uint8)
                ticket = store.read(extent, memory)
                late.append(bool(memory.eq(7).all()) and not ticket.done())
                assert ticket.wait() == 4096
                assert memory.eq(0).all()
        assert any(late)
        assert isinstance(store.read(extent, memory).wait(), int)


@pytest.mark.parametrize("where", [Where("nvme", "nvme"), Where("nvme", "nvme", aliased=False)], ids=str)
def test_delays_move_no_bytes(where: Where, tmp_path: Path) -> None:
    """What is fetched when depends on the disk; what is fetched does not."""
    moved = []
    for seed in (None, 0, 1):
        with session(ZOO["mlp"], tmp_path / str(seed), where, "bf16-mixed", Recipe()) as running:
            running.train(2)
            running.engine.flush()
            counters = running.engine.counters
            before = counters.snapshot()
            with nullcontext() if seed is None else delayed(running.engine, seed):
                running.train(4)
                running.engine.flush()
            moved.append({name: n for name, n in counters.since(before).items() if name.endswith("_bytes")})
    assert moved[0]["nvme_read_bytes"] > 0
    assert moved[0] == moved[1] == moved[2]
