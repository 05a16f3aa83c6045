"""What the tests of activations share: which modules of the zoo to recompute, and what autograd saves by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from driver import Session, Where
from models import Case
from oracle import Recipe, autocast
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_zinf.memory.activations import ActivationStore

RECOMPUTE: dict[str, bool | tuple[str, ...]] = {
    "mlp": ("Linear", "Dropout"),
    "cnn": ("Sequential",),
    "lstm": ("LSTM",),
    "frozen": ("Linear", "Dropout"),
    "weight-norm": ("ParametrizedLinear",),
    "channels-last": ("Sequential",),
}
"""Classes to recompute in models whose units are lone layers; the others' blocks are found."""

RECIPE = Recipe(steps=3)
ONCE = Recipe(accumulate=1, steps=2)
AWAY = [
    Where(recompute=True, activations="nvme", activation_bytes=8192),
    Where(activations="nvme", activation_bytes=40960),
    Where("nvme", "nvme", tight=True, recompute=True, activations="nvme", activation_bytes=8192),
    Where("nvme", "nvme", aliased=False, tight=True, recompute=True, activations="nvme", activation_bytes=8192),
    Where("cpu", "cpu", aliased=False, tight=True, activations="cpu"),
]
TREATED = [Where(recompute=True), *AWAY]


def ways(name: str) -> list[Where]:
    """Return every way to treat activations, in the cases of memory that make a difference."""
    again, small = RECOMPUTE.get(name, True), 8192
    return [
        Where(recompute=again),
        Where(recompute=again, activations="cpu"),
        Where(recompute=again, activations="nvme"),
        Where(recompute=again, activations="nvme", activation_bytes=small),
        Where(activations="nvme", activation_bytes=5 * small),
        Where("nvme", "nvme", tight=True, recompute=again),
        Where("nvme", "nvme", tight=True, recompute=again, activations="nvme", activation_bytes=small),
        Where("nvme", "nvme", tight=True, activations="nvme", activation_bytes=5 * small),
        Where("none", "none", aliased=False, recompute=again, activations="cpu"),
        Where("cpu", "cpu", aliased=False, tight=True, activations="cpu"),
        Where("nvme", "nvme", aliased=False, tight=True, recompute=again, activations="nvme", activation_bytes=small),
        Where("nvme", "nvme", aliased=False, tight=True, activations="nvme", activation_bytes=5 * small),
    ]


@dataclass
class Storages:
    """Storages that autograd saved, each counted once.

    Attributes:
        sizes: Bytes of each, by address; a storage that was changed and saved again counts twice.
        alive: References to them that keep nothing alive.
    """

    sizes: dict[tuple[int, int], int] = field(default_factory=dict)
    alive: list[StorageWeakRef] = field(default_factory=list)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata, tensor._version
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.alive.append(StorageWeakRef(storage))

    @property
    def padded(self) -> int:
        """Bytes of all of them, each rounded up to whole blocks of a disk."""
        return sum(-(-nbytes // 4096) * 4096 for nbytes in self.sizes.values())


@dataclass
class Plain:
    """What plain autograd saves in a forward of a plain model.

    Attributes:
        within: Storages saved inside of the chosen modules.
        beside: Storages saved elsewhere, without weights and buffers.
        inputs: Storages of the inputs of those modules.
    """

    within: Storages = field(default_factory=Storages)
    beside: Storages = field(default_factory=Storages)
    inputs: Storages = field(default_factory=Storages)


def what_plain_autograd_saves(
    case: Case, precision: str, chosen: Callable[[nn.Module], bool], number: int = 0
) -> tuple[Plain, Tensor]:
    """Run a plain forward and look on; the loss keeps what was saved alive."""
    model, found, depth = case.make(), Plain(), [0]
    lasting = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        depth[0] += 1
        for arg in args:
            found.inputs.add(arg)

    def leave(*_: object) -> None:
        depth[0] -= 1

    for module in model.modules():
        if module is not model and chosen(module):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in lasting:
            (found.within if depth[0] else found.beside).add(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast(precision):
        loss = case.loss(model, case.batch(number), number)
    return found, loss


def described(where: Where) -> str:
    how = "recompute-" * bool(where.recompute) + where.activations
    return f"{where}-{how}" + (f"-{where.activation_bytes}" if where.activation_bytes else "")


everywhere = pytest.mark.parametrize("where", AWAY, ids=described)
treated = pytest.mark.parametrize("where", TREATED, ids=described)


def store_of(running: Session) -> ActivationStore:
    store = running.engine.context.activations
    assert store is not None
    return store


def nothing_left(running: Session) -> bool:
    store = running.engine.context.activations
    if store is None:
        return True
    store.drain()
    return store.live == 0 and store.resting_bytes == 0
