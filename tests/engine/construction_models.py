"""Models that are larger than the budget they are built in, and the values that they would have without one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SIDE = 192
WEIGHT = SIDE * SIDE * 4
"""Bytes of a weight: 144 KiB, more than the smallest page."""


class Deep(nn.Module):
    """Tied weights, a module that is built and thrown away, copies, and a second initialisation at the end."""

    depth = 8

    def __init__(self, *, init: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(SIDE, SIDE)
        self.blocks = nn.ModuleList(nn.Linear(SIDE, SIDE) for _ in range(self.depth))
        nn.Linear(SIDE, SIDE)
        self.head = nn.Linear(SIDE, SIDE, bias=False)
        self.head.weight = self.embed.weight
        self.late = nn.Linear(SIDE, SIDE)
        self.copy_weights()
        if init:
            self.apply(self.initialise)

    def copy_weights(self) -> None:
        self.late.weight.data.copy_(self.blocks[0].weight)

    @staticmethod
    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def plain(layers: int = 8) -> nn.Module:
    """A model with nothing but ``nn.Linear``'s own initialisation."""
    return nn.Sequential(*[nn.Linear(SIDE, SIDE) for _ in range(layers)])


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def expected_of(build: Callable[[], nn.Module]) -> tuple[dict[str, Tensor], Tensor]:
    """Return what plain construction gives with seed 3, and the random generator after it."""
    torch.manual_seed(3)
    return values_of(build()), torch.get_rng_state()
