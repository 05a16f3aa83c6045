"""The precision plugin: dtypes, loss scaling, and clipping that knows where the gradients are.

Lightning's clipping goes through the precision plugin, which it never asks the strategy for. So the strategy swaps
whatever plugin it is given for this one, which holds a reference to the strategy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from lightning_utilities.core.apply_func import apply_to_collection
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
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class ZinfPrecisionBody(_Base):
    """Precision plugin of the zinf strategy.

    ``32-true`` computes in the parameters' own dtype. ``bf16-mixed`` and ``16-mixed`` compute with bfloat16 or float16
    weights under autocast and update float32 master weights; ``16-mixed`` scales the loss. ``bf16-true`` makes
    parameters, buffers and inputs bfloat16; the updates still act on float32 masters.

    Args:
        precision: One of these.
        strategy: The strategy whose engine has the gradients.
        scaler: Scales the loss in ``16-mixed``; a ``torch.amp.GradScaler`` for the strategy's device by default.

    Raises:
        ValueError: If the strategy does not support the precision.
    """

    _package: str

    def __init__(self, precision: str, strategy: ZinfStrategyBody, scaler: Any | None = None) -> None:
        if precision not in SUPPORTED:
            names = ", ".join(map(repr, SUPPORTED))
            raise ValueError(f"the zinf strategy supports Trainer(precision=...) of {names}, got {precision!r}")
        self.precision = cast(Name, precision)  # type: ignore[assignment,unused-ignore]
        self._strategy = strategy
        self.scaler = torch.amp.GradScaler("cuda") if scaler is None and precision == "16-mixed" else scaler

    # ------------------------------------------------------------------ dtypes

    @contextmanager
    def forward_context(self) -> Iterator[None]:  # type: ignore[override,unused-ignore]
        """Autocast in mixed precision."""
        context: Any = nullcontext()
        if self.precision in _AUTOCAST:
            # Without the cache: it would keep casts of weights that have been released since.
            device = self._strategy.root_device.type
            context = torch.autocast(device, dtype=_AUTOCAST[self.precision], cache_enabled=False)
        with context, self._default_dtype():
            yield

    @contextmanager
    def _default_dtype(self) -> Iterator[None]:
        before = torch.get_default_dtype()
        if self.precision == "bf16-true":
            torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def tensor_init_context(self) -> Any:
        """Make bfloat16 tensors in ``bf16-true``."""
        return self._default_dtype()

    def module_init_context(self) -> Any:
        """Make bfloat16 parameters in ``bf16-true``."""
        return self._default_dtype()

    def convert_module(self, module: Any) -> Any:
        """Convert to bfloat16 in ``bf16-true``; what has float32 masters already stays, and computes in bfloat16."""
        if self.precision == "bf16-true":
            _compat.convert_all_but_managed(module, torch.bfloat16)
        return module

    def convert_input(self, data: Any) -> Any:
        """Convert floating tensors to bfloat16 in ``bf16-true``."""
        if self.precision != "bf16-true":
            return data
        return apply_to_collection(
            data, dtype=Tensor, function=lambda t: t.to(torch.bfloat16) if torch.is_floating_point(t) else t
        )

    # ------------------------------------------------------------------ steps

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        """Scale the loss in ``16-mixed``."""
        if self.scaler is not None:
            tensor = self.scaler.scale(tensor)
        scaled: Tensor = super().pre_backward(tensor, module)
        return scaled

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Run the closure and step; in ``16-mixed`` the step is left out if a gradient on any rank is not finite."""
        inner = _compat.unwrapped(optimizer)
        if self._wants_norm(model) and not _compat.is_mock(self._package, inner):
            binding_of(inner).wants_norm = True
        if self.scaler is None or not self.scaler.is_enabled() or _compat.is_mock(self._package, inner):
            if self._may_step_in_backward(model) and not _compat.is_mock(self._package, inner):
                binding_of(inner).early = True
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        binding = binding_of(inner)
        with binding.norm_ahead():
            result = closure()
        if result is None and model.automatic_optimization:  # there was no backward
            self._after_closure(model, optimizer)
            return result
        binding.unscale = 1.0 / self.scaler.get_scale()
        finite = math.isfinite(binding.grad_norm())
        self._after_closure(model, optimizer)
        stepped = None
        if finite:
            stepped = optimizer.step(**kwargs)
        else:
            binding.forget_scaling()
        _compat.tell_scaler(self.scaler, inner, not finite)
        self.scaler.update()
        return stepped

    def _may_step_in_backward(self, model: LightningModule) -> bool:
        """Whether a step may be taken unit by unit as gradients are complete."""
        engine, trainer = self._strategy.engine, model.trainer
        return (
            engine.config.overlap.update == "auto"
            and engine.may_update_early
            and self.scaler is None
            and model.automatic_optimization
            and len(self._strategy.optimizers) == 1
            and not _compat.looks_at_gradients(self._package, trainer, model)
        )

    def _wants_norm(self, model: LightningModule) -> bool:
        """Whether the norm of the gradients of the coming backward will be wanted before anybody can change them."""
        trainer = model.trainer
        by_norm = bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm in (None, "norm")
        return (
            (by_norm or self.scaler is not None)
            and model.automatic_optimization
            and not _compat.sees_gradients(self._package, trainer, model)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale and when it will grow."""
        return {} if self.scaler is None else dict(self.scaler.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the loss scale from a checkpoint."""
        if self.scaler is not None:
            self.scaler.load_state_dict(state_dict)

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Run the module's backward, with room for its gradients."""
        engine = self._strategy.engine
        engine.before_backward()
        try:
            with self._strategy.explaining_memory():
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
        return plugin if plugin._strategy is strategy else ours(plugin.precision, strategy, plugin.scaler)
    return ours(_precision_of(plugin, strategy), strategy, getattr(plugin, "scaler", None))


def _precision_of(plugin: Any, strategy: ZinfStrategyBody) -> str:
    module = _compat.part(strategy.package, "plugins.precision")
    kind = type(plugin)
    if plugin.precision in SUPPORTED and kind not in (module.Precision, module.MixedPrecision, module.HalfPrecision):
        name = f"{kind.__module__}.{kind.__qualname__}"
        raise ValueError(
            f"the zinf strategy has a precision plugin of its own and cannot use {name}: pass Trainer(precision=...) of"
            f" {' or '.join(map(repr, SUPPORTED))} instead of a plugin"
        )
    return str(plugin.precision)
