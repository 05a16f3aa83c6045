"""What ``p.grad`` is where gradients are kept elsewhere: never silently nothing, and never in the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from driver import Where, session
from models import ZOO
from oracle import Recipe, assert_same, train_plain

from lightning_zinf.engine.guard import KeptGradient

SUMMED = (Where("nvme", "nvme", tight=True), "bf16-mixed", 2)
ON_HOST = (Where("cpu", "cpu", aliased=False), "32-true", 1)
IN_PLACE = [(Where("none", "none"), "32-true", 2), (Where("none", "none"), "bf16-mixed", 1)]


@pytest.mark.parametrize(("where", "precision", "accumulate"), [SUMMED, ON_HOST], ids=["summed", "on-host"])
def test_user_code_that_uses_them_raises(where: Where, precision: str, accumulate: int, tmp_path: Path) -> None:
    recipe = Recipe(steps=3, accumulate=accumulate)
    with session(ZOO["gpt"], tmp_path, where, precision, recipe) as running:
        params = list(running.model.parameters())
        for _ in range(recipe.steps):
            running.optimizer.zero_grad()
            for _ in range(accumulate):
                running.micro_step()
            for use in (torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_):
                with pytest.raises(
                    RuntimeError, match=r"keeps this gradient elsewhere.* trainer.strategy.clip_grad_norm_"
                ):
                    use(params, 1e-3)
            assert params[0].grad is not None
            assert params[0].grad.shape == params[0].shape
            assert running.binding.grad_norm() > 0
            assert isinstance(params[0].grad, KeptGradient)  # also after a look at the norm
            running.update()
        assert_same(running.result(), train_plain(ZOO["gpt"], precision, recipe))


@pytest.mark.parametrize(("where", "precision", "accumulate"), [SUMMED, ON_HOST], ids=["summed", "on-host"])
def test_zeroing_by_the_module(where: Where, precision: str, accumulate: int, tmp_path: Path) -> None:
    """What was computed before does not count."""
    recipe = Recipe(steps=3, accumulate=accumulate)
    with session(ZOO["gpt"], tmp_path, where, precision, recipe) as running:
        for _ in range(recipe.steps):
            running.micro_step()
            running.micro_step()
            running.model.zero_grad()
            running.number -= 2
            del running.losses[-2:]
            for _ in range(accumulate):
                running.micro_step()
            running.update()
        assert_same(running.result(), train_plain(ZOO["gpt"], precision, recipe))


@pytest.mark.parametrize(("where", "precision", "accumulate"), IN_PLACE)
def test_they_are_there_where_they_can_be(where: Where, precision: str, accumulate: int, tmp_path: Path) -> None:
    recipe = Recipe(steps=1, accumulate=accumulate, clip_norm=None)
    with session(ZOO["mlp"], tmp_path, where, precision, recipe) as running:
        params = list(running.model.parameters())
        for _ in range(accumulate):
            running.micro_step()
        assert float(torch.nn.utils.clip_grad_norm_(params, 1e-3)) > 1e-3
        assert running.binding.grad_norm() == pytest.approx(1e-3, rel=1e-2)
