"""Whatever is done between steps, the engine that puts updates off has the bits of one that does all at once."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Session, Where, session
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ZOO
from oracle import Recipe, assert_same

RECIPE = Recipe(clip_norm=None, accumulate=1)
AT_ONCE = Where("none", "none", update="step")
LATER = {
    "nvme": Where("nvme", "nvme", tight=True, early=True),
    "state": Where("none", "nvme", early=True),
    "device": Where("nvme", "nvme", aliased=False, tight=True, early=True),
    "mixed": Where("auto", "auto", share=0.4, early=True),
}


class Broken(RuntimeError):
    """On purpose."""


def clipped(it: Session) -> None:
    it.optimizer.zero_grad()
    it.micro_step()
    it.binding.clip_by_norm(0.01)
    it.optimizer.step()


def evaluate(it: Session) -> None:
    with torch.no_grad():
        it.losses.append(float(it.forward(kind="validate")))


def read(it: Session) -> None:
    it.losses.append(float(list(it.model.parameters())[it.number % 5].detach().double().sum()))


def change(it: Session) -> None:
    with torch.no_grad():
        list(it.model.parameters())[it.number % 3].mul_(0.9)


def fail_in_forward(it: Session) -> None:
    """The parameters are left as they were, and the next step is a step like any other."""

    def loss() -> torch.Tensor:
        it.case.loss(it.model, it.case.batch(it.number), it.number)
        raise Broken

    it.optimizer.zero_grad()
    with pytest.raises(Broken):
        it.optimizer.step(lambda: it.micro_step(loss))  # type: ignore[arg-type]
    it.engine.reset()


def gradients_for_nothing(it: Session) -> None:
    it.micro_step()
    it.optimizer.zero_grad()


def state_dict(it: Session) -> None:
    kept = {name: value.clone() for name, value in it.model.state_dict().items()}
    it.losses.append(float(sum(v.double().sum() for v in kept.values() if v.is_floating_point())))


def take_optimizer_back(it: Session) -> None:
    saved = copy.deepcopy(it.optimizer.state_dict())
    it.step()
    it.optimizer.load_state_dict(saved)


def flush(it: Session) -> None:
    it.engine.flush()


def settle(it: Session) -> None:
    it.engine.release_host()


OPERATIONS: list[Any] = [
    Session.step,
    clipped,
    evaluate,
    read,
    change,
    fail_in_forward,
    gradients_for_nothing,
    state_dict,
    take_optimizer_back,
    flush,
    settle,
]


def run(name: str, where: Where, precision: str, operations: list[Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder, session(ZOO[name], Path(folder), where, precision, RECIPE) as it:
        for operation in operations:
            operation(it)
        return it.result()


@pytest.mark.parametrize("where", LATER.values(), ids=LATER)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_sequence(data: st.DataObject, precision: str, where: Where) -> None:
    name = data.draw(st.sampled_from(["mlp", "gpt", "frozen", "mixture"]))
    operations = data.draw(st.lists(st.sampled_from(OPERATIONS), min_size=3, max_size=14))
    assert_same(run(name, where, precision, operations), run(name, AT_ONCE, precision, operations))


@pytest.mark.slow
@pytest.mark.parametrize("where", LATER.values(), ids=LATER)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_sequence_many_times(data: st.DataObject, precision: str, where: Where) -> None:
    name = data.draw(st.sampled_from(["mlp", "gpt", "frozen", "mixture", "lstm", "gpt-recompute-reentrant"]))
    operations = data.draw(st.lists(st.sampled_from(OPERATIONS), min_size=3, max_size=20))
    assert_same(run(name, where, precision, operations), run(name, AT_ONCE, precision, operations))
