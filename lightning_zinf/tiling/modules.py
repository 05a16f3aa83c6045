"""Layers that compute in tiles, to be used by hand.

They have the parameters, initial values and state dict of the layers that they stand for. Without the strategy they
bound what an operator needs beside its weight; with it, each tile of their weight is a unit, gathered by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_zinf.tiling import ops
from lightning_zinf.tiling.blocks import Views, joined
from lightning_zinf.tiling.dispatch import blocks_of
from lightning_zinf.tiling.grid import Grid


def _check_splits(**splits: int) -> None:
    for name, value in splits.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


class TiledLinear(nn.Linear):
    """``nn.Linear``, computed tile by tile.

    Output, weight and bias gradient with ``in_splits=1`` have the bits of ``nn.Linear``; the gradient of the input is
    summed in another order, as is the output where ``in_splits`` is larger.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether there is a bias.
        in_splits: Number of tiles that the inputs are cut into at most; their results are added up.
        out_splits: Number of tiles that the outputs are cut into at most.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If there is not at least one split each.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_splits(in_splits=in_splits, out_splits=out_splits)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.in_splits, self.out_splits = in_splits, out_splits

    @classmethod
    def from_linear(cls, linear: nn.Linear, in_splits: int = 1, out_splits: int = 1) -> TiledLinear:
        """Return a layer with the very parameters of another one.

        Args:
            linear: The other one.
            in_splits: See the class.
            out_splits: See the class.
        """
        tiled = cls(linear.in_features, linear.out_features, False, in_splits, out_splits, "meta")
        tiled.weight, tiled.bias = linear.weight, linear.bias
        return tiled.train(linear.training)

    @property
    def tile_splits(self) -> tuple[int, int]:
        """Into how many rows and columns of tiles the weight is cut at most."""
        return self.out_splits, self.in_splits

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``.

        Args:
            input: ``(*, in_features)``.
        """
        if blocks_of(self.weight) is not None or self.tile_splits == (1, 1):
            return F.linear(input, self.weight, self.bias)
        grid = Grid.splits(self.out_features, self.in_features, *self.tile_splits)
        return ops.linear(input, Views(self.weight, grid), self.bias)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{super().extra_repr()}, in_splits={self.in_splits}, out_splits={self.out_splits}"


class TiledEmbedding(nn.Embedding):
    """``nn.Embedding``, looked up tile by tile; every result and gradient has the bits of ``nn.Embedding``.

    Args:
        num_embeddings: Number of rows.
        embedding_dim: Size of a row.
        splits: Number of tiles that the rows are cut into at most.
        options: More options of ``nn.Embedding``, without ``max_norm`` and ``sparse``.

    Raises:
        ValueError: If there is not at least one split, or for ``max_norm`` and ``sparse``.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, splits: int = 1, **options: Any) -> None:
        _check_splits(splits=splits)
        if refused := [name for name in ("max_norm", "sparse") if options.get(name)]:
            raise ValueError(f"TiledEmbedding knows no {' and no '.join(refused)}: use nn.Embedding")
        super().__init__(num_embeddings, embedding_dim, **options)
        self.splits = splits

    @property
    def tile_splits(self) -> tuple[int, int]:
        """Into how many rows and columns of tiles the weight is cut at most."""
        return self.splits, 1

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of some indices.

        Args:
            input: Indices of any shape.
        """
        if blocks_of(self.weight) is not None or self.splits == 1:
            return super().forward(input)
        grid = Grid.splits(self.num_embeddings, self.embedding_dim, self.splits, 1)
        return ops.embedding(
            input, Views(self.weight, grid), self.embedding_dim, self.padding_idx, self.scale_grad_by_freq
        )

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{super().extra_repr()}, splits={self.splits}"


class TiledMLP(nn.Module):
    """A module that acts on each token by itself, run over tiles of the sequence.

    What it computes inside is there for one tile only, and computed again in backward. Gradients of its weights are
    summed over tiles, in another order than without. Its parameters have the names of the module's, below ``module``.

    Args:
        module: What to run, such as the MLP of a transformer block: its output at a place along ``dim`` must depend on
            its input there alone, and dropout in it draws other numbers than on the whole sequence.
        tile: Size of a tile along ``dim``.
        dim: The dimension of the sequence, in input and output.

    Raises:
        ValueError: If ``tile`` is below 1.
    """

    def __init__(self, module: nn.Module, tile: int, dim: int = 1) -> None:
        super().__init__()
        _check_splits(tile=tile)
        self.module, self.tile, self.dim = module, tile, dim

    def forward(self, x: Tensor) -> Tensor:
        """Return what the module returns for ``x``, which has the sequence along ``dim``."""
        if x.size(self.dim) <= self.tile:
            out: Tensor = self.module(x)
            return out
        tiles = x.split(self.tile, self.dim)

        def run(number: int) -> Tensor:
            if not torch.is_grad_enabled():
                result: Tensor = self.module(tiles[number])
            else:
                result = checkpoint(self.module, tiles[number], use_reentrant=False)
            return result

        return joined(run, len(tiles), x.size(self.dim), self.dim)
