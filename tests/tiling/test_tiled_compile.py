"""Tiled layers inside of compiled modules run outside of the graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo
from driver import Where, session
from test_compile import blocks, compile_blocks, compile_whole
from tiled_models import TILED
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

STEPS = 3
Compile = Callable[[nn.Module, CompileCounterWithBackend], nn.Module]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def compile_methods(model: nn.Module, counter: CompileCounterWithBackend) -> nn.Module:
    for block in blocks(model):
        block.forward = torch.compile(block.forward, backend=counter)  # type: ignore[method-assign]
    return model


PLACES = [Where("nvme", "nvme", tight=True), Where("none", "none")]
EVERYTHING = [(w, c) for w in PLACES for c in (compile_methods, compile_blocks, compile_whole)]


@pytest.mark.parametrize(
    ("where", "compile_it"),
    [pytest.param(*case, marks=() if case == EVERYTHING[1] else pytest.mark.slow) for case in EVERYTHING],
)
def test_the_same_losses_as_without(where: Where, compile_it: Compile, tmp_path: Path) -> None:
    case = TILED["tiled-gpt"]
    with session(case, tmp_path, Where()) as eager:
        expected = eager.train(STEPS).losses
    counter = CompileCounterWithBackend("aot_eager")
    with session(case, tmp_path, where) as running:
        compile_it(running.model, counter)
        # aot_eager runs the same operators in the same order, but sums some gradients in another.
        assert running.train(STEPS).losses == pytest.approx(expected, rel=1e-4)
        assert counter.frame_count > 0
        assert all(parameter.opened is None for parameter in running.engine.tiled)


def test_a_full_graph_is_refused_by_torch(tmp_path: Path) -> None:
    with session(TILED["tiled-gpt"], tmp_path, Where()) as running:
        for block in blocks(running.model):
            block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)  # type: ignore[method-assign]
        with pytest.raises(torch._dynamo.exc.Unsupported):
            running.forward()
