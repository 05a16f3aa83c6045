"""Which parameters of a model are tiled, and how; what is too large and cannot be is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_zinf.tiling.grid import Grid, fit
from lightning_zinf.tiling.parameter import EagerForward

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NAMED = 10
"""Most parameters that a warning names."""
_MANY = 4096
"""Tiles of a model: beyond, a limit that is far too small is more likely than a model that needs so many."""


@dataclass(frozen=True, eq=False)
class TilePlan:
    """A parameter that is to be tiled.

    Attributes:
        name: Its fully qualified name.
        param: The parameter.
        grid: Where it is cut.
        modules: The modules that have it.
    """

    name: str
    param: nn.Parameter
    grid: Grid
    modules: list[nn.Module]


@dataclass(frozen=True)
class _Kind:
    """How the weight of a kind of module may be cut.

    Attributes:
        columns_first: Output features are its columns, and not its rows.
        both: Whether it may be cut both ways.
    """

    columns_first: bool = False
    both: bool = True


_LINEAR, _TRANSPOSED, _ROWS = _Kind(), _Kind(columns_first=True), _Kind(both=False)


class _Reason(str):
    """Why a parameter cannot be tiled."""


def plan_tiles(root: nn.Module, limit: int | None, itemsize: Callable[[nn.Parameter], int]) -> list[TilePlan]:
    """Return the parameters to tile: those that are gathered larger than the limit, and those of tiled layers.

    Parameters that are larger and cannot be tiled are named in one warning.

    Args:
        root: The model.
        limit: Most bytes of a tile as it is gathered; None tiles only layers that ask for it (``TiledLinear``).
        itemsize: Returns the bytes of an element of a parameter as compute sees it.
    """
    users: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for module_name, module in root.named_modules():
        for own, param in module._parameters.items():
            if param is not None:
                users.setdefault(id(param), []).append((module_name, module, own))
    plans: list[TilePlan] = []
    refused: dict[str, _Reason] = {}
    for name, param in root.named_parameters():
        found = users.get(id(param), [])
        asked = [m for _, m, own in found if own == "weight" and getattr(m, "tile_splits", None) is not None]
        large = limit is not None and param.numel() * itemsize(param) > limit
        if not large and not asked:
            continue
        grid = _grid_of(param, found, asked, limit if large else None, itemsize(param))
        if isinstance(grid, _Reason):
            refused[f"{name} ({param.numel() * itemsize(param) / 2**20:.2f} MiB)"] = grid
        elif len(grid) > 1:
            plans.append(TilePlan(name, param, grid, list({id(m): m for _, m, _ in found}.values())))
    if refused:
        _warn(refused, limit)
    tiles = sum(len(plan.grid) for plan in plans)
    if tiles > _MANY:
        warnings.warn(
            f"zinf: {len(plans)} parameters are cut into {tiles:,} tiles, each of which is gathered for itself, so "
            f"steps will be slow: tiling.max_tile_bytes counts bytes (64 MiB are {64 * 2**20}, and {limit} are given)",
            stacklevel=2,
        )
    return plans


def _grid_of(
    param: nn.Parameter,
    users: list[tuple[str, nn.Module, str]],
    asked: list[nn.Module],
    limit: int | None,
    itemsize: int,
) -> Grid | _Reason:
    kinds = []
    for name, module, own in users:
        kind = _kind_of(name, module, own)
        if isinstance(kind, _Reason):
            return kind
        kinds.append(kind)
    if hooks := [n for n in ("_backward_hooks", "_post_accumulate_grad_hooks") if getattr(param, n, None)]:
        return _Reason(f"it has hooks of its own ({', '.join(hooks)})")
    shape = tuple(param.shape)
    height, width = shape[0], max(1, param.numel() // max(1, shape[0]))
    grid: Grid | None = None
    if limit is not None:
        columns_first, both = all(k.columns_first for k in kinds), all(k.both for k in kinds) and param.ndim == 2
        grid = fit(height, width, itemsize, limit, columns_first=columns_first, both=both)
        if grid is None:
            return _Reason(f"one row of it has {width * itemsize} bytes")
    for module in asked:
        rows, columns = module.tile_splits  # type: ignore[misc]
        own_grid = Grid.splits(height, width, int(rows), int(columns))
        if grid is None or _largest(own_grid) <= _largest(grid):
            grid = own_grid
    assert grid is not None
    if len(grid.columns) > 1 and not all(k.both or k.columns_first for k in kinds):
        return _Reason("it is tied to a layer whose weight can be cut along rows only")
    return grid


def _largest(grid: Grid) -> int:
    return max(part.numel for part in grid.parts())


def _kind_of(name: str, module: nn.Module, own: str) -> _Kind | _Reason:
    """Return how the parameter ``own`` of a module may be cut, or why it may not."""
    label = f"{type(module).__name__} {name!r}" if name else type(module).__name__
    forward = type(module).forward
    # A copy of a module that was tiled has kept its way to its own forward.
    if own != "weight" or not isinstance(module.__dict__.get("forward"), (EagerForward, type(None))):
        return _Reason(f"it is {own!r} of {label}, which computes with it in a way of its own")
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return _Reason(f"{label} is the projection of a MultiheadAttention, whose forward does not call it")
    if isinstance(module, nn.Linear) and (forward is nn.Linear.forward or hasattr(module, "tile_splits")):
        return _LINEAR
    if isinstance(module, nn.Embedding) and (forward is nn.Embedding.forward or hasattr(module, "tile_splits")):
        if module.max_norm is not None:
            return _Reason(f"{label} has max_norm, which changes weights as it reads them")
        return _Reason(f"{label} has sparse gradients") if module.sparse else _ROWS
    if isinstance(module, _CONVS) and forward in [c.forward for c in _CONVS]:
        return _ROWS if module.groups == 1 else _Reason(f"{label} has {module.groups} groups")
    if _is_conv1d_of_transformers(module):
        return _TRANSPOSED
    return _Reason(f"{label} is of no kind that can be tiled (Linear, Embedding, convolution, Conv1D of transformers)")


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a transposed weight, as GPT-2 of Hugging Face has them."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(module).__name__ != "Conv1D" or weight is None or bias is None or weight.ndim != 2:
        return False
    return tuple(bias.shape) == (weight.shape[1],) and getattr(module, "nf", None) == weight.shape[1]


def _warn(refused: Mapping[str, _Reason], limit: int | None) -> None:
    named = [f"{name}: {reason}" for name, reason in list(refused.items())[:_NAMED]]
    more = [f"and {len(refused) - _NAMED} more"] if len(refused) > _NAMED else []
    allowed = "" if limit is None else f" larger than tiling.max_tile_bytes = {limit / 2**20:.2f} MiB"
    warnings.warn(
        f"zinf: {len(refused)} parameters{allowed} cannot be tiled and are gathered whole: {'; '.join(named + more)}",
        stacklevel=2,
    )
