"""Weights that code changes between forward and backward: refused by name, where plain autograd refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Where, session
from models import Case, vectors
from oracle import Plain, Recipe, assert_same, autocast
from tiled_models import TILED
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PLACES = [
    Where("nvme", "nvme", tight=True),
    Where("nvme", "nvme", aliased=False, tight=True),
    Where("none", "nvme"),
    Where("none", "none"),
]
ONCE = Recipe(steps=2, accumulate=1, clip_norm=None)
everywhere = pytest.mark.parametrize("where", PLACES, ids=str)
both_precisions = pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
REFUSED = "has been modified by an inplace operation"


class Chain(nn.Module):
    """Two layers in one unit, and one by itself; ``change`` is run between forward and what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
        self.last = nn.Linear(32, 10)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.pair, x, use_reentrant=False) if self.checkpointed else self.pair(x)
        out: Tensor = self.last(torch.tanh(x + self.frozen(x)))
        return out


CASE = Case(Chain, vectors, units=("Sequential", "Linear"))


@everywhere
@both_precisions
@pytest.mark.parametrize("name", ["pair.2.weight", "last.weight", "frozen.weight"])
def test_a_weight_that_backward_needs(where: Where, precision: str, name: str, tmp_path: Path) -> None:
    with session(CASE, tmp_path, where, precision, ONCE) as running:
        running.step()
        loss = running.forward()
        with torch.no_grad():
            running.model.get_parameter(name).mul_(2)
        with pytest.raises(RuntimeError, match=REFUSED) as caught:
            running.backward(loss)
        if where.params == "nvme":
            assert f"parameter {name!r} is at version" in str(caught.value)
        running.engine.reset()
        running.optimizer.zero_grad()
        running.step()


@everywhere
@both_precisions
def test_within_a_step(where: Where, precision: str, tmp_path: Path) -> None:
    """As a training step does that changes a weight before its ``manual_backward``."""
    with session(CASE, tmp_path, where, precision, ONCE) as running, running.engine.frame("train") as outputs:
        with autocast(precision):
            loss = CASE.loss(running.model, CASE.batch(0), 0)
        outputs.append(loss)
        with torch.no_grad():
            running.model.last.weight.clamp_(-0.01, 0.01)  # type: ignore[union-attr,operator]
        with pytest.raises(RuntimeError, match=REFUSED):
            running.backward(loss)


@everywhere
@both_precisions
@pytest.mark.parametrize("name", ["pair.0.bias", "pair.0.weight", "frozen.bias"])
def test_a_weight_that_backward_does_not_need(where: Where, precision: str, name: str, tmp_path: Path) -> None:
    """Biases, and the first layer's weight, whose input needs no gradient."""
    with session(CASE, tmp_path, where, precision, ONCE) as running:
        plain = Plain(CASE.make(), precision, ONCE)
        for number in range(2):
            running.optimizer.zero_grad()
            loss = running.forward()
            running.losses.append(float(loss.detach()))
            with autocast(precision):
                expected = CASE.loss(plain.model, CASE.batch(number), number)
            with torch.no_grad():
                running.model.get_parameter(name).mul_(2)
                plain.masters[name].mul_(2)
            running.backward(loss)
            running.number += 1
            plain.backward(expected)
            running.update()
            plain.step()
        assert_same(running.result(), plain.result(running.losses))


@both_precisions
def test_what_is_computed_again_may_change(precision: str, tmp_path: Path) -> None:
    """As in plain torch, where a checkpoint computes with the weights that there are in backward."""
    with session(CASE, tmp_path, PLACES[0], precision, ONCE) as running:
        plain = Plain(CASE.make(), precision, ONCE)
        models: list[Any] = [running.model, plain.model]
        for model in models:
            model.checkpointed = True
        loss = running.forward()
        running.losses.append(float(loss.detach()))
        with autocast(precision):
            expected = CASE.loss(plain.model, CASE.batch(0), 0)
        with torch.no_grad():
            models[0].pair[2].weight.mul_(2)
            plain.masters["pair.2.weight"].mul_(2)
        plain.publish()
        running.backward(loss)
        plain.backward(expected)
        running.update()
        plain.step()
        assert_same(running.result(), plain.result(running.losses))


@pytest.mark.parametrize("where", [*PLACES[:3]], ids=str)
def test_a_step_of_another_optimizer_over_the_same_unit(where: Where, tmp_path: Path) -> None:
    """It leaves what it does not update as it was: two graphs are open when the first optimizer steps."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(32, 10)), nn.Parameter(torch.randn(32, 10))
            self.side = "a"

        def forward(self, x: Tensor) -> Tensor:
            return x.detach().requires_grad_() @ self.get_parameter(self.side)

    case = Case(Two, vectors)
    with session(case, tmp_path, where, "32-true", ONCE) as running:
        assert len(running.engine.units) == len(running.engine.units[0].buffers) == 1
        losses = []
        for side in "ab":
            running.model.side = side  # type: ignore[assignment]
            losses.append(running.forward())
        group = running.optimizer.param_groups[0]
        every = group["params"]
        for number, side in enumerate("ab"):
            group["params"] = [running.model.get_parameter(side)]
            running.backward(losses[number])
            running.optimizer.step()
        group["params"] = every
        loss = running.forward()
        running.backward(running.forward())
        running.optimizer.step()
        with pytest.raises(RuntimeError, match=r"updated in between|" + REFUSED):
            running.backward(loss)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_weight_in_tiles(precision: str, tmp_path: Path) -> None:
    with session(TILED["tiled-gpt"], tmp_path, PLACES[0], precision, ONCE) as running:
        tiled = running.engine.tiled[-1]
        loss = running.forward()
        with torch.no_grad():
            tiled.param.mul_(2)
        with pytest.raises(RuntimeError, match=REFUSED):
            running.backward(loss)
