"""What ``p.grad`` is while the gradient is elsewhere.

Note [Guards]
~~~~~~~~~~~~~
With several ranks a parameter's gradient is this rank's own until it is reduced, and a shard of everybody's after. With
an accelerator it is in host memory, where memory is short on NVMe, and under accumulation in bfloat16 most of it is in
a float32 sum. That is not what code that reads or scales ``p.grad`` (``torch.nn.utils.clip_grad_norm_``) takes it for,
and with None in its place such code would quietly do nothing. So a tensor is put there that answers what shape it has,
and raises for everything else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from lightning_zinf.parameters import METADATA, stand_in

_ALLOWED = METADATA | {getattr(Tensor, name).__get__ for name in ("dtype", "device", "is_cpu", "is_cuda", "grad_fn")}
P = ParamSpec("P")
R = TypeVar("R")
K = TypeVar("K", bound="KeptGradient")


class KeptGradient(Tensor):
    """Stands for a gradient that the strategy keeps elsewhere."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what the shape is; raise for every use of the values.

        Raises:
            RuntimeError: With what to use instead.
        """
        if func in _ALLOWED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(f"{getattr(func, '__name__', 'a function')}: {cls.why}")

    why = (
        "the zinf strategy keeps this gradient elsewhere (as shards over ranks, in host memory, on NVMe, or summed in "
        "float32), so p.grad has no values. Clip with Trainer(gradient_clip_val=...) or "
        "trainer.strategy.clip_grad_norm_(max_norm), and read the norm with trainer.strategy.grad_norm()"
    )
    """What those who use the values are told."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return "KeptGradient(kept by the zinf strategy)"


class SpentGradient(KeptGradient):
    """Stands for a gradient that a step has used up, or for zeros, see ``spent.py``.

    Attributes:
        zeroed: Whether it has been zeroed in place.
    """

    zeroed = False
    why = (
        "an optimizer step of the zinf strategy has used this gradient up, or it has been set to zero, so p.grad has "
        "no values until the next backward: look at it before the step"
    )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Take note of ``zero_()``, which ``module.zero_grad(set_to_none=False)`` calls."""
        if func is Tensor.zero_:
            args[0].zeroed = True
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return "SpentGradient(used by a step of the zinf strategy)"


def guard(like: Tensor) -> Tensor:
    """Return what to put in ``like.grad``."""
    return guard_of(KeptGradient, like)


def guard_of(kind: type[K], like: Tensor) -> K:
    """Return what to put in ``like.grad``, of a class."""
    with torch._C.DisableTorchFunctionSubclass():
        value = stand_in(like.shape, like.dtype, like.device)
        made: K = torch.Tensor._make_subclass(kind, value, False)
    return made


def dropped(params: Sequence[nn.Parameter], guarded: set[int]) -> list[int]:
    """Return the parameters whose guard the user has taken away: their gradient is to go.

    Args:
        params: The parameters of a buffer.
        guarded: Indices of those that have been given guards.
    """
    return [index for index in guarded if not isinstance(params[index].grad, KeptGradient)]


def lift(params: Sequence[nn.Parameter], guarded: set[int]) -> list[int]:
    """Take the guards of parameters away; return those whose guard the user has taken away, see :func:`dropped`.

    Args:
        params: The parameters of a buffer.
        guarded: Indices of those that have guards; empty afterwards.
    """
    gone = dropped(params, guarded)
    for index in guarded.difference(gone):
        params[index].grad = None  # what comes in its place may have another dtype
    guarded.clear()
    return gone


def plainly(method: Callable[P, R]) -> Callable[P, R]:
    """Let a method look at ``p.grad`` of released parameters without going through their ``__torch_function__``."""

    @functools.wraps(method)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._C.DisableTorchFunctionSubclass():
            return method(*args, **kwargs)

    return plain
