"""Paged parameters: touch a released parameter and it comes.

Note [Paged parameters]
~~~~~~~~~~~~~~~~~~~~~~~
The user's own ``nn.Parameter`` object stays for ever; optimizers, hooks, tied modules and closures that hold it keep
holding the right thing. Two things change when its unit is released:

- its ``__class__`` becomes a subclass (made once per original class) whose ``__torch_function__`` answers questions of
  metadata at once and turns every other use into a *fault*: the engine makes the unit resident, which restores the
  class, and the same call runs again with the same arguments;
- its ``data`` becomes a stand-in, one NaN expanded to the full shape, so code that goes around torch functions reads
  NaN and never freed or foreign memory.

A resident parameter is a plain ``nn.Parameter`` that views a flat buffer, at no cost to compute.

The owner of a parameter is kept in a table outside ``p.__dict__``, else ``deepcopy`` and ``pickle`` would drag the
engine along. What the user sees is the *master* weight: its dtype is reported while the parameter is released, and an
access outside of a training step materialises it, also where compute uses bfloat16.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_zinf.layout import Part

_NAMES_OF_GETTERS = (  # noqa: SIM905
    "shape ndim requires_grad is_leaf layout grad grad_fn is_meta _version _backward_hooks is_sparse is_quantized "
    "is_mkldnn is_nested is_xla is_mps name names retains_grad output_nr"
).split()
_NAMES_OF_METHODS = (  # noqa: SIM905
    "size dim numel nelement is_complex requires_grad_ register_hook "
    "register_post_accumulate_grad_hook __len__ ndimension"
).split()
# torch 2.13 dropped some of these (named tensors), hence hasattr; getters are compared with ==, since
# T.device.__get__ is a new wrapper object each time.
METADATA: set[Any] = {getattr(Tensor, n).__get__ for n in _NAMES_OF_GETTERS if hasattr(Tensor, n)}
METADATA |= {getattr(Tensor, n) for n in _NAMES_OF_METHODS if hasattr(Tensor, n)}
_TENSOR: Any = Tensor
METADATA |= {_TENSOR.requires_grad.__set__, _TENSOR.grad.__set__, _TENSOR.grad.__delete__}
METADATA |= {torch.is_complex, torch.numel}

_DTYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]
_DEVICE = Tensor.device.__get__
_DATA = (_TENSOR.data.__get__, _TENSOR.data.__set__, Tensor.__setitem__)
_FLOATING = (Tensor.is_floating_point, torch.is_floating_point)


class Owner(Protocol):
    """What a released parameter needs of the buffer that owns it."""

    device: torch.device

    @property
    def seen_dtype(self) -> torch.dtype:
        """Dtype that a use of the parameters would find now."""

    def fault(self, owners: list[Owner], writes: bool) -> None:
        """Make every buffer of ``owners`` resident.

        Args:
            owners: The owners of all released parameters of one call.
            writes: Whether the call may change them.
        """


@dataclass(frozen=True, eq=False)
class Origin:
    """The user's parameter that a parameter of a flat buffer is, or is a tile of.

    Attributes:
        param: The user's.
        shape: Its shape.
        part: Which of its elements.
    """

    param: nn.Parameter
    shape: tuple[int, ...]
    part: Part

    @property
    def whole(self) -> bool:
        """Whether it is all of it."""
        return self.part == Part.whole(_numel(self.shape))

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of these elements in a contiguous tensor of the whole parameter's shape, as a matrix."""
        part = self.part
        return tensor.view(-1).as_strided(
            (part.count, part.length), (part.stride, 1), int(tensor.storage_offset()) + part.first
        )

    def put(self, whole: Tensor, values: Tensor) -> None:
        """Copy these elements to their places in a contiguous tensor of the whole parameter's shape."""
        self.of(whole).copy_(values.reshape(self.part.count, self.part.length))

    def cut(self, whole: Tensor, start: int, out: Tensor) -> None:
        """Fill ``out`` with these elements from number ``start`` on, of a tensor of the whole parameter's shape."""
        flat, at = whole.reshape(-1), 0
        for first, numel in self.part.runs(start, start + out.numel()):
            out[at : at + numel].copy_(flat[first : first + numel])
            at += numel


_ORIGIN = "_zinf_origin"


def mark_tile(tile: nn.Parameter, origin: Origin) -> None:
    """Note what a tile is part of."""
    setattr(tile, _ORIGIN, origin)


def origin_of(param: nn.Parameter) -> Origin:
    """Return the user's parameter that ``param`` is, or is a tile of."""
    found = param.__dict__.get(_ORIGIN)
    if isinstance(found, Origin):
        return found
    shape = tuple(_bare(Tensor.size, (param,), {}))
    return Origin(param, shape, Part.whole(_numel(shape)))


def _numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


_OWNERS: dict[int, tuple[Callable[[], Owner | None], int, weakref.ref[Tensor]]] = {}


def adopt(parameter: nn.Parameter, owner: Owner, index: int, *, keep: bool = False) -> None:
    """Record that ``parameter`` is number ``index`` of ``owner``.

    Args:
        parameter: The parameter.
        owner: Its owner from now on.
        index: Its number there.
        keep: Keep the owner alive for as long as the parameter has it. Else somebody else does.
    """
    key = id(parameter)
    find: Callable[[], Owner | None] = (lambda: owner) if keep else weakref.ref(owner)
    _OWNERS[key] = (find, index, weakref.ref(parameter, lambda _ref: _OWNERS.pop(key, None)))


def disown(parameter: nn.Parameter) -> None:
    """Forget the owner of ``parameter``."""
    _OWNERS.pop(id(parameter), None)


def owner_of(parameter: object) -> tuple[Any, int] | None:
    """Return ``(owner, index)`` of a managed parameter, or None for any other object."""
    entry = _OWNERS.get(id(parameter))
    owner = None if entry is None else entry[0]()
    return None if entry is None or owner is None else (owner, entry[1])


def _bare(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _gradient_edge(tensor: Any) -> Any:
    return _bare(torch.autograd.graph.get_gradient_edge, (tensor,), {}) if isinstance(tensor, Released) else tensor


class Released:
    """Mix-in of the class that a parameter has while its unit is released."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return _bare(func, args, kwargs)
        if args and isinstance(args[0], Released):
            answered, answer = described(func, args, kwargs)
            if answered:
                return answer
        # These two ask where gradients arise and not for values, and may name more weights than fit at once.
        if func is torch.autograd.grad and not kwargs.get("materialize_grads"):
            return func(args[0], tuple(map(_gradient_edge, args[1])), **kwargs)
        if func is torch.autograd.backward and kwargs.get("inputs") is not None:
            return func(*args, **{**kwargs, "inputs": tuple(map(_gradient_edge, kwargs["inputs"]))})
        _fault(tree_flatten((args, kwargs))[0], writes=writes(func, kwargs))
        out = func(*args, **kwargs)
        if func == Tensor.detach and type(args[0]) is not Tensor and isinstance(out, Tensor):
            # nn.Parameter(p) insists that detach() keeps the type.
            return torch.Tensor._make_subclass(type(args[0]), out, False)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Parameter.__deepcopy__ calls type(self)(...) before anything faults: make it resident first.
        _fault([self])
        return self.__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _fault([self])
        return self.__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[explicit-override,unused-ignore]
        entry = owner_of(self)
        shape = tuple(_bare(Tensor.size, (self,), {}))
        dtype = _bare(_DTYPE, (self,), {}) if entry is None else entry[0].view_dtype
        return f"ReleasedParameter(shape={shape}, dtype={dtype}) # offloaded; any use brings it back"


def described(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[bool, Any]:
    """Answer what depends on dtype, device or strides, as the resident master weight would."""
    entry = owner_of(args[0])
    if entry is None:
        return False, None
    owner = entry[0]
    if func == _DTYPE:
        return True, owner.seen_dtype
    if func == _DEVICE:
        return True, owner.device
    if func in _FLOATING:
        return True, owner.seen_dtype.is_floating_point
    if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
        return True, owner.device.type == "cuda"
    if func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
        return True, owner.device.type == "cpu"
    if func == Tensor.get_device:
        return True, -1 if owner.device.index is None else owner.device.index
    if func in (Tensor.element_size, Tensor.itemsize.__get__):  # type: ignore[attr-defined]
        return True, owner.seen_dtype.itemsize
    if func == Tensor.nbytes.__get__:  # type: ignore[attr-defined]
        return True, owner.seen_dtype.itemsize * _bare(Tensor.numel, args[:1], {})
    if func in (Tensor.stride, Tensor.is_contiguous):
        meta = torch.empty(_bare(Tensor.size, args[:1], {}), device="meta")
        return True, func(meta, *args[1:], **kwargs)
    return False, None


def writes(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a torch function may change its arguments, now or through what it returns."""
    if func in _DATA or "out" in kwargs:
        return True
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def living_owner(param: Any) -> Any:
    """Return the owner of a released parameter.

    Raises:
        RuntimeError: If it is gone.
    """
    entry = owner_of(param)
    if entry is None:
        raise RuntimeError(
            f"{param!r} was offloaded by the zinf strategy, and the model that it belonged to is gone: keep the "
            "LightningModule for as long as its parameters are used, or take copies of them before"
        )
    return entry[0]


class InTiles(Released):
    """Mix-in of the class of a parameter whose values are in tiles; ``tiling/dispatch.py`` says what it does."""


def _fault(leaves: Iterable[object], *, writes: bool = False) -> None:
    owners: list[Owner] = []
    for leaf in leaves:
        if isinstance(leaf, Released) and not isinstance(leaf, InTiles):
            owner = living_owner(leaf)
            if owner not in owners:
                owners.append(owner)
    if owners:
        owners[0].fault(owners, writes)


@functools.cache
def released_class(cls: type) -> type:
    """Return the class that a parameter of class ``cls`` has while released."""
    return type("Released" + cls.__name__, (Released, cls), {"__module__": __name__})


def original_class(parameter: nn.Parameter) -> type:
    """Return the class that ``parameter`` has while it is resident."""
    return next(c for c in type(parameter).__mro__ if not issubclass(c, Released))


def refuse_meta(what: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError if a tensor of the user's model is on the meta device."""
    if tensor.is_meta:
        raise ValueError(
            f"{what} {name!r} is on the meta device and has no values: build the model outside of "
            "torch.device('meta'), or give it values before, for instance with lightning_zinf.load_pretrained"
        )


def stand_in(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what a released parameter's data is: one NaN element expanded to ``shape``."""
    value = float("nan") if dtype.is_floating_point else 0
    return torch.full((), value, dtype=dtype, device=device).expand(tuple(shape))
