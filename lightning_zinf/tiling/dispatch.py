"""The class that a parameter has while it is in tiles: what becomes of each function that it is given to.

See the note in parameter.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from lightning_zinf import parameters as paging
from lightning_zinf.engine.guard import KeptGradient, guard
from lightning_zinf.tiling import ops

if TYPE_CHECKING:
    from lightning_zinf.tiling.parameter import TiledParameter

_TENSOR: Any = Tensor
_HOOKS = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}
_CONVS = {torch.conv1d, torch.conv2d, torch.conv3d}


class InTiles(paging.InTiles):
    """Mix-in of that class."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer, compute tile by tile, or bring the whole."""
        kwargs = kwargs or {}
        if func in paging.METADATA:
            return _metadata(func, args, kwargs)
        if args and isinstance(args[0], InTiles):
            answered, answer = paging.described(func, args, kwargs)
            if answered:
                return answer
            if func == Tensor.copy_ and len(args) > 1 and not isinstance(args[1], paging.Released):
                _owner(args[0]).copy_(args[1])
                return args[0]
        if func in (torch.autograd.grad, torch.autograd.backward):
            raise ValueError(
                f"{func.__name__}: parameter {_owner(_first(args, kwargs)).name!r} is in tiles, whose gradients cannot "
                "be asked for one by one: leave it whole with a larger tiling.max_tile_bytes"
            )
        done, result = _tile_by_tile(func, args, kwargs)
        return result if done else _with_wholes(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the whole."""
        _owner(self).open()
        return self.__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the whole."""
        _owner(self).open()
        return self.__reduce_ex__(protocol)


@functools.cache
def in_tiles_class(cls: type) -> type:
    """Return the class that a parameter of class ``cls`` has while it is in tiles."""
    return type("Tiled" + cls.__name__, (InTiles, cls), {"__module__": __name__})


def blocks_of(param: object) -> TiledParameter | None:
    """Return a parameter's tiles, or None if it is whole."""
    return _owner(param) if isinstance(param, InTiles) else None


def _owner(param: Any) -> TiledParameter:
    owner: TiledParameter = paging.living_owner(param)
    return owner


def _first(args: Any, kwargs: Any) -> Any:
    return next(leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, InTiles))


def _metadata(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    owner = _owner(args[0]) if isinstance(args[0], InTiles) else None
    if owner is not None:
        if func in _HOOKS:
            raise ValueError(
                f"parameter {owner.name!r} is in tiles and gets no gradient of its own, so a hook on it would never "
                "run: register it before training, or leave the parameter whole with a larger tiling.max_tile_bytes"
            )
        if func == _TENSOR.grad.__get__:
            return guard(owner.param) if owner.has_grad else None
        if func in (_TENSOR.grad.__set__, _TENSOR.grad.__delete__):
            if len(args) > 1 and args[1] is not None and not isinstance(args[1], KeptGradient):
                raise ValueError(f"parameter {owner.name!r} is in tiles: its gradient can be set to None only")
            owner.forget_grad()
            return None
        if func == _TENSOR.requires_grad.__set__:
            owner.set_requires_grad(args[1])
        elif func == Tensor.requires_grad_:
            owner.set_requires_grad(args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _with_wholes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a function that knows no tiles: on whole copies in a step, on the masters elsewhere."""
    found = {id(x): x for x in tree_flatten((args, kwargs))[0] if isinstance(x, InTiles)}
    owners = [_owner(x) for x in found.values()]
    if owners[0].computing and not paging.writes(func, kwargs):
        copies = {id(o.param): ops.whole(o, o.shape) for o in owners}
        args, kwargs = tree_map(lambda x: copies.get(id(x), x), (args, kwargs))
    else:
        for owner in owners:
            owner.open()
    return func(*args, **kwargs)


# ---------------------------------------------------------------------- operators


def _tile_by_tile(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[bool, Any]:
    """Run an operator tile by tile; the first of what is returned says whether it is one that can be."""
    if kwargs.get("out") is not None:
        return False, None
    if func is F.linear:
        return _linear(*args, **kwargs)
    if func is F.embedding:
        return _embedding(*args, **kwargs)
    if func in _CONVS:
        return _conv(func, *args, **kwargs)
    if func is torch.addmm:
        return _addmm(*args, **kwargs)
    return False, None


def _linear(input: Tensor, weight: Any, bias: Any = None) -> tuple[bool, Any]:
    tiles = blocks_of(weight)
    if tiles is None or blocks_of(input) or blocks_of(bias):
        return False, None
    return True, ops.linear(input, tiles, bias)


def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[bool, Any]:
    tiles = blocks_of(weight)
    if tiles is None or max_norm is not None or sparse or len(tiles.grid.columns) > 1:
        return False, None
    return True, ops.embedding(input, tiles, tiles.shape[1], padding_idx, scale_grad_by_freq)


def _conv(
    func: Callable[..., Any],
    input: Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[bool, Any]:
    tiles = blocks_of(weight)
    if tiles is None or blocks_of(input) or blocks_of(bias) or groups != 1 or len(tiles.grid.columns) > 1:
        return False, None
    return True, ops.conv(func, input, tiles, bias, stride, padding, dilation, groups)


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> tuple[bool, Any]:
    tiles = blocks_of(mat2)
    if tiles is None or blocks_of(input) or blocks_of(mat1) or beta != 1 or alpha != 1 or input.ndim != 1:
        return False, None
    return True, ops.addmm(input, mat1, tiles)
