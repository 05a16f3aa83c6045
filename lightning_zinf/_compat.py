"""What we need of Lightning that is private, or that exists once for each of its two packages.

``lightning.pytorch`` and ``pytorch_lightning`` are textual mirrors with classes of their own. Everything here takes the
package's name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_zinf.parameters import owner_of, refuse_meta


def part(package: str, name: str) -> Any:
    """Return the submodule ``name`` of a Lightning package."""
    return importlib.import_module(f"{package}.{name}")


def is_mock(package: str, optimizer: object) -> bool:
    """Whether an optimizer stands for ``configure_optimizers`` having returned None."""
    return isinstance(optimizer, part(package, "core.optimizer")._MockOptimizer)


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the user's optimizer that a LightningOptimizer may wrap."""
    inner: torch.optim.Optimizer = getattr(optimizer, "_optimizer", optimizer)
    return inner


def instances_of(package: str, callbacks: Iterable[object], names: Iterable[str]) -> list[str]:
    """Return the class names of those callbacks that are one of Lightning's named callbacks."""
    module = part(package, "callbacks")
    kinds = tuple(kind for name in names if (kind := getattr(module, name, None)) is not None)
    return [type(callback).__name__ for callback in callbacks if isinstance(callback, kinds)]


def looks_at_gradients(package: str, trainer: Any, module: Any) -> bool:
    """Whether code between backward and the optimizer step may want to see or change all gradients.

    Args:
        package: The Lightning package.
        trainer: The Trainer.
        module: Its LightningModule.
    """
    return bool(trainer.gradient_clip_val) or sees_gradients(package, trainer, module)


def sees_gradients(package: str, trainer: Any, module: Any) -> bool:
    """Whether code of the user's may run between backward and clipping, or instead of it; arguments as above."""
    overridden = part(package, "utilities.model_helpers").is_overridden
    hooks = ("on_after_backward", "on_before_optimizer_step")
    return any(overridden(hook, module) for hook in (*hooks, "configure_gradient_clipping", "backward")) or any(
        overridden(hook, callback) for hook in hooks for callback in trainer.callbacks
    )


def zeroes_itself(package: str, module: Any) -> bool:
    """Whether gradients are zeroed between steps by code of the user's, if they are, and not by Lightning's loop."""
    overridden = part(package, "utilities.model_helpers").is_overridden
    return not module.automatic_optimization or overridden("optimizer_zero_grad", module)


def needs_whole_checkpoints(trainer: Any) -> bool:
    """Whether a checkpoint is used as soon as it has been saved: linked to as the last one, or sent to a logger."""
    links = any(getattr(callback, "save_last", None) == "link" for callback in trainer.checkpoint_callbacks)
    sends = any(
        getattr(logger, "_log_model", None) == "all" or getattr(logger, "_log_model_checkpoints", False)
        for logger in trainer.loggers
    )
    return links or sends


def tell_scaler(scaler: Any, optimizer: torch.optim.Optimizer, found_inf: bool) -> None:
    """Tell a GradScaler, whose own look at ``p.grad`` finds nothing, what its ``update`` has to go by."""
    device = scaler._scale.device
    found = torch.full((), float(found_inf), device=device)
    scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {device: found}


def restore_finetuning(package: str, trainer: Any) -> None:
    """Give optimizers the param groups that a finetuning callback had added to them before the checkpoint.

    The callback does so in ``on_fit_start``, which for strategies that load after setup has passed when it gets its
    state.
    """
    kind = part(package, "callbacks").BaseFinetuning
    for callback in trainer.callbacks:
        if isinstance(callback, kind) and getattr(callback, "_restarting", False):
            callback.on_fit_start(trainer, trainer.lightning_module)


def keep_samplers(trainer: Any) -> None:
    """Let one process train on the batches that it would have without a strategy.

    A Trainer whose strategy may be distributed swaps the sampler of every DataLoader for a DistributedSampler, which
    shuffles training data whether the user asked for it or not.
    """
    trainer._accelerator_connector.use_distributed_sampler = False


def before_batches(trainer: Any, call: Callable[[], None]) -> None:
    """Have ``call`` made before each training batch is fetched.

    No hook of Lightning's comes as early: a checkpoint that is saved here goes on with this batch. And Lightning 2.6
    broadcasts a flag around the strategy (SIGTERM) right after.
    """
    loop = trainer.fit_loop.epoch_loop

    def call_and_advance(data_fetcher: Any) -> None:
        call()
        type(loop).advance(loop, data_fetcher)

    loop.advance = call_and_advance


def stop_if_terminated(package: str, trainer: Any) -> None:
    """End training if SIGTERM has come, which Lightning would do after one more batch.

    Raises:
        SIGTERMException: Lightning's.
    """
    if trainer.received_sigterm:
        raise part(package, "utilities.exceptions").SIGTERMException


def convert_all_but_managed(root: nn.Module, dtype: torch.dtype) -> None:
    """Convert buffers, and parameters that no engine manages yet, to a floating dtype."""
    for module in root.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    for param in root.parameters():
        if owner_of(param) is None and param.dtype.is_floating_point:
            param.data = param.data.to(dtype)
    for module in filter(_is_lightning_module, root.modules()):
        module._dtype = dtype  # type: ignore[assignment]  # which LightningModule.dtype is


def move_all_but_parameters(root: nn.Module, device: torch.device) -> None:
    """Move buffers and torchmetrics, but no parameter, to ``device``, which ``LightningModule.device`` is from then on.

    ``root.to(device)`` would materialise every paged parameter.

    Raises:
        ValueError: If a buffer has no values.
    """
    from torchmetrics import Metric

    moved: dict[int, torch.Tensor] = {}
    for prefix, module in root.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                refuse_meta("buffer", f"{prefix}.{name}".lstrip("."), buffer)
                module._buffers[name] = moved.setdefault(id(buffer), buffer.to(device))
    for module in root.modules():
        if isinstance(module, Metric):
            with _parameters_hidden(module):
                module.to(device)
        elif _is_lightning_module(module):
            module._device = device  # type: ignore[assignment]  # what .to(device) would have noted


def _is_lightning_module(module: nn.Module) -> bool:
    return any(kind.__name__ == "_DeviceDtypeModuleMixin" for kind in type(module).__mro__)


@contextmanager
def _parameters_hidden(root: nn.Module) -> Iterator[None]:
    hidden = [(module, module._parameters) for module in root.modules() if module._parameters]
    for module, _ in hidden:
        module._parameters = {}
    try:
        yield
    finally:
        for module, parameters in hidden:
            module._parameters = parameters
