"""Backward on another thread than forward, as autograd has it on an accelerator, where each device has a thread."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Session, Where, session
from models import ZOO
from oracle import Recipe, assert_same
from torch import Tensor


def _backward_elsewhere(it: Session, loss: Tensor) -> None:
    """Run backward between the engine's own calls on a new thread, which gets the hooks of saved tensors as there."""
    raised: list[BaseException] = []
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True) if it.engine._backward_nets else None

    def run() -> None:
        try:
            if hooks is None:
                loss.backward()
            else:
                with torch.autograd.graph.saved_tensors_hooks(*hooks):
                    loss.backward()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="device 0")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


class _Elsewhere(Session):
    def backward(self, loss: Tensor) -> None:
        self.engine.before_backward()
        try:
            _backward_elsewhere(self, loss)
        except BaseException:
            self.engine.after_backward(failed=True)
            raise
        self.engine.after_backward()


@pytest.mark.parametrize(
    ("name", "where", "clip"),
    [
        ("gpt", Where("nvme", "nvme", aliased=False, tight=True, early=True), None),
        ("gpt", Where("cpu", "cpu", aliased=False, recompute=True, activations="cpu", ahead=True), 1.0),
        ("gpt-recompute", Where("nvme", "nvme", tight=True, activations="nvme", ahead=True), 1.0),
        ("gpt-recompute-reentrant", Where("nvme", "nvme", aliased=False, tight=True), 1.0),
        ("mixture", Where("none", "nvme", aliased=False, early=True), None),
    ],
    ids=str,
)
def test_same_bits(name: str, where: Where, clip: float | None, tmp_path: Path) -> None:
    recipe = Recipe(clip_norm=clip, accumulate=2, steps=4)
    results = []
    for kind in (Session, _Elsewhere):
        with session(ZOO[name], tmp_path / kind.__name__, where, "bf16-mixed", recipe) as it:
            it.__class__ = kind
            results.append(it.train().result())
    assert_same(results[1], results[0])


def test_a_failure_there_is_told_here_and_training_goes_on(tmp_path: Path) -> None:
    where, recipe = Where("nvme", "nvme", aliased=False, tight=True), Recipe(steps=2)
    results = []
    for fails in (False, True):
        with session(ZOO["gpt"], tmp_path / str(fails), where, "bf16-mixed", recipe) as it:
            it.__class__ = _Elsewhere
            if fails:
                loss = it.forward()
                loss.register_hook(lambda grad: 1 / 0)  # type: ignore[no-untyped-call]
                with pytest.raises(ZeroDivisionError):
                    it.backward(loss)
                it.engine.reset()
            results.append(it.train().result())
    assert_same(results[1], results[0])
