"""Pure arithmetic: where a matrix is cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_zinf.layout import Part

_STEPS = (64, 32, 16, 8, 4, 2, 1)
"""Tiles have a multiple of the largest of these that fits: matrix products like whole vectors."""

Range = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """A matrix cut into blocks, row of blocks by row of blocks.

    Attributes:
        rows: Half-open range of rows of each row of blocks.
        columns: Half-open range of columns of each column of blocks.
    """

    rows: tuple[Range, ...]
    columns: tuple[Range, ...]

    @classmethod
    def build(cls, height: int, width: int, row_step: int, column_step: int) -> Grid:
        """Cut a matrix into blocks of ``row_step`` x ``column_step``; those at its ends may be smaller."""
        return cls(_ranges(height, row_step), _ranges(width, column_step))

    @classmethod
    def splits(cls, height: int, width: int, row_splits: int, column_splits: int) -> Grid:
        """Cut a matrix into at most that many rows and columns of blocks, as ``torch.chunk`` does."""
        return cls.build(height, width, -(-height // row_splits), -(-width // column_splits))

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.rows) * len(self.columns)

    def index(self, row: int, column: int) -> int:
        """Return the number of a block."""
        return row * len(self.columns) + column

    def parts(self) -> list[Part]:
        """Return the elements of each block."""
        width = self.columns[-1][1]
        found = []
        for top, bottom in self.rows:
            for left, right in self.columns:
                if right - left == width:
                    numel = (bottom - top) * width
                    found.append(Part(top * width, numel, numel, 1))
                else:
                    found.append(Part(top * width + left, right - left, width, bottom - top))
        return found

    def shapes(self, rest: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the shape of each block.

        Args:
            rest: The shape of what is one row of the matrix: kept where rows are not cut.
        """
        whole = len(self.columns) == 1
        return [(b - t, *(rest if whole else (r - lo,))) for t, b in self.rows for lo, r in self.columns]


def _ranges(size: int, step: int) -> tuple[Range, ...]:
    return tuple((low, min(low + step, size)) for low in range(0, size, step))


def _rounded(steps: int) -> int:
    unit = next(u for u in _STEPS if u <= steps)
    return steps // unit * unit


def fit(height: int, width: int, itemsize: int, limit: int, *, columns_first: bool, both: bool) -> Grid | None:
    """Return a grid whose blocks have at most ``limit`` bytes, of whole rows (or columns) where possible.

    Args:
        height: Rows of the matrix.
        width: Its columns.
        itemsize: Bytes of an element.
        limit: Most bytes of a block.
        columns_first: Cut columns apart rather than rows.
        both: Whether rows may be cut too where one alone is too large.

    Returns:
        The grid, or None if there is none.
    """
    across = height if columns_first else width  # elements of what is kept together
    along = width if columns_first else height
    line = across * itemsize
    if line <= limit:
        step, cut = _rounded(min(limit // line, along)), across
    elif both and limit >= itemsize:
        step, cut = 1, _rounded(limit // itemsize)
    else:
        return None
    return Grid.build(height, width, cut, step) if columns_first else Grid.build(height, width, step, cut)
