"""Sums of squares that were taken as gradients came have the bits of a pass over all gradients, or are not used."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Session, Where, session, train_paged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import ZOO
from oracle import Recipe, assert_same, train_plain

from lightning_zinf.engine.guard import KeptGradient
from lightning_zinf.monitor.trace import Trace

PLACES = [
    Where("none", "none", ahead=True),
    Where("nvme", "nvme", tight=True, ahead=True),
    Where("none", "none", aliased=False, ahead=True),
    Where("cpu", "nvme", aliased=False, tight=True, ahead=True),
]
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]
RECIPES = {1: Recipe(accumulate=1), 2: Recipe(accumulate=2)}


def _bytes(it: Session) -> tuple[int, int]:
    return it.engine.counters.norm_ahead_bytes, it.engine.counters.norm_bytes


def _whole(it: Session) -> int:
    """Bytes of all gradients: with one micro-batch as autograd leaves them, else of float32 sums."""
    width = 4 if it.recipe.accumulate > 1 else None
    return sum(
        p.numel() * (width or b.compute_dtype.itemsize)
        for u in it.engine.units
        for b in u.buffers
        for p in b.params
        if p.requires_grad
    )


@pytest.mark.parametrize("accumulate", RECIPES)
@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_same_bits_and_nothing_is_read_twice(precision: str, where: Where, accumulate: int, tmp_path: Path) -> None:
    recipe = RECIPES[accumulate]
    with session(ZOO["gpt"], tmp_path, where, precision, recipe) as it:
        trace = it.engine.counters.trace = Trace(0)
        for step in range(recipe.steps):
            it.step()
            assert _bytes(it) == ((step + 1) * _whole(it), 0)
        it.engine.counters.trace = None
        assert sum(e.nbytes for e in trace.events() if e.stage == "norm") == recipe.steps * _whole(it)
        found = it.result()
    assert_same(found, train_plain(ZOO["gpt"], precision, recipe))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "where"),
    [
        (name, precision, where)
        for row, name in enumerate(n for n in ZOO if n != "gpt")
        for column, where in enumerate(PLACES)
        for precision in [PRECISIONS[(row + column) % len(PRECISIONS)]]
        if (name, precision) != ("bfloat16-born", "16-mixed")  # torch has no such LayerNorm
    ],
    ids=str,
)
def test_same_bits_of_every_model(name: str, precision: str, where: Where, tmp_path: Path) -> None:
    for number, recipe in RECIPES.items():
        found = train_paged(ZOO[name], tmp_path / str(number), where, precision, recipe)
        assert_same(found, train_plain(ZOO[name], precision, recipe))


@pytest.mark.parametrize("name", ["late", "mixture", "gpt-recompute-reentrant"])
def test_gradients_in_two_parts(name: str, tmp_path: Path) -> None:
    for number, where in enumerate(PLACES):
        found = train_paged(ZOO[name], tmp_path / str(number), where, "bf16-mixed", Recipe())
        assert_same(found, train_plain(ZOO[name], "bf16-mixed", Recipe()))


EDITS: dict[str, Callable[[torch.nn.Parameter], Any]] = {
    "scale": lambda p: p.grad.mul_(1.5),
    "add": lambda p: p.grad.view(-1)[:1].add_(1.0),
    "foreach": lambda p: torch._foreach_mul_([p.grad], 0.5),
    "replace": lambda p: setattr(p, "grad", p.grad * 3),
    "same": lambda p: setattr(p, "grad", p.grad.clone()),
    "data": lambda p: setattr(p.grad, "data", p.grad.data * 2),
    "drop": lambda p: setattr(p, "grad", None),
    "look": lambda p: p.grad.norm(),
}
_BACKWARD = st.tuples(st.sampled_from(["backward", "watched"]), st.just(0))
_OPERATION = st.one_of(
    _BACKWARD, st.tuples(st.sampled_from([*EDITS, "norm", "clip", "step", "zero"]), st.integers(0, 99))
)


def _check_norm(it: Session) -> None:
    found = it.binding.grad_norm()
    again = it.binding.grad_norm()
    for unit in it.engine.units:
        for buffer in unit.buffers:
            buffer.gradients.squares.forget()
    before = it.engine.counters.norm_ahead_bytes, it.engine.counters.norm_bytes
    at_once = it.binding.grad_norm()
    assert it.engine.counters.norm_ahead_bytes == before[0]
    assert found == again == at_once
    assert (it.engine.counters.norm_bytes > before[1]) == (at_once > 0)


def _do(it: Session, name: str, number: int) -> None:
    if name in ("backward", "watched"):
        it.binding.wants_norm = name == "watched"
        with it.binding.norm_ahead():
            it.micro_step()
    elif name == "norm":
        _check_norm(it)
    elif name == "clip":
        it.binding.clip_by_norm(0.5)
    elif name == "step":
        it.optimizer.step()
    elif name == "zero":
        it.optimizer.zero_grad()
    else:
        params = [p for p in it.model.parameters() if p.grad is not None]
        if params:
            param = params[number % len(params)]
            if name == "drop" or not isinstance(param.grad, KeptGradient):
                EDITS[name](param)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("where", PLACES, ids=str)
@given(st.lists(_OPERATION, min_size=3, max_size=12))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_sequence_has_the_norm_of_one_pass(where: Where, precision: str, operations: list[tuple[str, int]]) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        session(ZOO["mlp"], Path(folder), where, precision, Recipe(clip_norm=None)) as it,
    ):
        for name, number in [("watched", 0), *operations, ("norm", 0)]:
            _do(it, name, number)


def test_only_what_was_changed_is_summed_again(tmp_path: Path) -> None:
    with session(ZOO["gpt"], tmp_path, Where(), "32-true", Recipe(accumulate=1)) as it:
        it.binding.wants_norm = True
        with it.binding.norm_ahead():
            it.micro_step()
        param = next(p for p in it.model.parameters() if p.requires_grad)
        it.binding.grad_norm()
        assert _bytes(it) == (_whole(it), 0)
        assert param.grad is not None
        param.grad.mul_(2)
        it.binding.grad_norm()
        assert _bytes(it) == (_whole(it), param.grad.nbytes)


def test_a_gradient_that_a_hook_may_change_is_left_alone(tmp_path: Path) -> None:
    def halve(param: torch.Tensor) -> None:
        assert param.grad is not None
        param.grad.data.mul_(0.5)  # which no version counter shows

    norms = []
    for ahead in (True, False):
        with session(ZOO["gpt"], tmp_path / str(ahead), Where(), "32-true", Recipe(accumulate=1)) as it:
            param = next(p for p in it.model.parameters() if p.requires_grad)
            param.register_post_accumulate_grad_hook(halve)
            for _ in range(2):
                it.optimizer.zero_grad()
                it.binding.wants_norm = ahead
                with it.binding.norm_ahead():
                    it.micro_step()
                norms.append(it.binding.grad_norm())
            if ahead:
                assert param.grad is not None
                assert _bytes(it) == (2 * (_whole(it) - param.grad.nbytes), 2 * param.grad.nbytes)
    assert norms[:2] == norms[2:]
