"""Operators on weights in blocks.

Note [Order of sums]
~~~~~~~~~~~~~~~~~~~~
Blocks of whole rows of a linear layer's weight (``out_splits``) give parts of its output: output, weight gradient and
bias gradient are computed from the same numbers in the same order as without tiling. The gradient of the input is a sum
over output features, which tiling cuts into partial sums; it differs in rounding. Blocks of columns (``in_splits``) cut
the output's own sums instead, and then the gradients of input and weight are as without tiling, for an equal output
gradient. docs/user-guide.md has the bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_zinf.tiling.blocks import Blocks, apply, joined
from lightning_zinf.tiling.grid import Range


def cast_once(x: Tensor) -> Tensor:
    """Return what autocast would make of an input, so that it does so once and not for every block."""
    kind = x.device.type
    if x.dtype in (torch.float32, torch.float16, torch.bfloat16) and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _sizes(ranges: tuple[Range, ...]) -> list[int]:
    return [high - low for low, high in ranges]


def _cut(x: Tensor | None, ranges: tuple[Range, ...], dim: int) -> list[Any]:
    if x is None:
        return [None] * len(ranges)
    return [x] if len(ranges) == 1 else list(x.split(_sizes(ranges), dim))


def _given(bias: Tensor | None, ranges: tuple[Range, ...]) -> Tensor | None:
    """Return the bias as blocks take it: where there are several, it gets its gradient from the whole result."""
    return bias if bias is None or len(ranges) == 1 else bias.detach()


def linear(x: Tensor, weight: Blocks, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` block by block.

    Args:
        x: ``(*, in_features)``.
        weight: ``(out_features, in_features)`` in blocks.
        bias: ``(out_features,)`` or None.
    """
    grid = weight.grid
    inputs, biases = _cut(cast_once(x), grid.columns, -1), _cut(_given(bias, grid.rows), grid.rows, 0)

    def row(number: int) -> Tensor:
        out: Tensor = weight.use(grid.index(number, 0), _linear, inputs[0], biases[number])
        for column in range(1, len(inputs)):
            out = out.add_(weight.use(grid.index(number, column), _linear, inputs[column], None))
        return out

    return row(0) if len(grid.rows) == 1 else joined(row, len(grid.rows), grid.rows[-1][1], -1, bias)


def _linear(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def addmm(bias: Tensor, x: Tensor, weight: Blocks) -> Tensor:
    """``torch.addmm(bias, x, weight)`` block by block.

    Args:
        bias: ``(out_features,)``.
        x: ``(n, in_features)``.
        weight: ``(in_features, out_features)`` in blocks.
    """
    grid = weight.grid
    inputs, biases = _cut(cast_once(x), grid.rows, -1), _cut(_given(bias, grid.columns), grid.columns, -1)

    def column(number: int) -> Tensor:
        out: Tensor = weight.use(grid.index(0, number), _addmm, biases[number], inputs[0])
        for row in range(1, len(inputs)):
            out = out.add_(weight.use(grid.index(row, number), _product, inputs[row]))
        return out

    columns = len(grid.columns)
    return column(0) if columns == 1 else joined(column, columns, grid.columns[-1][1], -1, bias)


def _addmm(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return torch.addmm(bias, x, weight)


def _product(weight: Tensor, x: Tensor) -> Tensor:
    return torch.mm(x, weight)


def conv(function: Callable[..., Tensor], x: Tensor, weight: Blocks, bias: Tensor | None, *options: Any) -> Tensor:
    """``F.conv1d``, ``conv2d`` or ``conv3d`` with one group, block of output channels by block.

    Args:
        function: Which.
        x: The input.
        weight: ``(out_channels, in_channels, *kernel)`` in blocks of whole rows.
        bias: ``(out_channels,)`` or None.
        options: Stride, padding, dilation and groups, which is 1.
    """
    grid, x = weight.grid, cast_once(x)
    biases = _cut(bias, grid.rows, 0)

    def channels(number: int) -> Tensor:
        out: Tensor = weight.use(number, lambda block: function(x, block, biases[number], *options))
        return out

    spatial = getattr(function, "__name__", "conv2d")[4:5]  # channels are the last dimension but that many
    return joined(channels, len(grid.rows), grid.rows[-1][1], -1 - int(spatial))


class _Scatter(torch.autograd.Function):
    """Put looked-up rows to their places."""

    @staticmethod
    def forward(ctx: Any, places: list[Tensor], out: tuple[Tensor], *rows: Tensor) -> Tensor:
        """Return ``out``, which has the rows already."""
        ctx.places = places
        return out[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Select the gradient of each block's rows."""
        return (None, None, *(grads[0].index_select(0, place) for place in ctx.places))


class _Fill(torch.autograd.Function):
    """Put a block's rows into the result."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Tensor, out: tuple[Tensor]) -> Tensor:
        """Return a stand-in of the rows' shape, as in :mod:`lightning_zinf.tiling.blocks`."""
        out[0].index_copy_(0, place, rows)
        return rows.new_zeros(()).expand(rows.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Pass the gradient on."""
        return grads[0], None, None


def embedding(
    ids: Tensor, weight: Blocks, width: int, padding_idx: int | None = None, scale_grad_by_freq: bool = False
) -> Tensor:
    """``F.embedding`` block by block.

    Blocks that no id falls into are left out, unless their gradient is wanted: it is zero, and not missing, since
    without tiling an optimizer would decay those rows too.

    Args:
        ids: Indices of any shape.
        weight: ``(rows, width)`` in blocks of whole rows.
        width: Elements of a row.
        padding_idx: The row that gets no gradient, or None.
        scale_grad_by_freq: Divide a row's gradient by its number of uses.

    Raises:
        IndexError: If an id is out of range.
    """
    flat, count = ids.reshape(-1), weight.grid.rows[-1][1]
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= count):
        raise IndexError("index out of range in self")  # torch's own words
    if padding_idx is not None and padding_idx < 0:
        padding_idx += count
    learns = torch.is_grad_enabled() and weight.requires_grad
    out: Tensor | None = None
    places, rows = [], []
    for number, (low, high) in enumerate(weight.grid.rows):
        place = ((flat >= low) & (flat < high)).nonzero().view(-1)
        if not learns and not place.numel() and (out is not None or number + 1 < len(weight.grid.rows)):
            continue
        inside = padding_idx - low if padding_idx is not None and low <= padding_idx < high else None
        found = weight.use(number, _lookup, flat[place] - low, inside, scale_grad_by_freq)
        if out is None:
            out = torch.empty((flat.numel(), width), dtype=found.dtype, device=found.device)
        places.append(place)
        rows.append(apply(_Fill, found, place, (out,)))
        del found
    assert out is not None
    whole: Tensor = apply(_Scatter, places, (out,), *rows)
    return whole.view(*ids.shape, width)


def _lookup(block: Tensor, ids: Tensor, padding_idx: int | None, scale_grad_by_freq: bool) -> Tensor:
    return F.embedding(ids, block, padding_idx, scale_grad_by_freq=scale_grad_by_freq)


def whole(weight: Blocks, shape: tuple[int, ...]) -> Tensor:
    """Return the weight as one new tensor that is connected to its blocks.

    Args:
        weight: The weight.
        shape: Its shape.
    """
    grid = weight.grid

    def row(number: int) -> Tensor:
        columns = [weight.use(grid.index(number, c), torch.clone) for c in range(len(grid.columns))]
        return columns[0] if len(columns) == 1 else torch.cat(columns, 1)

    return joined(row, len(grid.rows), shape[0], 0)
