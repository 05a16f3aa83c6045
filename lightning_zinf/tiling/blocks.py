"""A weight in blocks, and results in pieces.

Note [Blocks and rooms]
~~~~~~~~~~~~~~~~~~~~~~~
An operator with a large weight runs block by block. What a block gives goes straight to its place in a tensor that is
made once (a *room*), so beside the result there is never more than one block's worth of it. Autograd sees for each
block a node that takes the block's part of the gradient, and one for the room, which cuts the gradient into views. So
backward goes block by block too: each block's weight is brought, its gradient is complete, and both can go before the
next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_zinf.tiling.grid import Grid


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Apply an autograd function (torch does not annotate its own way)."""
    return function.apply(*args)  # type: ignore[no-untyped-call,unused-ignore]


class Blocks(Protocol):
    """A weight in blocks."""

    grid: Grid

    @property
    def requires_grad(self) -> bool:
        """Whether it gets a gradient."""

    def use(self, index: int, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(block, *args)``; the block is there while it runs, and in its backward.

        Args:
            index: Number of the block.
            function: What to compute. It must not keep the block.
            args: More arguments.
        """


class Views:
    """Blocks that are views of a tensor.

    Args:
        weight: The tensor; of more than two dimensions if ``grid`` cuts no columns.
        grid: Where its matrix of the first against the other dimensions is cut.
    """

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        self.grid = grid
        self._weight = weight
        self._blocks: list[Tensor] = []

    @property
    def requires_grad(self) -> bool:
        """Whether the tensor does."""
        return self._weight.requires_grad

    def use(self, index: int, function: Callable[..., Any], *args: Any) -> Any:
        """See :meth:`Blocks.use`."""
        if not self._blocks:  # split, not slices: its backward is one concatenation
            rows = self._weight.split([high - low for low, high in self.grid.rows])
            widths = [high - low for low, high in self.grid.columns]
            self._blocks = list(rows) if len(widths) == 1 else [b for row in rows for b in row.split(widths, 1)]
        return function(self._blocks[index], *args)


class _Place(torch.autograd.Function):
    """Copy a piece to its place in a room."""

    @staticmethod
    def forward(ctx: Any, piece: Tensor, place: tuple[Tensor]) -> Tensor:
        """Return a stand-in of the piece's shape, so that its memory can go while autograd knows it."""
        place[0].copy_(piece)
        return piece.new_zeros(()).expand(piece.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Pass the gradient on."""
        return grads[0], None


class _Whole(torch.autograd.Function):
    """A room, once all of its pieces are in place."""

    @staticmethod
    def forward(ctx: Any, room: Room, bias: Tensor | None, *pieces: Tensor) -> Tensor:
        """Return the room."""
        ctx.places = room.places
        ctx.bias = None if bias is None else bias.dtype
        return room.memory

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Cut the gradient into views; the bias gets its sum, whole, since a sum of a part may round otherwise."""
        grad = grads[0]
        bias = None
        if ctx.needs_input_grad[1]:
            bias = grad.reshape(-1, grad.size(-1)).sum(0).to(ctx.bias)
        return (None, bias, *(grad.narrow(*place) for place in ctx.places))


class Room:
    """A tensor that pieces along one dimension are put into.

    Args:
        shape: Its shape.
        like: A tensor with its dtype and device.
        dim: The dimension that pieces are parts of.
    """

    def __init__(self, shape: Sequence[int], like: Tensor, dim: int) -> None:
        self.memory = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
        self.dim = dim
        self.places: list[tuple[int, int, int]] = []
        self._pieces: list[Tensor] = []

    def put(self, piece: Tensor) -> None:
        """Put the next piece behind those that are there."""
        start = self.places[-1][1] + self.places[-1][2] if self.places else 0
        place = (self.dim, start, piece.size(self.dim))
        self.places.append(place)
        self._pieces.append(apply(_Place, piece, (self.memory.narrow(*place),)))

    def whole(self, bias: Tensor | None = None) -> Tensor:
        """Return the tensor, connected to its pieces, and to a bias that has been added along the last dimension."""
        whole: Tensor = apply(_Whole, self, bias, *self._pieces)
        self._pieces.clear()
        return whole


def joined(pieces: Callable[[int], Tensor], count: int, size: int, dim: int, bias: Tensor | None = None) -> Tensor:
    """Return pieces side by side, computed one after the other.

    Args:
        pieces: Computes a piece.
        count: How many there are, two at least.
        size: Their size together along ``dim``.
        dim: The dimension that they are parts of.
        bias: What has been added to them along the last dimension and is still to get its gradient, or None.
    """
    room: Room | None = None
    for number in range(count):
        piece = pieces(number)
        if room is None:
            shape = list(piece.shape)
            shape[dim] = size
            room = Room(shape, piece, dim)
        room.put(piece)
        del piece
    assert room is not None
    return room.whole(bias)
