"""A module that is built without memory, as the planner sees it.

Note [Without memory]
~~~~~~~~~~~~~~~~~~~~~
On torch's meta device tensors have shapes and no content, so a model of any size is built in moments, and a forward of
it tells its operations and what it saves for backward. Code that looks at values while it builds cannot run there; that
is said by name. The units and flat buffers are cut by the very functions that the engine cuts them with.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_zinf.config import MemoryConfig, Precision
from lightning_zinf.engine.drafts import check_parameters, describe_model, draft_buffers
from lightning_zinf.engine.units import find_units
from lightning_zinf.memory.planner import ModelSpec
from lightning_zinf.planning.hugging_face import ConfigError


def import_class(name: str) -> type[nn.Module]:
    """Return the class that ``package.module.Class`` or ``path/to/file.py:Class`` names.

    Raises:
        ConfigError: If there is none.
    """
    try:
        if ":" in name:
            path, _, attribute = name.partition(":")
            folder = str(Path(path).resolve().parent)
            if folder not in sys.path:
                sys.path.insert(0, folder)
            module = importlib.import_module(Path(path).stem)
        else:
            path, _, attribute = name.rpartition(".")
            if "" not in sys.path:
                sys.path.insert(0, "")
            module = importlib.import_module(path)
        found = getattr(module, attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"the class {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"{name!r} is no torch.nn.Module")
    return found


def build_on_meta(kind: type[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """Build a module, and what its ``configure_model`` makes, on the meta device.

    Raises:
        ConfigError: If its code does not run there.
    """
    try:
        with torch.device("meta"):
            module = kind(**arguments)
            configure = getattr(module, "configure_model", None)
            if configure is not None:
                configure()
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(
            f"{kind.__name__} cannot be built on torch's meta device, which has no memory: "
            f"{type(error).__name__}: {error}. Code that looks at values while it builds has to run elsewhere; "
            "or give --layers, --hidden and --heads"
        ) from error
    return module


def describe_module(
    module: nn.Module,
    precision: Precision,
    *,
    name: str,
    tokens: int | None = None,
    unit_bytes: int | None = None,
    units: Sequence[str] = (),
) -> ModelSpec:
    """Return what the planner goes by.

    Args:
        module: The module, on any device.
        precision: What it is trained in.
        name: For the reader.
        tokens: Tokens of a sample, where it has no ``example_input_array`` to run it with: operations are then taken as
            2 for each weight and token, and activations are not known.
        unit_bytes: As ``memory.unit_bytes``.
        units: Class names of modules to take as units, as the strategy's option.

    Raises:
        ConfigError: If its parameters cannot be partitioned.
    """
    try:
        check_parameters(module, set(), planned=True)
        plans = find_units(module, unit_bytes or MemoryConfig().unit_bytes, tuple(units))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    spec = describe_model(draft_buffers(plans, precision, ()), name)
    example = getattr(module, "example_input_array", None)
    ran = None if example is None else _run_on_meta(module, example, precision)
    if ran is not None:
        flops, saved, samples = ran
        total = spec.numel or 1
        # Spread over the units by their parameters: only the sums decide whether it fits.
        shared = (
            replace(u, flops=flops / samples * u.numel / total, saved_bytes=saved / samples * u.numel / total)
            for u in spec.units
        )
        return replace(spec, units=tuple(shared), tokens=tokens or 1, measured=True)
    count = tokens or 1
    return replace(spec, units=tuple(replace(u, flops=2.0 * u.numel * count) for u in spec.units), tokens=count)


def _run_on_meta(module: nn.Module, example: Any, precision: Precision) -> tuple[float, float, int] | None:
    """Run a forward without memory; return its operations, the bytes that it saves, and its samples."""
    from torch.utils.flop_counter import FlopCounterMode

    parameters = {id(p) for p in module.parameters()}
    seen: set[int] = set()
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in parameters and id(base) not in seen:
            seen.add(id(base))
            kept.append(base)
            saved += base.numel() * base.element_size()
        return tensor

    kept: list[Tensor] = []  # so that no id is used twice
    inputs = example if isinstance(example, (tuple, list)) else (example,)
    with suppress(Exception):  # what cannot run without values is not counted, and the plan says so
        moved = [x.to("meta") if isinstance(x, Tensor) else x for x in inputs]
        low = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        module = module.to("meta")
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            FlopCounterMode(display=False) as counter,
            torch.autocast("cpu", dtype=low or torch.bfloat16, enabled=low is not None),
        ):
            module(*moved)
        samples = next(len(x) for x in inputs if isinstance(x, Tensor))
        return float(counter.get_total_flops()), float(saved), samples
    return None


def from_transformers(config: Mapping[str, Any], precision: Precision, tokens: int) -> ModelSpec:
    """Build a model of the transformers package, which must be installed, without memory."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(f"transformers cannot be imported: {error}") from error
    settings = dict(config)
    kind = settings.pop("model_type")
    try:
        with torch.device("meta"):
            made = transformers.AutoConfig.for_model(kind, **settings)
            module = transformers.AutoModel.from_config(made)
    except Exception as error:  # whatever the package raises
        raise ConfigError(f"transformers cannot build a {kind!r}: {type(error).__name__}: {error}") from error
    return describe_module(module.float(), precision, name=str(kind), tokens=tokens)
