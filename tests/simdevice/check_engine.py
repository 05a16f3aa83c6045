"""The engine on the simulated device: the bits of plain PyTorch on a CPU, and no access that should have waited.

See ``stream.h`` and ``memory.h`` for what the device does. A run fails if an operator or a copy saw other bytes than
the order of the program promises, also where its result does not depend on them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from driver import Session, Where, session
from models import ZOO
from oracle import Recipe, Result, assert_same, train_plain
from torch.nn.attention import SDPBackend, sdpa_kernel

import lightning_zinf
import simdevice
from lightning_zinf.checkpoint.full import full_state_dict
from lightning_zinf.memory.slots import Slot
from simdevice import device as sim

DEVICE = simdevice.register()
ON_DEVICE = Where("none", "none")
PLACES = [
    ON_DEVICE,
    Where("none", "cpu"),
    Where("none", "nvme"),
    Where("cpu", "cpu"),
    Where("cpu", "nvme", tight=True),
    Where("nvme", "cpu"),
    Where("nvme", "nvme", tight=True),
    Where("nvme", "nvme", tight=True, prefetch=False),
    Where("auto", "auto", share=0.5),
]
MODELS = ["mlp", "gpt", "gpt-recompute", "cnn", "mixture", "frozen", "encoder-decoder", "unused", "late"]
DELAYS = [(1, 0, 3000), (2, 400, 0), (3, 300, 300)]
"""Seed, and most microseconds before an operator and before a copy: a slow link, slow compute, and both."""
RECIPE = Recipe(steps=3)
EARLY = Recipe(steps=6, accumulate=1, clip_norm=None)

_expected: dict[str, Result] = {}


@pytest.fixture(autouse=True)
def _attention() -> Iterator[None]:
    """Attention by plain operators, which is what a device without kernels of its own has."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def expected(name: str, precision: str, recipe: Recipe) -> Result:
    key = repr((name, precision, recipe))
    if key not in _expected:
        _expected[key] = train_plain(ZOO[name], precision, recipe)
    return _expected[key]


@contextmanager
def running(
    name: str,
    folder: Path,
    where: Where,
    precision: str = "bf16-mixed",
    recipe: Recipe = RECIPE,
    delays: tuple[int, int, int] = DELAYS[0],
    **options: Any,
) -> Iterator[Session]:
    """A session on the device that nothing may go wrong in."""
    before = sim.jobs()
    simdevice.start(*delays)
    with session(ZOO[name], folder, where, precision, recipe, device=DEVICE, **options) as found:
        yield found
    simdevice.finish()
    assert sim.jobs() - before > 100


def check(name: str, folder: Path, where: Where, precision: str, recipe: Recipe, delays: tuple[int, int, int]) -> None:
    with running(name, folder, where, precision, recipe, delays) as ours:
        assert_same(ours.train().result(), expected(name, precision, recipe))


# ---------------------------------------------------------------------- short ones


@pytest.mark.parametrize("delays", DELAYS[:2], ids=str)
@pytest.mark.parametrize("where", [PLACES[0], PLACES[3], PLACES[6]], ids=str)
def test_has_the_bits_of_plain_pytorch(where: Where, delays: tuple[int, int, int], tmp_path: Path) -> None:
    check("gpt", tmp_path, where, "bf16-mixed", RECIPE, delays)


@pytest.mark.parametrize("delays", DELAYS[:2], ids=str)
def test_sums_of_squares_ahead(delays: tuple[int, int, int], tmp_path: Path) -> None:
    check("gpt", tmp_path, Where("cpu", "nvme", tight=True, ahead=True), "bf16-mixed", RECIPE, delays)


@pytest.mark.parametrize("where", [PLACES[3], PLACES[6]], ids=str)
def test_updates_in_backward(where: Where, tmp_path: Path) -> None:
    check("gpt", tmp_path, replace(where, early=True), "32-true", EARLY, DELAYS[2])


@pytest.mark.parametrize("activations", ["cpu", "nvme"])
def test_activations_that_are_away(activations: Any, tmp_path: Path) -> None:
    where = Where("cpu", "cpu", activations=activations, activation_bytes=2**16, recompute=activations == "nvme")
    check("gpt", tmp_path, where, "bf16-mixed", RECIPE, DELAYS[0])


def test_moves_the_bytes_of_the_simulation_on_a_cpu(tmp_path: Path) -> None:
    """What a CPU that plays an accelerator counts (``aliased=False``) is what one moves."""
    where = Where("nvme", "nvme", tight=True, ahead=True)
    counted = []
    simdevice.start(*DELAYS[0])
    for device, aliased in ((DEVICE, None), (torch.device("cpu"), False)):
        case = ZOO["gpt"]
        with session(case, tmp_path, replace(where, aliased=aliased), "bf16-mixed", RECIPE, device=device) as ours:
            ours.train()
            ours.engine.flush()
            counters = {k: v for k, v in asdict(ours.engine.counters).items() if k.endswith("_bytes")}
            counters["norm_bytes"] += counters.pop("norm_ahead_bytes")  # what has arrived in time differs
            counted.append(counters)
    assert counted[0] == counted[1]
    assert counted[0]["host_to_device_bytes"] > 0
    simdevice.finish()


def test_gradients_leave_the_device_and_use_pinned_memory_again(tmp_path: Path) -> None:
    """The device has the gradients of a few layers at a time, and from the second step on nothing new is pinned."""
    layers, width = 24, 256
    case = replace(ZOO["mlp"], build=lambda: _layers(layers, width), batch=lambda seed: _batch(seed, width), loss=_loss)
    layer = 4 * width * (width + 1)
    gc.collect()
    before = sim.pinned_bytes()
    simdevice.start(1, 0, 300)
    with session(case, tmp_path, Where("cpu", "cpu", tight=True), "32-true", EARLY, device=DEVICE) as ours:
        ours.train(2)
        pinned, resting = sim.pinned_bytes(), sim.memory_allocated()
        sim.reset_peak_memory_stats()
        ours.train(4)
        assert sim.pinned_bytes() - pinned < layers * layer // 2  # a block that is still seen is not lent again
        assert sim.memory_allocated() - resting <= 2 * layer  # what was copied down last is let go at the next release
        # Slots have been allocated; what comes and goes are gradients of a few layers, and activations.
        assert sim.max_memory_allocated() - resting < 6 * layer + 2 * layers * 4 * 4 * width
        assert all(len(s.writes) <= 1 for s in ours.engine.context.ring._slots)
    del ours
    gc.collect()
    assert sim.pinned_bytes() == before
    simdevice.finish()


def _layers(count: int, width: int) -> torch.nn.Module:
    return torch.nn.Sequential(
        *[torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU()) for _ in range(count)]
    )


def _batch(seed: int, width: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(4, width, generator=torch.Generator().manual_seed(seed)),)


def _loss(model: torch.nn.Module, batch: Any, step: int) -> torch.Tensor:
    return (model(batch[0]) - batch[0]).pow(2).mean()


def test_weights_in_a_slot_that_still_had_them_are_updated_after_compute_has_read_them(tmp_path: Path) -> None:
    with running("gpt", tmp_path, PLACES[3]) as ours:
        ours.train(1)
        pager, unit = ours.engine.pager, next(u for u in ours.engine.units if u.moves)
        buffer = unit.buffers[0]
        ours.engine.flush()
        before = ours.engine.counters.reused_bytes
        pager.gather([unit])
        pager.release(unit)
        pager.gather([unit])
        assert ours.engine.counters.reused_bytes > before
        with torch.no_grad():
            simdevice.device.set_delays(1, 20000, 0)
            read = [buffer.weights.flat() + 0 for _ in range(8)]
            buffer.weights.host().add_(1)
            buffer.weights.publish(updated=True)
            simdevice.device.set_delays(0)
            assert all(torch.equal(r + 1, buffer.weights.flat()) for r in read)
        pager.release(unit)


def test_what_is_copied_up_is_updated_after_that(tmp_path: Path) -> None:
    update = SimpleNamespace(
        done=0, touches=None, apply=lambda weight, state: weight.add_(1), needs=lambda planes: False
    )
    with running("gpt", tmp_path, PLACES[3]) as ours:
        ours.train(1)
        ours.engine.flush()
        pager, unit = ours.engine.pager, next(u for u in ours.engine.units if u.moves)
        buffer = unit.buffers[0]
        ours.engine.context.ring.forget(ours.engine.context.ring.find(buffer) or Slot(torch.empty(1)))
        with torch.no_grad():
            simdevice.device.set_delays(1, 0, 50000)
            for _ in range(4):
                pager.gather([unit])  # the copy up has just begun
                read = buffer.weights.flat() + 0
                expected = buffer.weights.host().clone()
                buffer.defer(update)
                buffer.settle()
                assert torch.equal(read.cpu(), expected)
            simdevice.device.set_delays(0)
        pager.release(unit)


def test_what_is_copied_down_is_there_when_it_is_stored(tmp_path: Path) -> None:
    with running("gpt", tmp_path, PLACES[3]) as ours:
        ours.train(1)
        ours.engine.flush()
        pager, unit = ours.engine.pager, next(u for u in ours.engine.units if u.moves)
        buffer = unit.buffers[0]
        with torch.no_grad():
            pager.gather([unit])
            for _ in range(6):
                expected = buffer.weights.flat().neg_().cpu()
                simdevice.device.set_delays(1, 0, 20000)
                buffer.weights.store()
                simdevice.device.set_delays(0)
                assert torch.equal(buffer.weights.host(), expected)
            pager.release(unit)


def test_what_code_does_between_steps(tmp_path: Path) -> None:
    """Masters are read and changed between steps, and weights in place by two updates, as on a CPU."""

    def go(device: torch.device, where: Where) -> tuple[list[float], dict[str, torch.Tensor]]:
        with session(ZOO["gpt"], tmp_path, where, "bf16-mixed", RECIPE, device=device) as ours:
            for _ in range(3):
                ours.train(1)
                with torch.no_grad():
                    for param in ours.model.parameters():
                        param.clamp_(-0.1, 0.1)
                with lightning_zinf.gathered(ours.model.blocks[0].up, write=True), torch.no_grad():
                    ours.model.blocks[0].up.weight.mul_(0.5)
                ours.forward(kind="eval")
            return ours.losses, {k: v.cpu() for k, v in full_state_dict(ours.engine).items()}

    losses, state = go(torch.device("cpu"), Where("none", "none"))
    for where in (PLACES[0], PLACES[4], PLACES[6]):
        simdevice.start(4, 100, 500)
        found = go(DEVICE, where)
        simdevice.finish()
        assert found[0] == losses
        assert found[1].keys() == state.keys()
        assert all(torch.equal(found[1][name], state[name]) for name in state)


# ---------------------------------------------------------------------- long ones


@pytest.mark.slow
@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_in_every_place(name: str, where: Where, tmp_path: Path) -> None:
    turn = MODELS.index(name) + PLACES.index(where)
    check(name, tmp_path, where, ("32-true", "bf16-mixed")[turn % 2], Recipe(steps=4), DELAYS[turn % 3])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("where", PLACES, ids=str)
def test_updates_in_backward_of_every_place(where: Where, precision: str, tmp_path: Path) -> None:
    turn = PLACES.index(where) + (precision == "32-true")
    for number, name in enumerate(("gpt", "frozen")):
        check(name, tmp_path, replace(where, early=True), precision, EARLY, DELAYS[(turn + number) % 3])


@pytest.mark.slow
@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize("where", PLACES[1:7], ids=str)
def test_clipping_sums_ahead(where: Where, update: Any, tmp_path: Path) -> None:
    where = replace(where, ahead=True, update=update)
    recipes = (RECIPE, Recipe(steps=3, clip_norm=None, clip_value=1e-3), Recipe(steps=4, accumulate=3))
    for recipe, delays in zip(recipes, DELAYS, strict=True):
        check("gpt", tmp_path, where, "bf16-mixed", recipe, delays)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activations", ["none", "cpu", "nvme"])
@pytest.mark.parametrize("where", [PLACES[0], PLACES[3], PLACES[6]], ids=str)
def test_activations(where: Where, activations: Any, recompute: bool, tmp_path: Path) -> None:
    where = replace(where, activations=activations, recompute=recompute, activation_bytes=2**16)
    for delays in DELAYS:
        check("gpt", tmp_path, where, "bf16-mixed", RECIPE, delays)
