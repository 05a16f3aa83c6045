"""Models of which the strategy tiles layers, and the same in plain PyTorch with the same tiles."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from models import BATCH, GPT, LENGTH, VOCAB, WIDTH, Case, cnn, images, mlp, tokens, vectors
from torch import Tensor, nn

from lightning_zinf.tiling import ops
from lightning_zinf.tiling.blocks import Views
from lightning_zinf.tiling.grid import Grid
from lightning_zinf.tiling.plan import plan_tiles

TILE_BYTES = 2048


class Conv1D(nn.Module):
    """What ``transformers.pytorch_utils.Conv1D`` is: a linear layer with a transposed weight."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(0.1 * torch.randn(nx, nf))
        self.bias = nn.Parameter(0.1 * torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Conv1Ds(nn.Module):
    """A padded embedding, Conv1D layers, a pointwise convolution, and rows that are larger than a tile."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, padding_idx=3, scale_grad_by_freq=True)
        self.up, self.down = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, 3 * WIDTH)
        self.point = nn.Conv1d(WIDTH, 2 * WIDTH, 1)
        self.wide = nn.Linear(40 * WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(F.gelu(self.up(x)))
        x = F.gelu(self.point(x.transpose(1, 2))).transpose(1, 2)
        out: Tensor = self.wide(x.repeat(1, 1, 20) * torch.linspace(0, 1, 40 * WIDTH).to(x.dtype))
        return out


class Adapted(nn.Module):
    """A frozen layer and a low-rank adapter beside it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.down = nn.Linear(base_layer.in_features, 4, bias=False)
        self.up = nn.Linear(4, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.up(self.down(x))
        return out


def adapted() -> nn.Module:
    model = mlp()
    for number in (0, 3, 6):
        model[number] = Adapted(model[number])  # type: ignore[arg-type]
    return model


# ---------------------------------------------------------------------- in plain PyTorch


class _Linear(nn.Linear):
    grid: Grid

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, Views(self.weight, self.grid), self.bias)


class _Embedding(nn.Embedding):
    grid: Grid

    def forward(self, input: Tensor) -> Tensor:
        weight = Views(self.weight, self.grid)
        return ops.embedding(input, weight, self.embedding_dim, self.padding_idx, self.scale_grad_by_freq)


class _Conv2d(nn.Conv2d):
    grid: Grid

    def forward(self, input: Tensor) -> Tensor:
        weight = Views(self.weight, self.grid)
        return ops.conv(F.conv2d, input, weight, self.bias, self.stride, self.padding, self.dilation, 1)


class _Conv1d(nn.Conv1d):
    grid: Grid

    def forward(self, input: Tensor) -> Tensor:
        weight = Views(self.weight, self.grid)
        return ops.conv(F.conv1d, input, weight, self.bias, self.stride, self.padding, self.dilation, 1)


class _Conv1D(Conv1D):
    grid: Grid

    def forward(self, x: Tensor) -> Tensor:
        out = ops.addmm(self.bias, x.view(-1, x.size(-1)), Views(self.weight, self.grid))
        return out.view(*x.shape[:-1], self.nf)


_PLAIN = {
    nn.Linear: _Linear,
    nn.Embedding: _Embedding,
    nn.Conv2d: _Conv2d,
    nn.Conv1d: _Conv1d,
    Conv1D: _Conv1D,
}


def plainly(model: nn.Module, precision: str, tile_bytes: int = TILE_BYTES) -> nn.Module:
    """Let layers of an ordinary model compute with views of their weights, cut as the strategy would cut them."""
    width = 4 if precision == "32-true" else 2
    for plan in plan_tiles(model, tile_bytes, lambda p: min(width, p.dtype.itemsize)):
        for module in plan.modules:
            module.__class__ = _PLAIN[type(module)]
            module.grid = plan.grid
    return model


def _case(case: Case, tile_bytes: int = TILE_BYTES) -> Case:
    oracle = functools.partial(plainly, tile_bytes=tile_bytes)
    return Case(case.build, case.batch, case.loss, case.units, tile_bytes, oracle)


TILED: dict[str, Case] = {
    "tiled-gpt": _case(Case(GPT, tokens)),
    "tiled-recompute": _case(Case(lambda: GPT(recompute=False), tokens)),
    "tiled-cnn": _case(Case(cnn, images)),
    "tiled-conv1d": _case(Case(Conv1Ds, tokens)),
    "tiled-adapted": _case(Case(adapted, vectors), 1024),
}
"""Every kind of layer that is tiled."""

__all__ = ["BATCH", "LENGTH", "TILED", "TILE_BYTES", "Adapted", "Conv1D", "plainly"]
