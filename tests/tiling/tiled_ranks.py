"""What the ranks of the tests of tiles do with a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning_cases import loader, net, trainer
from sharded_cases import Model, strategy
from torch import Tensor

import lightning_zinf
from lightning_zinf.tiling.dispatch import blocks_of


def change(rank: int, size: int, folder: Path) -> tuple[bool, dict[str, Tensor]]:
    """Fit, let rank 0 change a weight that is in tiles, all of them another one, and return what they are."""
    model: Any = net(Model)
    running = trainer(folder, strategy("tiled"), devices=size)
    running.fit(model, loader(4))
    with lightning_zinf.gathered(model.frozen.weight, write=True), torch.no_grad():
        if rank == 0:
            model.frozen.weight.copy_(torch.arange(130 * 130).view(130, 130))
    model.blocks[1][0].weight.data.fill_(2.0)
    running.validate(model, loader(4), verbose=False)
    return blocks_of(model.frozen.weight) is not None, lightning_zinf.full_state_dict(model)
