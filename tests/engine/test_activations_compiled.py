"""Activation checkpointing of compiled modules: forward and recomputation run the same graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo
from driver import Where, session
from models import ZOO
from test_compile import compile_blocks, compile_forwards, compile_whole
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

STEPS = 3
PLACES = [
    Where(recompute=True),
    Where(recompute=True, activations="nvme", activation_bytes=8192),
    Where("nvme", "nvme", tight=True, recompute=True, activations="nvme", activation_bytes=8192),
    Where(activations="nvme"),
]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("where", PLACES, ids=lambda w: f"{w}-{w.recompute}-{w.activations}")
@pytest.mark.parametrize(
    ("early", "compile_it"),
    [(True, compile_forwards), (True, compile_blocks), (True, compile_whole), (False, compile_blocks)],
)
def test_the_same_losses_as_without(
    early: bool,
    compile_it: Callable[[nn.Module, CompileCounterWithBackend], nn.Module],
    where: Where,
    tmp_path: Path,
) -> None:
    """Compiled before the engine or after; what is to be recomputed in the midst of a graph runs as it is."""
    with session(ZOO["gpt"], tmp_path, Where()) as eager:
        expected = eager.train(STEPS).losses
    counter, model = CompileCounterWithBackend("aot_eager"), ZOO["gpt"].make()
    if early:
        compile_it(model, counter)
    with session(ZOO["gpt"], tmp_path, where, model=model) as running:
        if not early:
            compile_it(model, counter)
        running.train(STEPS)
        # aot_eager runs the same operators in the same order, but sums some gradients in another.
        assert running.losses == pytest.approx(expected, rel=1e-4)
        if not where.recompute or (early and compile_it is not compile_whole):
            assert counter.frame_count > 0
        store = running.engine.context.activations
        if store is not None:
            assert running.engine.counters.activation_write_bytes > 0
            store.drain()
            assert store.live == store.resting_bytes == 0
        running.engine.dissolve()
    for block in model.blocks:  # type: ignore[union-attr]
        assert "RecomputedForward" not in type(block._compiled_call_impl).__name__
