"""What a model's flat buffers will be, before any of them is built."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_zinf import parameters as paging
from lightning_zinf.config import Precision
from lightning_zinf.engine.overlaps import refuse_overlaps
from lightning_zinf.engine.units import UnitPlan
from lightning_zinf.layout import FlatLayout
from lightning_zinf.memory.planner import BufferSpec, ModelSpec, UnitSpec
from lightning_zinf.memory.state import plane_dtype
from lightning_zinf.optim.adam import MOMENTS

COMPUTE_DTYPES: dict[Precision, torch.dtype] = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
}
_FULL_PRECISION_MODULES = (nn.modules.batchnorm._BatchNorm,)
"""Their kernels want float32 parameters beside their float32 running statistics, as FSDP keeps them too."""


def check_parameters(root: nn.Module, trained: Collection[int], *, values: bool = True) -> None:
    """Refuse parameters that cannot be partitioned.

    Args:
        root: The model.
        trained: ``id`` of each parameter that an optimizer updates.
        values: Whether parameters must have values, and not only shapes.

    Raises:
        ValueError: With the parameter's name and what to do.
    """
    for name, param in root.named_parameters():
        if isinstance(param, nn.UninitializedParameter):
            raise ValueError(f"parameter {name!r} is lazy and has no shape yet: run one forward before training")
        if isinstance(param, paging.Released):  # built under paged_construction
            continue
        kind = type(param.data)
        if kind not in (Tensor, nn.Parameter):
            raise ValueError(
                f"parameter {name!r} is a {kind.__module__}.{kind.__qualname__}: the zinf strategy partitions plain "
                "tensors only (DTensor parameters of tensor parallelism and quantized subclasses are not supported)"
            )
        if values:
            paging.refuse_meta("parameter", name, param)
        if id(param) in trained and param.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"parameter {name!r} has dtype {param.dtype}, which the zinf strategy does not train: use float32 or "
                "bfloat16"
            )
    refuse_overlaps(root, trained)


@dataclass
class Draft:
    """A flat buffer that is to be built.

    Attributes:
        plan: Its unit.
        names: Fully qualified names of its parameters.
        params: Its parameters.
        compute_dtype: Dtype of the weight plane.
        trained: Whether an optimizer updates it now.
        shards: Number of ranks that the buffer is cut over.
        kept: Names of the planes that its optimizer keeps.
        learns: Whether one will. Before there are optimizers (``validate`` before ``fit``), every parameter that
            requires grad will, so that the plan is the same then and later.
    """

    plan: UnitPlan
    names: list[str]
    params: list[nn.Parameter]
    compute_dtype: torch.dtype
    trained: bool
    learns: bool
    shards: int = 1
    kept: tuple[str, ...] = MOMENTS

    @property
    def padded(self) -> int:
        """Elements of the flat buffer, padding included."""
        shapes = [p.shape for p in self.params]
        return FlatLayout.build(shapes, self.compute_dtype.itemsize, self.shards).padded_numel

    @property
    def shard(self) -> int:
        """Elements of one rank's shard, padding included."""
        return self.padded // self.shards

    @property
    def planes(self) -> tuple[str, ...]:
        """The planes of state that it has now."""
        return self._planes(self.trained)

    @property
    def later_planes(self) -> tuple[str, ...]:
        """The planes of state that it will have in training."""
        return self._planes(self.learns)

    def _planes(self, kept: bool) -> tuple[str, ...]:
        return low_planes(self.compute_dtype) + (self.kept if kept else ())


def low_planes(compute_dtype: torch.dtype) -> tuple[str, ...]:
    """Return the plane that makes masters of weights of this dtype, if one is needed."""
    return {torch.bfloat16: ("residual",), torch.float16: ("master",)}.get(compute_dtype, ())


def draft_buffers(
    plans: Sequence[UnitPlan],
    precision: Precision,
    trained: Collection[int],
    shards: int = 1,
    kept: Mapping[int, tuple[str, ...]] | None = None,
) -> list[Draft]:
    """Sort each unit's parameters into buffers by dtype, and by whether an optimizer updates them and what it keeps.

    Args:
        plans: The units.
        precision: What compute uses.
        trained: ``id`` of each parameter that an optimizer updates.
        shards: Number of ranks that each buffer is cut over.
        kept: Names of the planes that a parameter's optimizer keeps, by its ``id``; Adam's where it says nothing.
    """
    full = {
        id(p)
        for plan in plans
        for m in plan.module.modules()
        if isinstance(m, _FULL_PRECISION_MODULES)
        for p in m.parameters(recurse=False)
    }
    drafts: list[Draft] = []
    for plan in plans:
        groups: dict[tuple[Any, ...], Draft] = {}
        for name, param in plan.params:
            if param.dtype not in (torch.float32, torch.bfloat16):
                continue  # stays where it is, on the device
            compute = param.dtype
            if param.dtype == torch.float32 and (precision == "bf16-true" or id(param) not in full):
                compute = COMPUTE_DTYPES[precision]
            key = id(paging.origin_of(param).param)
            learns = key in trained if trained else param.requires_grad
            planes = (kept or {}).get(key, MOMENTS) if learns else ()
            draft = Draft(plan, [], [], compute, learns and bool(trained), learns, shards, planes)
            draft = groups.setdefault((compute, param.dtype, learns, planes), draft)
            draft.names.append(name)
            draft.params.append(param)
        drafts.extend(groups.values())
    return drafts


def describe_model(drafts: Sequence[Draft], name: str) -> ModelSpec:
    """Return what the planner goes by: the sizes of all units, in the order of the drafts.

    Operations and activations are not known: nothing has run yet.
    """
    units: dict[int, list[Draft]] = {}
    for draft in drafts:
        units.setdefault(id(draft.plan), []).append(draft)
    return ModelSpec(
        name, tuple(UnitSpec(d[0].plan.name, tuple(map(_spec, d))) for d in units.values()), measured=False
    )


def _spec(draft: Draft) -> BufferSpec:
    planes = tuple((plane, plane_dtype(plane).itemsize) for plane in draft.later_planes)
    return BufferSpec(tuple(p.numel() for p in draft.params), draft.compute_dtype.itemsize, planes, draft.learns)
