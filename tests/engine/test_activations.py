"""Activation checkpointing and offloading of what autograd saves: the bits of training without, and the bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from activation_cases import (
    ONCE,
    RECIPE,
    Storages,
    everywhere,
    nothing_left,
    store_of,
    treated,
    ways,
    what_plain_autograd_saves,
)
from driver import Session, Where, session
from models import WIDTH, ZOO, Block
from oracle import Result, assert_same
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

FAST = ["gpt"]


@functools.cache
def untreated(name: str, precision: str, folder: Path) -> tuple[Result, list[Tensor]]:
    return trained(name, precision, Where(), folder)


def trained(name: str, precision: str, where: Where, folder: Path) -> tuple[Result, list[Tensor]]:
    with session(ZOO[name], folder, where, precision, RECIPE) as running:
        running.train()
        assert nothing_left(running)
        return running.result(), [b.clone() for b in running.model.buffers()]


def check_bits(name: str, precision: str, where: Where, folder: Path) -> None:
    found, buffers = trained(name, precision, where, folder)
    expected, expected_buffers = untreated(name, precision, folder.parent)
    assert_same(found, expected)
    for ours, theirs in zip(buffers, expected_buffers, strict=True):  # of BatchNorm: changed once
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("name", "where"), [(n, w) for n in FAST for w in ways(n)], ids=str)
def test_the_bits_of_training_without(name: str, where: Where, tmp_path: Path) -> None:
    check_bits(name, "bf16-mixed", where, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "where"),
    [
        (name, precision, where)
        for row, name in enumerate(ZOO)
        for column, where in enumerate(ways(name))
        for precision in (("32-true", "bf16-mixed", "16-mixed")[(row + column) % 3],)  # each with each other
        if (name, precision) != ("bfloat16-born", "16-mixed")  # torch has no such LayerNorm
    ],
    ids=str,
)
def test_the_bits_of_training_without_on_every_model(name: str, precision: str, where: Where, tmp_path: Path) -> None:
    check_bits(name, precision, where, tmp_path)


# ---------------------------------------------------------------------- bytes


def is_block(module: nn.Module) -> bool:
    return isinstance(module, Block)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("slots", [2, 3, 5, 100])
def test_every_input_of_a_block_goes_and_comes_once(slots: int, precision: str, tmp_path: Path) -> None:
    """One micro-step writes the inputs of the blocks, and reads what staging has not kept."""
    plain, _ = what_plain_autograd_saves(ZOO["gpt"], precision, is_block)
    one = 4 * 8 * WIDTH * 4
    assert plain.inputs.padded == 3 * one
    where = Where(recompute=True, activations="nvme", activation_bytes=slots * one)
    with session(ZOO["gpt"], tmp_path, where, precision, ONCE) as running:
        for _ in range(3):
            before = running.engine.counters.snapshot()
            running.step()
            moved = running.engine.counters.since(before)
            assert moved["activation_write_bytes"] == moved["nvme_write_bytes"] == 3 * one
            assert moved["activation_reused_bytes"] == min(slots, 3) * one
            assert moved["activation_read_bytes"] == moved["nvme_read_bytes"] == max(0, 3 - slots) * one
            assert moved["overcommits"] == moved["orphaned_slots"] == 0
        assert store_of(running).staging.peak <= slots * one  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "precision"),
    [("mlp", "32-true"), ("gpt", "32-true"), ("lstm", "32-true"), ("cnn", "32-true"), ("gpt", "bf16-mixed")],
)
def test_without_recomputation_every_storage_goes_once(name: str, precision: str, tmp_path: Path) -> None:
    plain, _ = what_plain_autograd_saves(ZOO[name], precision, lambda module: False)
    with session(ZOO[name], tmp_path, Where(activations="nvme"), precision, ONCE) as running:
        # Autocast casts the oracle's float32 weights, and autograd saves the copies; ours are bfloat16 already.
        expected = plain.beside.padded if precision == "32-true" else saved_by_the_engine(running)
        before = running.engine.counters.snapshot()
        running.step()
        moved = running.engine.counters.since(before)
        assert moved["activation_write_bytes"] == moved["nvme_write_bytes"] == expected
        assert moved["activation_reused_bytes"] >= expected  # all of it fits into staging
        assert moved["activation_read_bytes"] == 0


def saved_by_the_engine(running: Session) -> int:
    """Return the padded bytes that autograd saves of the engine's own model, without weights and buffers."""
    found = Storages()
    lasting = {b.storage_key() for u in running.engine.units for b in u.buffers}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in lasting:
            found.add(tensor)
        return tensor

    offload, running.engine._net.offload = running.engine._net.offload, None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        running.forward()
    running.engine._net.offload = offload
    return found.padded


@contextmanager
def on_looker(running: Session) -> Iterator[Storages]:
    """See what the engine leaves to the hooks that were there before, and what blocks are given."""
    found = Storages()
    lasting = {b.storage_key() for u in running.engine.units for b in u.buffers}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in lasting:
            found.add(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found


def test_what_stays_alive_is_what_the_formula_says(tmp_path: Path) -> None:
    """Between forward and backward: everything; inputs of blocks and what is saved beside them; the latter alone."""
    plain, _loss = what_plain_autograd_saves(ZOO["gpt"], "32-true", is_block)
    shared = plain.beside.sizes.keys() & plain.inputs.sizes.keys()
    assert not shared
    beside = sum(plain.beside.sizes.values())
    assert sum({**plain.within.sizes, **plain.beside.sizes}.values()) > 5 * beside
    expected = {
        Where(): sum({**plain.within.sizes, **plain.beside.sizes}.values()),
        Where(recompute=True): sum({**plain.inputs.sizes, **plain.beside.sizes}.values()),
        Where(recompute=True, activations="nvme"): beside,
        Where(activations="nvme"): 0,
    }
    for where, nbytes in expected.items():
        with session(ZOO["gpt"], tmp_path, where, "32-true", ONCE) as running, on_looker(running) as found:
            loss = running.forward()
            assert sum(found.sizes.values()) == nbytes, where
            del loss


@treated
def test_memory_of_what_is_away_is_free(where: Where, tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, where, "32-true", ONCE) as running:
        inputs: list[StorageWeakRef] = []

        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(StorageWeakRef(args[0].untyped_storage()))

        for block in running.model.blocks:  # type: ignore[union-attr]
            block.register_forward_pre_hook(look)
        loss = running.forward()
        assert [ref.expired() for ref in inputs] == 3 * [where.activations != "none"]
        running.backward(loss)


@everywhere
def test_the_budget_holds_and_order_does_not_matter(where: Where, tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, where, "32-true", RECIPE) as running:
        running.train()
        store = store_of(running)
        if store.nvme is not None:
            assert store.staging.peak <= store.budget  # type: ignore[union-attr]
        assert running.engine.counters.overcommits == running.engine.counters.orphaned_slots == 0
        assert nothing_left(running)
