"""Loops that do not zero gradients between steps: the numbers of plain torch, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from driver import Session, Where, session
from models import ZOO, Case
from oracle import Plain, Recipe, assert_same, exact_sqrt
from test_spilled import spilling
from torch import nn

from lightning_zinf.engine.guard import SpentGradient

CASE = ZOO["mlp"]
NVME = Where("nvme", "nvme", tight=True)
STATE = Where("none", "nvme")
ON_HOST = Where("cpu", "cpu", aliased=False)
IN_PLACE = Where("none", "none")
consumes = pytest.mark.parametrize("where", [NVME, STATE, ON_HOST], ids=str)
both_precisions = pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
ONCE = Recipe(steps=2, accumulate=1, clip_norm=None)


def micro_step(running: Session, plain: Plain | None = None) -> None:
    running.micro_step()
    if plain is not None:
        plain.backward(CASE.loss(plain.model, CASE.batch(running.number - 1), running.number - 1))


@consumes
@both_precisions
def test_a_second_step_without_zeroing_is_refused(where: Where, precision: str, tmp_path: Path) -> None:
    with session(CASE, tmp_path, where, precision, ONCE) as running:
        running.binding.watches = True
        running.micro_step()
        running.optimizer.step()
        before = running.result().masters
        with pytest.raises(ValueError, match=r"has used the gradients of '0\.weight', .* and 7 others.*zero_grad"):
            running.optimizer.step()  # with the same gradients, in plain torch
        running.micro_step()
        with pytest.raises(ValueError, match="an earlier step has used the gradients of"):
            running.optimizer.step()
        for name, master in running.result().masters.items():
            assert torch.equal(master, before[name])
        running.optimizer.zero_grad()
        running.micro_step()
        running.optimizer.step()


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_what_is_in_place_adds_up_until_it_is_clipped(clip: float | None, tmp_path: Path) -> None:
    recipe = Recipe(steps=2, accumulate=1, clip_norm=None)
    with session(CASE, tmp_path, IN_PLACE, "32-true", recipe) as running:
        plain = Plain(CASE.make(), "32-true", recipe)
        running.binding.watches = True
        for number in range(2):
            micro_step(running, plain)
            if number == 1 and clip is not None:
                running.binding.clip_by_norm(clip)
            running.update()
            with exact_sqrt():
                plain.optimizer.step()
            plain.schedule.step()
        if clip is None:
            assert_same(running.result(), plain.result(running.losses))
            return
        with pytest.raises(ValueError, match="or it clips them"):
            running.update()


def by_hand(running: Session) -> None:
    for param in running.model.parameters():
        param.grad = None


WAYS: dict[str, Callable[[Session], object]] = {
    "optimizer": lambda running: running.optimizer.zero_grad(),
    "optimizer-zeros": lambda running: running.optimizer.zero_grad(set_to_none=False),
    "module": lambda running: running.model.zero_grad(),
    "module-zeros": lambda running: running.model.zero_grad(set_to_none=False),
    "by-hand": by_hand,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", [NVME, STATE, IN_PLACE], ids=str)
def test_every_way_of_zeroing_is_seen(where: Where, way: str, tmp_path: Path) -> None:
    """Before a backward, after one that nobody wanted, and both with and without telling the engine of backwards."""
    recipe = Recipe(steps=4, accumulate=1, clip_norm=None)
    with session(CASE, tmp_path, where, "32-true", recipe) as running:
        plain = Plain(CASE.make(), "32-true", recipe)
        running.binding.watches = True
        for number in range(4):
            if number % 2:
                running.forward().backward() if number == 3 else running.backward(running.forward())
            WAYS[way](running)
            micro_step(running, plain)
            running.update()
            plain.step()
            plain.optimizer.zero_grad()
        assert_same(running.result(), plain.result(running.losses))


def test_a_backward_that_the_engine_is_not_told_of(tmp_path: Path) -> None:
    with session(CASE, tmp_path, NVME, "32-true", ONCE) as running:
        running.binding.watches = True
        for _ in range(2):
            running.optimizer.zero_grad()
            running.forward().backward()
            running.optimizer.step()
        running.forward().backward()
        with pytest.raises(ValueError, match="an earlier step has used"):
            running.optimizer.step()


class Forked(nn.Module):
    """Uses one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 10), nn.Linear(32, 10)])
        self.use = [0, 1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.layers[i](x) for i in self.use]).sum(0)


@pytest.mark.parametrize("where", [NVME, STATE, IN_PLACE], ids=str)
@pytest.mark.parametrize("by", ["optimizer-zeros", "module-zeros"])
def test_gradients_of_zeros_take_a_step(where: Where, by: str, tmp_path: Path) -> None:
    """As in plain torch, moments and weight decay go on for a parameter that is not used any more."""
    recipe = Recipe(steps=2, accumulate=1, clip_norm=None)
    case = Case(Forked, CASE.batch, units=("Linear",))
    plain = case.make()
    optimizer = recipe.build(plain.parameters())
    recipe.schedule(optimizer)  # which sets the first step's learning rate
    with session(case, tmp_path, where, "32-true", recipe) as running:
        running.binding.watches = True
        for use in ([0, 1], [0], [0]):
            plain.use = running.model.use = use  # type: ignore[assignment]
            optimizer.zero_grad(set_to_none=False)
            if use == [0]:
                WAYS[by](running)
            else:
                running.optimizer.zero_grad()
            running.micro_step()
            case.loss(plain, case.batch(running.number - 1), running.number - 1).backward()
            running.optimizer.step()
            optimizer.step()
        found = running.result()
        assert set(found.counts.values()) == {3}
        for name, param in plain.named_parameters():
            torch.testing.assert_close(found.masters[name], param.detach(), atol=1e-6, rtol=0)


@consumes
def test_a_gradient_that_is_spent_says_so(where: Where, tmp_path: Path) -> None:
    with session(CASE, tmp_path, where, "32-true", ONCE) as running:
        running.binding.watches = True
        running.micro_step()
        running.optimizer.step()
        param = next(running.model.parameters())
        assert isinstance(param.grad, SpentGradient)
        assert param.grad.shape == param.shape
        with pytest.raises(RuntimeError, match=r"has used this gradient up.*before the step"):
            param.grad.norm()
        running.engine.end_run()
        assert all(p.grad is None and not p._backward_hooks for p in running.model.parameters())


def test_gradients_on_nvme(tmp_path: Path) -> None:
    with spilling(CASE, tmp_path, NVME, "bf16-mixed", ONCE) as running:
        running.binding.watches = True
        running.micro_step()
        running.optimizer.step()
        running.micro_step()
        with pytest.raises(ValueError, match="an earlier step has used"):
            running.optimizer.step()
