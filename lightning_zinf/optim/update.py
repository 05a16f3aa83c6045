"""One optimizer step of one flat buffer: what to do, and doing it.

Note [The update]
~~~~~~~~~~~~~~~~~
A step is captured when ``optimizer.step()`` is called: gradients, learning rates and the other hyper-parameters as they
are then, and the clip factor. Applied now or later, it gives the same bits. Parameters without a gradient are skipped,
as torch.optim skips them: no moments decay, and their step count stands still.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_zinf.memory.state import State
from lightning_zinf.ops import AdamHyper, Segment, adam_update, reference

SUPPORTED = (torch.optim.Adam, torch.optim.AdamW)


@dataclass
class Update:
    """An optimizer step of this rank's shard of one buffer.

    Attributes:
        pieces: ``(first element in the shard, gradient, index of its hyper-parameters)``; gradients are contiguous, and
            where the update runs.
        hypers: Hyper-parameters that ``pieces`` refers to.
        grad_scale: Factor on every gradient: unscaling and clipping by norm in one.
        clip_value: Largest absolute value of a gradient after scaling, or None.
        done: Elements of the shard that have been updated already: a read that fails amid an update stops it, and it
            goes on from there when it is tried again.
    """

    pieces: list[tuple[int, Tensor, int]] = field(default_factory=list)
    hypers: list[AdamHyper] = field(default_factory=list)
    grad_scale: float = 1.0
    clip_value: float | None = None
    done: int = 0

    def add(self, start: int, grad: Tensor, hyper: AdamHyper) -> None:
        """Add the gradient of the elements from ``start`` on."""
        if hyper not in self.hypers:
            self.hypers.append(hyper)
        self.pieces.append((start, grad, self.hypers.index(hyper)))

    def apply(self, weight: Tensor, state: State) -> None:
        """Run the fused kernel over the shard, record by record.

        Args:
            weight: Its weight plane, updated in place.
            state: Its other planes, updated in place.
        """
        with torch.no_grad():
            update = adam_update if weight.device.type == "cpu" else reference.adam_update
            for record in state.records(self.done):
                segments = [
                    segment
                    for start, grad, hyper in self.pieces
                    if (segment := _cut(start, grad, hyper, record.start, record.stop)) is not None
                ]
                if segments:
                    update(
                        weight[record.start : record.stop],
                        record.planes.get("residual"),
                        record.planes["exp_avg"],
                        record.planes["exp_avg_sq"],
                        segments,
                        self.hypers,
                        grad_scale=self.grad_scale,
                        clip_value=self.clip_value,
                    )
                self.done = record.stop


def _cut(offset: int, grad: Tensor, hyper: int, start: int, stop: int) -> Segment | None:
    """Return the part of a gradient that falls into the elements ``[start, stop)`` of the shard."""
    numel = grad.numel()
    low, high = max(start, offset), min(stop, offset + numel)
    if low >= high:
        return None
    flat = grad.view(-1)
    if high - low != numel:
        flat = flat[low - offset : high - offset]
    return Segment(low - start, flat, hyper)


def hyper_of(group: dict[str, Any], step: int, kind: type) -> AdamHyper:
    """Return the hyper-parameters of a param group for a parameter's ``step``-th update (counted from 1)."""
    beta1, beta2 = group["betas"]
    decoupled = bool(group.get("decoupled_weight_decay", issubclass(kind, torch.optim.AdamW)))
    return AdamHyper(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        step=step,
        decoupled=decoupled,
        maximize=bool(group.get("maximize", False)),
    )


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that the fused update cannot stand for.

    Raises:
        ValueError: With the optimizer's name, the reason, and what to use instead.
    """
    kind = type(optimizer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    base = next((c for c in SUPPORTED if isinstance(optimizer, c)), None)
    if base is None:
        raise ValueError(
            "the zinf strategy updates flat shards with its own Adam kernel, so it takes torch.optim.Adam and "
            f"torch.optim.AdamW; configure_optimizers returned {name}. Optimizers that need whole matrices (LBFGS, "
            "Muon, Adafactor, Shampoo) cannot work on shards; other elementwise ones are not supported yet."
        )
    if kind.step not in (base.step, torch.optim.Adam.step, torch.optim.AdamW.step):
        raise ValueError(
            f"{name} overrides step() of torch.optim.{base.__name__}, which the zinf strategy would not run: use "
            f"torch.optim.{base.__name__} itself"
        )
    for group in optimizer.param_groups:
        for option in ("amsgrad", "differentiable"):
            if group.get(option):
                raise ValueError(f"{name}(..., {option}=True) is not supported by the zinf strategy: set it to False")


def clip_coefficient(max_norm: float, total_norm: float) -> float:
    """Return the factor of ``torch.nn.utils.clip_grad_norm_``, in float32 arithmetic as there."""
    norm = torch.tensor(total_norm, dtype=torch.float32)
    return float(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
