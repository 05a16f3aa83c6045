"""One optimizer step of one flat buffer: what to do, and doing it.

Note [The update]
~~~~~~~~~~~~~~~~~
A step is captured when ``optimizer.step()`` is called: gradients, learning rates and the other hyper-parameters as they
are then, and the clip factor. Applied now or later, it gives the same bits. Parameters without a gradient are skipped,
as torch.optim skips them: no moments decay, and their step count stands still.

What a step computes is the business of a rule: the fused kernel for Adam (``adam.py``), the user's own optimizer class
on pieces of parameters for any other that works element by element (``elementwise.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_zinf.engine.gradients import Piece, Source
from lightning_zinf.memory.state import Record, State
from lightning_zinf.ops import join_master, reference, split_master

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer

Group = dict[str, Any]


class Update(ABC):
    """An optimizer step of this rank's shard of one buffer.

    Attributes:
        done: Elements of the shard that have been updated already: a read that fails amid an update stops it, and it
            goes on from there when it is tried again.
        average: Weight of the old average in the running average of the masters that this step brings up to date, or
            None if it does not.
        source: What has the values of the gradients, if that is not themselves.
        touches: Numbers of the parameters whose weights it changes; None for all.
        changes_rest: Whether applying it changes state that is no plane (others change that when they are captured).
    """

    changes_rest = False
    done: int = 0
    average: float | None = None
    source: Source | None = None
    touches: Collection[int] | None = None

    def apply(self, weight: Tensor, state: State) -> None:
        """Update the shard, record by record.

        Args:
            weight: Its weight plane, updated in place.
            state: Its other planes, updated in place.
        """
        with torch.no_grad(), nullcontext() if self.source is None else self.source.loaded():
            for record in state.records(self.done):
                part = weight[record.start : record.stop]
                self.update_record(part, record)
                if self.average is not None and "ema" in record.planes:
                    # As torch.optim.swa_utils.get_ema_avg_fn rounds it.
                    new = master_of(part, record.planes) * (1 - self.average)
                    record.planes["ema"].mul_(self.average).add_(new)
                self.done = record.stop
            self.finish()
        if self.source is not None:
            self.source.done()

    def needs(self, planes: Sequence[str]) -> bool:
        """Whether it reads or changes any of these planes of the shard."""
        return bool(planes)

    @abstractmethod
    def update_record(self, weight: Tensor, record: Record) -> None:
        """Update a range of elements.

        Args:
            weight: Their weights.
            record: Their other planes.
        """

    def finish(self) -> None:  # noqa: B027  # most have nothing to do
        """All records are done."""


class Rule(ABC):
    """What the steps of one optimizer do.

    Attributes:
        name: The name of the optimizer's class.
    """

    name: str

    @abstractmethod
    def planes(self, group: Group) -> tuple[str, ...]:
        """Return the names of the tensors of a parameter's shape that the optimizer keeps for parameters of a group."""

    @abstractmethod
    def capture(
        self,
        buffer: FlatBuffer,
        pieces: Sequence[Piece],
        groups: Mapping[int, Group],
        grad_scale: float,
        clip_value: float | None,
    ) -> Update:
        """Return the step of a buffer as it is to be taken now.

        Args:
            buffer: The buffer.
            pieces: Gradients of its parameters.
            groups: The param group of each parameter of the buffer that is the optimizer's.
            grad_scale: Factor on every gradient.
            clip_value: Largest absolute value of a gradient after scaling, or None.
        """

    @abstractmethod
    def entry(self, buffer: FlatBuffer, index: int) -> tuple[dict[str, Any], tuple[str, ...]] | None:
        """Return what is not a plane of a parameter's state, and which planes it has; None if it has no state yet."""

    @abstractmethod
    def restore(self, buffer: FlatBuffer, index: int, entry: Mapping[str, Any], group: Group) -> None:
        """Take in what is not a plane of a parameter's state, from torch.optim's layout; ``{}`` for no state.

        Raises:
            ValueError: If it is the state of another kind of optimizer.
        """

    def refuse_another(self, entry: Iterable[str], group: Group) -> None:
        """Raise ValueError if what a parameter's state has is not what the optimizer keeps, unless it has nothing."""
        found = sorted(entry)
        missing = [p for p in self.planes(group) if p not in found]
        if found and missing:
            raise ValueError(
                f"the saved optimizer state has {found}, but {self.name} keeps {missing}, which it lacks: it was saved "
                "by another optimizer. Take that one to go on, or load the weights alone to begin anew (`zinf "
                "consolidate --weights-only`, load_from_checkpoint)"
            )


def master_of(weight: Tensor, planes: Mapping[str, Tensor]) -> Tensor:
    """Return the float32 masters of a range of elements: a plane of theirs, or joined into new memory.

    Args:
        weight: Their weight plane.
        planes: Their other planes.
    """
    if "master" in planes:
        return planes["master"]
    if "residual" not in planes:
        return weight
    master = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    (join_master if weight.is_cpu else reference.join_master)(weight, planes["residual"], master)
    return master


def set_master(weight: Tensor, planes: Mapping[str, Tensor], master: Tensor) -> None:
    """Set the masters of a range of elements, and the weights that compute uses, from float32."""
    if "residual" in planes:
        (split_master if weight.is_cpu else reference.split_master)(master, weight, planes["residual"])
        return
    if "master" in planes and planes["master"].data_ptr() != master.data_ptr():
        planes["master"].copy_(master)
    if weight.data_ptr() != master.data_ptr():
        weight.copy_(master)


def clip_coefficient(max_norm: float, total_norm: float) -> float:
    """Return the factor of ``torch.nn.utils.clip_grad_norm_``, in float32 arithmetic as there."""
    norm = torch.tensor(total_norm, dtype=torch.float32)
    return float(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
