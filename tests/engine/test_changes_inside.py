"""Code inside of a step may change weights too: clipping the weights of a critic in manual optimization, say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from driver import Where, session
from models import ZOO
from torch import nn


@torch.no_grad()
def in_place(param: nn.Parameter) -> None:
    param.clamp_(-0.01, 0.01)


def by_data(param: nn.Parameter) -> None:
    param.data.clamp_(-0.01, 0.01)


PLACES = [
    Where("none", "none"),
    Where("none", "nvme"),
    Where("none", "cpu", aliased=False),
    Where("none", "nvme", aliased=False),
    Where("nvme", "nvme", tight=True),
    Where("nvme", "cpu", tight=True),
    Where("cpu", "cpu", aliased=False, tight=True),
    Where("nvme", "nvme", aliased=False, tight=True),
]


@pytest.mark.parametrize("where", PLACES, ids=str)
@pytest.mark.parametrize("change", [in_place, by_data])
def test_changes_inside_of_a_step_stay(change: Callable[[nn.Parameter], None], where: Where, tmp_path: Path) -> None:
    with session(ZOO["mlp"], tmp_path, where) as running:
        running.step()
        expected = {name: master.clamp(-0.01, 0.01) for name, master in running.result().masters.items()}
        with running.engine.frame("train"):
            for param in running.model.parameters():
                change(param)
        for name, master in running.result().masters.items():
            assert torch.equal(master, expected[name]), name
