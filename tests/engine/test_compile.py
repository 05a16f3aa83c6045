"""Compiled modules: hooks stay outside of the graphs, so paged parameters compile as plain ones do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo
from driver import Session, Where, session
from models import ZOO
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

STEPS = 4
PLACES = [Where("nvme", "nvme", tight=True), Where("nvme", "cpu"), Where("none", "nvme"), Where("none", "none")]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def blocks(model: nn.Module) -> nn.ModuleList:
    found = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    assert len(found) > 1
    return found


def compile_forwards(model: nn.Module, counter: CompileCounterWithBackend) -> nn.Module:
    for block in blocks(model):
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)  # type: ignore[method-assign]
    return model


def compile_blocks(model: nn.Module, counter: CompileCounterWithBackend) -> nn.Module:
    for block in blocks(model):
        block.compile(backend=counter)
    return model


def compile_whole(model: nn.Module, counter: CompileCounterWithBackend) -> nn.Module:
    model.compile(backend=counter)
    return model


def checkpointed(model: nn.Module, counter: CompileCounterWithBackend) -> nn.Module:
    compile_forwards(model, counter)
    for block in blocks(model):
        inner = block.forward
        block.forward = (  # type: ignore[method-assign]
            lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=False)
        )
    return model


def losses(running: Session, compile_it: Callable[[nn.Module, CompileCounterWithBackend], nn.Module]) -> list[float]:
    counter = CompileCounterWithBackend("aot_eager")
    compile_it(running.model, counter)
    running.train(STEPS)
    assert counter.frame_count > 0
    return running.losses


@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("compile_it", [compile_forwards, compile_blocks, compile_whole, checkpointed])
def test_the_same_losses_as_without(
    compile_it: Callable[[nn.Module, CompileCounterWithBackend], nn.Module], where: Where, tmp_path: Path
) -> None:
    with session(ZOO["gpt"], tmp_path, Where()) as eager:
        expected = eager.train(STEPS).losses
    with session(ZOO["gpt"], tmp_path, where) as running:
        # aot_eager runs the same operators in the same order, but sums some gradients in another.
        assert losses(running, compile_it) == pytest.approx(expected, rel=1e-4)
        assert running.engine.counters.overcommits == 0


def test_equal_blocks_share_one_graph(tmp_path: Path) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    with session(ZOO["gpt"], tmp_path, Where("nvme", "nvme", tight=True)) as running:
        for block in blocks(running.model):
            block.forward = torch.compile(block.forward, backend=counter)  # type: ignore[method-assign]
        running.train(2)
        first = counter.frame_count
        running.train(3)
        assert counter.frame_count == first
