"""Adam and AdamW, by the fused kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_zinf.engine.gradients import Piece
from lightning_zinf.memory.state import Record
from lightning_zinf.ops import AdamHyper, Segment, adam_update, cuda
from lightning_zinf.optim.update import Group, Rule, Update

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class AdamUpdate(Update):
    """An Adam step of this rank's shard of one buffer.

    Attributes:
        pieces: ``(first element in the shard, gradient, index of its hyper-parameters)``; gradients are contiguous, and
            where the update runs.
        hypers: Hyper-parameters that ``pieces`` refers to.
        grad_scale: Factor on every gradient: unscaling and clipping by norm in one.
        clip_value: Largest absolute value of a gradient after scaling, or None.
    """

    pieces: list[tuple[int, Tensor, int]] = field(default_factory=list)
    hypers: list[AdamHyper] = field(default_factory=list)
    grad_scale: float = 1.0
    clip_value: float | None = None

    def add(self, start: int, grad: Tensor, hyper: AdamHyper) -> None:
        """Add the gradient of the elements from ``start`` on."""
        if hyper not in self.hypers:
            self.hypers.append(hyper)
        self.pieces.append((start, grad, self.hypers.index(hyper)))

    def update_record(self, weight: Tensor, record: Record) -> None:
        """Run the kernel over a range of elements."""
        segments = [
            segment
            for start, grad, hyper in self.pieces
            if (segment := _cut(start, grad, hyper, record.start, record.stop)) is not None
        ]
        if not segments:
            return
        master = record.planes.get("master")
        (adam_update if weight.is_cpu else cuda.adam_update)(
            weight if master is None else master,
            record.planes.get("residual"),
            record.planes["exp_avg"],
            record.planes["exp_avg_sq"],
            segments,
            self.hypers,
            grad_scale=self.grad_scale,
            clip_value=self.clip_value,
        )
        if master is not None:
            weight.copy_(master)


def _cut(offset: int, grad: Tensor, hyper: int, start: int, stop: int) -> Segment | None:
    """Return the part of a gradient that falls into the elements ``[start, stop)`` of the shard."""
    numel = grad.numel()
    low, high = max(start, offset), min(stop, offset + numel)
    if low >= high:
        return None
    flat = grad.view(-1)
    if high - low != numel:
        flat = flat[low - offset : high - offset]
    if flat.dtype == torch.float16:  # the kernel reads float32 and bfloat16
        flat = flat.float()
    return Segment(low - start, flat, hyper)


class AdamRule(Rule):
    """Steps of an Adam or AdamW.

    Args:
        kind: The optimizer's class.
    """

    def __init__(self, kind: type) -> None:
        self._decoupled = issubclass(kind, torch.optim.AdamW)
        self.name = "AdamW" if self._decoupled else "Adam"

    def planes(self, group: Group) -> tuple[str, ...]:
        """The two moments."""
        return MOMENTS

    def capture(
        self,
        buffer: FlatBuffer,
        pieces: Sequence[Piece],
        groups: Mapping[int, Group],
        grad_scale: float,
        clip_value: float | None,
    ) -> Update:
        """Count the steps, and note the hyper-parameters."""
        buffer.need_planes(MOMENTS)
        update = AdamUpdate(grad_scale=grad_scale, clip_value=clip_value)
        hypers: dict[tuple[int, int], AdamHyper] = {}
        for piece in pieces:
            buffer.steps[piece.index] += 1
            key = (id(groups[piece.index]), buffer.steps[piece.index])
            if key not in hypers:
                hypers[key] = self.hyper_of(groups[piece.index], buffer.steps[piece.index])
            update.add(piece.start, piece.grad, hypers[key])
        return update

    def entry(self, buffer: FlatBuffer, index: int) -> tuple[dict[str, Any], tuple[str, ...]] | None:
        """The step count."""
        step = buffer.steps[index]
        return ({"step": torch.tensor(float(step))}, MOMENTS) if step else None

    def restore(self, buffer: FlatBuffer, index: int, entry: Mapping[str, Any], group: Group) -> None:
        """Take the step count in.

        Raises:
            ValueError: If it is the state of another kind of optimizer.
        """
        self.refuse_another(entry, group)
        buffer.steps[index] = int(entry.get("step", 0))

    def hyper_of(self, group: Group, step: int) -> AdamHyper:
        """Return the hyper-parameters of a param group for a parameter's ``step``-th update (counted from 1)."""
        beta1, beta2 = group["betas"]
        return AdamHyper(
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            step=step,
            decoupled=bool(group.get("decoupled_weight_decay", self._decoupled)),
            maximize=bool(group.get("maximize", False)),
        )


def is_fused_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the kernel stands for an optimizer's steps."""
    ours = (torch.optim.Adam, torch.optim.AdamW)
    kind: Any = type(optimizer)
    kind = getattr(kind, "_zinf_base", kind)
    return (
        isinstance(optimizer, ours)
        and kind.step in [k.step for k in ours]
        and not any(group.get("amsgrad") or group.get("differentiable") for group in optimizer.param_groups)
    )
