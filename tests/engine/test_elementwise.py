"""Any optimizer that works element by element has the bits of itself on whole parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Where, session, train_paged
from models import ZOO
from oracle import Recipe, assert_same, train_plain
from torch import optim

PLACES = [Where("none", "none"), Where("nvme", "nvme", tight=True), Where("nvme", "nvme", aliased=False, tight=True)]


class Lion(torch.optim.Optimizer):
    """One that torch does not have, as users write them: it puts new tensors into its state."""

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.scale = 1.0  # an attribute of its own

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                average = state.get("average", torch.zeros_like(param))
                param.data = param - group["lr"] * (
                    torch.sign(average * self.scale + param.grad) + group["weight_decay"] * param
                )
                state["average"] = average * group["momentum"] + param.grad
                state["calls"] = state.get("calls", 0) + 1


class Built(torch.optim.Optimizer):
    """One that makes its state when it is built, and only then; so did torch's Adagrad up to 2.11 at least."""

    def __init__(self, params: Any, lr: float = 1e-3, first: float = 0.5, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "first": first, "weight_decay": weight_decay})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = {"sum": torch.full_like(param, first), "calls": 0}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state["calls"] += 1
                    state["sum"].add_(param.grad.square())
                    param.sub_(param.grad / state["sum"].sqrt() * (group["lr"] / state["calls"]))


RECIPES = {
    "sgd": Recipe(optimizer=optim.SGD),
    "sgd-momentum": Recipe(optimizer=optim.SGD, options={"momentum": 0.9, "dampening": 0.1}),
    "sgd-nesterov": Recipe(
        optimizer=optim.SGD, options={"momentum": 0.9, "nesterov": True}, clip_norm=None, clip_value=0.01
    ),
    "adagrad": Recipe(optimizer=optim.Adagrad, options={"initial_accumulator_value": 0.1, "lr_decay": 0.01}),
    "rmsprop": Recipe(optimizer=optim.RMSprop, options={"centered": True, "momentum": 0.5}),
    "nadam": Recipe(optimizer=optim.NAdam),
    "radam": Recipe(optimizer=optim.RAdam, steps=8),
    "adamax": Recipe(optimizer=optim.Adamax),
    "adadelta": Recipe(optimizer=optim.Adadelta),
    "rprop": Recipe(optimizer=optim.Rprop),
    "asgd": Recipe(optimizer=optim.ASGD, options={"t0": 2}),
    "amsgrad": Recipe(optimizer=optim.AdamW, options={"amsgrad": True}),
    "lion": Recipe(optimizer=Lion),
    "built": Recipe(optimizer=Built, options={"first": 0.25}),
}


@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_as_itself(recipe: Recipe, precision: str, where: Where, tmp_path: Path) -> None:
    for name in ("mlp", "frozen"):
        found = train_paged(ZOO[name], tmp_path / name, where, precision, recipe)
        assert_same(found, train_plain(ZOO[name], precision, recipe))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_state_dict_goes_both_ways(recipe: Recipe, tmp_path: Path) -> None:
    """Trained three steps here, three more by torch, from the state in torch's layout; and the other way round."""
    case, whole = ZOO["mlp"], train_plain(ZOO["mlp"], "32-true", Recipe(**{**vars(recipe), "steps": 6}))
    with session(case, tmp_path / "a", PLACES[1], "32-true", recipe) as running:
        running.train(3)
        weights = {n: p.detach().clone() for n, p in running.model.named_parameters()}
        state = running.optimizer.state_dict()
    with session(case, tmp_path / "b", PLACES[1], "32-true", recipe) as running:
        with torch.no_grad():
            for name, param in running.model.named_parameters():
                param.copy_(weights[name])
        running.optimizer.load_state_dict(state)
        for _ in range(3):
            running.schedule.step()
        running.number = 3 * recipe.accumulate
        result = running.train(3).result()
    result.losses = whole.losses
    assert_same(result, whole)


def test_state_of_another_optimizer(tmp_path: Path) -> None:
    with session(ZOO["mlp"], tmp_path, PLACES[0], "32-true", RECIPES["rmsprop"]) as running:
        params = [torch.nn.Parameter(p.detach().clone()) for p in running.model.parameters()]
        other = Recipe(optimizer=optim.Adamax).build(params)
        for param in params:
            param.grad = torch.zeros_like(param)
        other.step()
        with pytest.raises(ValueError, match=r"RMSprop keeps \['square_avg'.* saved by another optimizer"):
            running.optimizer.load_state_dict(other.state_dict())


def test_momentum_that_comes_later(tmp_path: Path) -> None:
    """Without momentum SGD keeps nothing; a schedule may give it some."""
    case, recipe = ZOO["mlp"], Recipe(optimizer=optim.SGD, clip_norm=None, steps=4)
    model = case.make()
    optimizer = recipe.build(model.parameters())
    schedule = recipe.schedule(optimizer)
    for number in range(8):
        (case.loss(model, case.batch(number), number) / 2).backward()
        if number % 2:
            for group in optimizer.param_groups:
                group["momentum"] = 0.9 if number > 3 else 0.0
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    with session(case, tmp_path, PLACES[1], "32-true", recipe) as running:
        for step in range(4):
            for group in running.optimizer.param_groups:
                group["momentum"] = 0.9 if step > 1 else 0.0
            running.step()
        found = running.result()
    for name, param in model.named_parameters():
        assert torch.equal(found.masters[name], param.detach()), name
