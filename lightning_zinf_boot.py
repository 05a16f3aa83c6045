"""Makes ``Trainer(strategy="zinf")`` work with no import of ours.

Note [Boot]
~~~~~~~~~~~
Lightning looks strategy names up in a registry that it fills itself, and reads no entry points for it. But it always
imports torch first, and torch calls the entry points of the group ``torch.backends`` at the end of ``import torch``.
So ``autoload`` runs there and puts a finder in front that lets Lightning's ``strategies`` module load as ever and then
adds our names to its registry. The names are lazy: ``lightning_zinf`` is imported when a Trainer with one of them is
built.

Whatever raises here would break ``import torch`` for everybody, so this module imports the standard library only and
keeps every error to itself, but for a log line. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns torch's call off;
``import lightning_zinf`` does the same.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HOMES = {
    "lightning.pytorch.strategies": "lightning_zinf.lightning",
    "pytorch_lightning.strategies": "lightning_zinf.pl",
}
"""Lightning's modules that have a strategy registry, and where our classes for them live."""

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "zinf": ("ZeRO-Infinity: everything on the fastest tier that has room for it", {}),
    "zinf_stage_1": ("ZeRO stage 1: optimizer state is partitioned", {"stage": 1}),
    "zinf_stage_2": ("ZeRO stage 2: optimizer state and gradients are partitioned", {"stage": 2}),
    "zinf_stage_3": ("ZeRO stage 3: optimizer state, gradients and weights are partitioned", {"stage": 3}),
    "zinf_stage_1_offload": (
        "ZeRO stage 1 with optimizer state in host memory",
        {"stage": 1, "offload_optimizer": "cpu"},
    ),
    "zinf_stage_2_offload": (
        "ZeRO stage 2 with optimizer state in host memory",
        {"stage": 2, "offload_optimizer": "cpu"},
    ),
    "zinf_stage_3_offload": (
        "ZeRO stage 3 with weights and optimizer state in host memory",
        {"stage": 3, "offload_params": "cpu", "offload_optimizer": "cpu"},
    ),
    "zinf_spawn": ("ZeRO-Infinity in processes that this one spawns", {"start_method": "spawn"}),
    "zinf_notebook": ("ZeRO-Infinity in processes forked from a notebook", {"start_method": "fork"}),
    "zinf_stage_3_offload_nvme": (
        "ZeRO stage 3 with weights and optimizer state on NVMe",
        {"stage": 3, "offload_params": "nvme", "offload_optimizer": "nvme"},
    ),
}
"""Registered names: a description, and the options that differ from the defaults."""


def register(registry: Any, home: str) -> None:
    """Add every preset to one of Lightning's strategy registries.

    Args:
        registry: The ``StrategyRegistry`` of a Lightning package.
        home: The module that has our classes for that package.
    """

    def build(**options: Any) -> Any:
        from importlib import import_module

        return import_module(home).ZinfStrategy(**options)

    for name, (description, options) in PRESETS.items():
        if name not in registry:
            registry.register(name, build, description=description, **options)


def _register_quietly(module: ModuleType) -> None:
    try:
        register(module.StrategyRegistry, HOMES[module.__name__])
    except Exception as error:
        _log(f"could not register the zinf strategies in {module.__name__}: {error!r}")


def _log(message: str) -> None:
    try:
        import logging

        logging.getLogger("lightning_zinf").warning(message)
    except Exception:  # see the note: nothing may get out of here
        pass


class Finder(MetaPathFinder):
    """Finds what the other finders find, and has Lightning's ``strategies`` modules registered once they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of one of Lightning's ``strategies`` modules; None for any other, at once."""
        if fullname not in HOMES:
            return None
        try:
            spec = self._find_elsewhere(fullname, path, target)
            if spec is not None and spec.loader is not None:
                _register_after_loading(spec.loader)
            return spec
        except Exception as error:
            _log(f"could not prepare {fullname} for the zinf strategies: {error!r}")
            return None

    def _find_elsewhere(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None


def _register_after_loading(loader: Any) -> None:
    # The loader object belongs to this one module. It is patched, not replaced, so that inspect and importlib.resources
    # keep finding the methods they look for; and the patch takes itself off.
    execute: Callable[[ModuleType], None] = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module
        execute(module)
        _register_quietly(module)

    loader.exec_module = exec_module


def autoload() -> None:
    """Register the presets wherever Lightning is loaded, and wherever it is going to be. Never raises."""
    try:
        for name in HOMES:
            module = sys.modules.get(name)
            if module is not None and hasattr(module, "StrategyRegistry"):
                _register_quietly(module)
        if not any(isinstance(finder, Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, Finder())
    except Exception as error:
        _log(f"could not register the zinf strategies: {error!r}")
