"""The precision plugin: autocast, and clipping that knows where the gradients are.

Lightning's clipping goes through the precision plugin, which it never asks the strategy for. So the strategy swaps
whatever plugin it is given for this one, which holds a reference to the strategy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor

from lightning_zinf import _compat
from lightning_zinf.config import Precision as Name
from lightning_zinf.optim.binding import binding_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.plugins.precision import Precision as _Base

    from lightning_zinf.strategy import ZinfStrategyBody
else:
    _Base = object

SUPPORTED: tuple[str, ...] = get_args(Name)


class ZinfPrecisionBody(_Base):
    """Precision plugin of the zinf strategy.

    ``32-true`` computes in the parameters' own dtype. ``bf16-mixed`` computes with bfloat16 weights under autocast and
    updates float32 master weights.

    Args:
        precision: ``32-true`` or ``bf16-mixed``.
        strategy: The strategy whose engine has the gradients.

    Raises:
        ValueError: If the strategy does not support the precision.
    """

    _package: str

    def __init__(self, precision: str, strategy: ZinfStrategyBody) -> None:
        if precision not in SUPPORTED:
            names = " and ".join(map(repr, SUPPORTED))
            raise ValueError(f"the zinf strategy supports Trainer(precision=...) of {names}, got {precision!r}")
        self.precision = cast(Name, precision)  # type: ignore[assignment,unused-ignore]
        self._strategy = strategy

    @contextmanager
    def forward_context(self) -> Iterator[None]:  # type: ignore[override,unused-ignore]
        """Autocast in mixed precision."""
        context: Any = nullcontext()
        if self.precision == "bf16-mixed":
            # Without the cache: it would keep casts of weights that have been released since.
            context = torch.autocast(self._strategy.root_device.type, dtype=torch.bfloat16, cache_enabled=False)
        with context:
            yield

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Run the module's backward, with room for its gradients."""
        engine = self._strategy.engine
        engine.before_backward()
        try:
            super().backward(tensor, model, optimizer, *args, **kwargs)
        except BaseException:
            engine.after_backward(failed=True)
            raise
        engine.after_backward()

    def clip_grad_by_norm(self, optimizer: Any, clip_val: int | float) -> None:
        """Clip by the norm over all gradients of an optimizer, wherever they are."""
        if not _compat.is_mock(self._package, _compat.unwrapped(optimizer)):
            binding_of(optimizer).clip_by_norm(float(clip_val))

    def clip_grad_by_value(self, optimizer: Any, clip_val: int | float) -> None:
        """Clip each element of the gradients of an optimizer, wherever they are."""
        if not _compat.is_mock(self._package, _compat.unwrapped(optimizer)):
            binding_of(optimizer).clip_by_value(float(clip_val))


def replace(plugin: Any, strategy: ZinfStrategyBody) -> Any:
    """Return our plugin for the precision that Lightning's ``plugin`` stands for.

    Raises:
        ValueError: If ``plugin`` does something that ours does not.
    """
    ours = strategy.precision_class()
    if isinstance(plugin, ours):
        return plugin if plugin._strategy is strategy else ours(plugin.precision, strategy)
    return ours(_precision_of(plugin, strategy), strategy)


def _precision_of(plugin: Any, strategy: ZinfStrategyBody) -> str:
    module = _compat.part(strategy.package, "plugins.precision")
    kind = type(plugin)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if getattr(plugin, "scaler", None) is not None:
        raise ValueError(
            f"the zinf strategy does not support the loss scaling of {name}(precision={plugin.precision!r}): "
            "pass Trainer(precision='bf16-mixed'), which needs none"
        )
    if plugin.precision in SUPPORTED and kind not in (module.Precision, module.MixedPrecision):
        raise ValueError(
            f"the zinf strategy has a precision plugin of its own and cannot use {name}: "
            f"pass Trainer(precision=...) of {' or '.join(map(repr, SUPPORTED))} instead of a plugin"
        )
    return str(plugin.precision)
