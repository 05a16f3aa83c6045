"""Striping: how a range of bytes lies on several files.

Note [Stripes]
~~~~~~~~~~~~~~
Stripe ``k`` of a volume, ``stripe_bytes`` long, lies in file ``k % files``, after the stripes that the file has
already. So what is longer than a few stripes is read and written on all drives at once, and what is short takes turns.
Every drive gets the same share: a slow one sets the pace of all.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A stretch of a range that lies in one file.

    Attributes:
        file: Number of the file.
        offset: Where it begins in the file.
        start: Where it begins in the range.
        nbytes: How long it is.
    """

    file: int
    offset: int
    start: int
    nbytes: int


def cut(offset: int, nbytes: int, files: int, stripe_bytes: int) -> list[Piece]:
    """Cut a range of a volume into pieces, in order; one piece if there is one file.

    Args:
        offset: Where the range begins in the volume.
        nbytes: How long it is.
        files: Number of files.
        stripe_bytes: Length of a stripe.
    """
    if files == 1:
        return [Piece(0, offset, 0, nbytes)]
    pieces: list[Piece] = []
    start = 0
    while start < nbytes:
        stripe, inside = divmod(offset + start, stripe_bytes)
        length = min(stripe_bytes - inside, nbytes - start)
        pieces.append(Piece(stripe % files, stripe // files * stripe_bytes + inside, start, length))
        start += length
    return pieces


def share(nbytes: int, file: int, files: int, stripe_bytes: int) -> int:
    """Return how many bytes of a volume of ``nbytes`` lie in one of its files."""
    rows, rest = divmod(nbytes, files * stripe_bytes)
    return rows * stripe_bytes + min(max(rest - file * stripe_bytes, 0), stripe_bytes)
