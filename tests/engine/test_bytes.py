"""Bytes over every link equal the formula, to the byte.

A step over NVMe reads the weights for forward and for backward and writes them once, and reads and writes the state
once: in mixed precision 2 + 2 + 2 and 10 + 10 bytes for each parameter, in 32-true 4 + 4 + 4 and 8 + 8, padding
included. Weights that were still in their slot are not read but counted as reused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from driver import Session, Where, session
from models import ZOO
from oracle import Recipe

from lightning_zinf.layout import FlatLayout

PRECISIONS = ["32-true", "bf16-mixed"]
WEIGHT = {"32-true": 4, "bf16-mixed": 2}
STATE = {"32-true": 8, "bf16-mixed": 10}
BYTES = ("nvme_read_bytes", "nvme_write_bytes", "reused_bytes", "host_to_device_bytes", "device_to_host_bytes")
ABNORMAL = ("faults", "refills", "orphaned_slots", "overcommits")
NVME = [
    Where("nvme", "nvme"),
    Where("nvme", "nvme", tight=True),
    Where("nvme", "nvme", aliased=False),
    Where("nvme", "nvme", aliased=False, tight=True),
]


def padded(module: torch.nn.Module, itemsize: int) -> int:
    """Elements of a unit with one buffer."""
    return FlatLayout.build([p.shape for p in module.parameters()], itemsize).padded_numel


def moved(running: Session, action: Callable[[], object]) -> dict[str, int]:
    """Return the bytes that ``action`` moves; nothing is abnormal about it."""
    before = running.engine.counters.snapshot()
    action()
    grown = running.engine.counters.since(before)
    assert {name: grown[name] for name in ABNORMAL} == dict.fromkeys(ABNORMAL, 0)
    return {name: int(grown[name]) for name in BYTES}


def on_demand(where: Where) -> Where:
    """Without reading ahead, what belongs to a step is moved in it."""
    return Where(where.params, where.optimizer, where.aliased, where.tight, prefetch=False)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("where", [on_demand(w) for w in NVME], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_step(precision: str, where: Where, accumulate: int, tmp_path: Path) -> None:
    weight, state = WEIGHT[precision], STATE[precision]
    with session(ZOO["mlp"], tmp_path, where, precision, Recipe(accumulate=accumulate)) as running:
        numel = sum(padded(layer, weight) for layer in running.model if isinstance(layer, torch.nn.Linear))
        running.train(2)
        steps = [moved(running, running.step) for _ in range(4)]
    for step in steps:
        assert step["nvme_write_bytes"] == (weight + state) * numel
        assert step["nvme_read_bytes"] + step["reused_bytes"] == (2 * accumulate * weight + state) * numel
        assert 0 < step["reused_bytes"] < 2 * accumulate * weight * numel
    assert all(step == steps[0] for step in steps)


@pytest.mark.parametrize("where", NVME, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_run_with_prefetch(precision: str, where: Where, tmp_path: Path) -> None:
    """Reading ahead moves bytes from one step to the one before, but no more of them; runs are alike."""
    weight, state, steps = WEIGHT[precision], STATE[precision], 5
    runs = []
    for number in range(2):
        with session(ZOO["mlp"], tmp_path / str(number), where, precision, Recipe()) as running:
            numel = sum(padded(layer, weight) for layer in running.model if isinstance(layer, torch.nn.Linear))
            running.train(2)
            running.engine.flush()

            def train(running: Session = running) -> None:
                running.train(steps)
                running.engine.flush()  # applies the last update, for which it gathers the weights once more

            runs.append(moved(running, train))
    assert runs[0]["nvme_write_bytes"] == steps * (weight + state) * numel
    read = runs[0]["nvme_read_bytes"] + runs[0]["reused_bytes"]
    assert read == steps * (4 * weight + state) * numel + weight * numel
    assert runs[0] == runs[1]


@pytest.mark.parametrize("where", [Where("nvme", "nvme"), Where("nvme", "nvme", aliased=False)], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tied_weights_come_for_each_use(precision: str, where: Where, tmp_path: Path) -> None:
    """The embedding is gathered for itself, for the head, and once in backward."""
    weight, state = WEIGHT[precision], STATE[precision]
    with session(ZOO["gpt"], tmp_path, on_demand(where), precision, Recipe(accumulate=1)) as running:
        model = running.model
        tied = padded(model.embed, weight)
        root = FlatLayout.build([model.position.shape, *(p.shape for p in model.norm.parameters())], weight)
        numel = tied + root.padded_numel + sum(padded(block, weight) for block in model.blocks)
        running.train(2)
        step = moved(running, running.step)
    assert step["nvme_write_bytes"] == (weight + state) * numel
    assert step["nvme_read_bytes"] + step["reused_bytes"] == (2 * weight + state) * numel + weight * tied


@pytest.mark.parametrize("aliased", [None, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_state_only(precision: str, aliased: bool | None, tmp_path: Path) -> None:
    where = Where("none", "nvme", aliased, prefetch=False)
    weight, state = WEIGHT[precision], STATE[precision]
    with session(ZOO["mlp"], tmp_path, where, precision) as running:
        numel = sum(padded(layer, weight) for layer in running.model if isinstance(layer, torch.nn.Linear))
        plain = sum(p.numel() for p in running.model.parameters())
        running.train(2)
        step = moved(running, running.step)
    assert step["nvme_read_bytes"] == step["nvme_write_bytes"] == state * numel
    assert step["reused_bytes"] == 0
    # Updated weights go up; the gradients of both micro-batches come down.
    assert step["host_to_device_bytes"] == (weight * numel if aliased is False else 0)
    assert step["device_to_host_bytes"] == (2 * weight * plain if aliased is False else 0)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_state_that_is_read_ahead_is_read_once(accumulate: int, early: bool, tmp_path: Path) -> None:
    """Also in the first of several backwards, which the optimizer step does not follow."""
    recipe = Recipe(accumulate=accumulate, clip_norm=None if early else 1.0)
    with session(ZOO["mlp"], tmp_path, Where("none", "nvme", early=early, tight=True), "bf16-mixed", recipe) as running:
        numel = sum(padded(layer, 2) for layer in running.model if isinstance(layer, torch.nn.Linear))
        running.train(4)
        running.engine.flush()
        grown = moved(running, lambda: (running.train(6), running.engine.flush()))
        assert (grown["nvme_read_bytes"], grown["nvme_write_bytes"]) == (6 * 10 * numel, 6 * 10 * numel)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_only(precision: str, tmp_path: Path) -> None:
    weight = WEIGHT[precision]
    with session(ZOO["mlp"], tmp_path, Where("nvme", "cpu", prefetch=False), precision) as running:
        numel = sum(padded(layer, weight) for layer in running.model if isinstance(layer, torch.nn.Linear))
        running.train(2)
        step = moved(running, running.step)
    assert step["nvme_write_bytes"] == weight * numel
    assert step["nvme_read_bytes"] + step["reused_bytes"] == 4 * weight * numel


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_in_host_memory(precision: str, tmp_path: Path) -> None:
    weight = WEIGHT[precision]
    where = Where("cpu", "cpu", aliased=False, tight=True, prefetch=False)
    with session(ZOO["mlp"], tmp_path, where, precision) as running:
        numel = sum(padded(layer, weight) for layer in running.model if isinstance(layer, torch.nn.Linear))
        plain = sum(p.numel() for p in running.model.parameters())
        running.train(2)
        step = moved(running, running.step)
    assert step["nvme_read_bytes"] == step["nvme_write_bytes"] == 0
    assert step["host_to_device_bytes"] + step["reused_bytes"] == 4 * weight * numel
    assert step["device_to_host_bytes"] == 2 * weight * plain


@pytest.mark.parametrize("where", NVME, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_validation_reads_weights_once_and_writes_nothing(precision: str, where: Where, tmp_path: Path) -> None:
    weight = WEIGHT[precision]
    with session(ZOO["mlp"], tmp_path, on_demand(where), precision) as running:
        numel = sum(padded(layer, weight) for layer in running.model if isinstance(layer, torch.nn.Linear))
        running.train(1)
        running.engine.flush()
        for _ in range(2):
            with torch.no_grad():
                step = moved(running, lambda: running.forward(kind="validate"))
            assert step["nvme_write_bytes"] == 0
            assert step["nvme_read_bytes"] + step["reused_bytes"] == weight * numel


@pytest.mark.parametrize("aliased", [None, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_frozen_weights_are_never_written(precision: str, aliased: bool | None, tmp_path: Path) -> None:
    """And a unit that nothing flows back through is not gathered for backward."""
    weight, state = WEIGHT[precision], STATE[precision]
    where = Where("nvme", "nvme", aliased, prefetch=False)
    with session(ZOO["frozen"], tmp_path, where, precision, Recipe(accumulate=1)) as running:
        model = running.model
        once = padded(model[0], weight) + padded(model[3], weight)
        bias = FlatLayout.build([model[6].bias.shape], weight).padded_numel
        trained = FlatLayout.build([model[6].weight.shape], weight).padded_numel
        trained += padded(model[9], weight) + padded(model[12], weight)
        running.train(2)
        step = moved(running, running.step)
    assert step["nvme_write_bytes"] == (weight + state) * trained
    assert step["nvme_read_bytes"] + step["reused_bytes"] == (
        weight * (once + 2 * bias + 2 * trained) + state * trained
    )


@pytest.mark.parametrize("aliased", [None, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_unused_units_do_not_move(precision: str, aliased: bool | None, tmp_path: Path) -> None:
    weight, state = WEIGHT[precision], STATE[precision]
    where = Where("nvme", "nvme", aliased, prefetch=False)
    with session(ZOO["unused"], tmp_path, where, precision, Recipe(accumulate=1)) as running:
        model = running.model
        shapes = [model.spare.shape, model.embed.weight.shape, *(p.shape for p in model.out.parameters())]
        numel = FlatLayout.build(shapes, weight).padded_numel + 2 * padded(model.blocks[0], weight)
        running.train(2)
        step = moved(running, running.step)
    assert step["nvme_write_bytes"] == (weight + state) * numel
    assert step["nvme_read_bytes"] + step["reused_bytes"] == (2 * weight + state) * numel


@pytest.mark.parametrize("where", [Where("none", "none"), Where("cpu", "cpu")], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_moves_where_nothing_needs_to(precision: str, where: Where, tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, where, precision) as running:
        running.train(1)
        assert moved(running, running.step) == dict.fromkeys(BYTES, 0)
