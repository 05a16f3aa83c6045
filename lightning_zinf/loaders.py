"""Training data whose length is not known beforehand, over several ranks.

Loaders with a length get a DistributedSampler from Lightning, which gives every rank the same number of batches. What
an IterableDataset yields is its own business: one rank may run out before the others, who would wait for its gradients
for ever. So before every batch the ranks tell each other whether they have one, and the epoch ends for all when it ends
for the first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any


class EvenLoader:
    """Ends for all ranks when one of them has no more batches.

    Args:
        loader: This rank's loader; everything but iteration is left to it.
        agree: Tells all ranks whether this one has a batch; returns whether all have.
    """

    def __init__(self, loader: Any, agree: Callable[[bool], bool]) -> None:
        self._loader = loader
        self._agree = agree

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # a copy that is being made
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        missing = object()
        while True:
            batch = next(batches, missing)
            if not self._agree(batch is not missing):
                if batch is not missing:
                    warnings.warn(
                        "another rank has no more training batches, so the epoch ends here for all: batches that this "
                        "rank has left are not used. Give all ranks the same number to use all data",
                        stacklevel=2,
                    )
                return
            yield batch


def needs_agreement(loader: Any) -> bool:
    """Whether nobody knows how many batches a loader has."""
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        return True
    return False
