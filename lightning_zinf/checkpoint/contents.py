"""What a sharded checkpoint has, as the engine and Lightning have it: names, layout and everything that is small."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_zinf.checkpoint.claim import Claim
from lightning_zinf.checkpoint.files import DTYPES, NAMES, Writer, header
from lightning_zinf.checkpoint.folder import Folder
from lightning_zinf.checkpoint.manifest import Buffer, FileInfo, Manifest, Param
from lightning_zinf.memory.state import LOW_PLANES, plane_dtype
from lightning_zinf.optim.state_dict import owned_params

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer
    from lightning_zinf.engine.engine import Engine


@dataclass(frozen=True)
class Names:
    """Names of the files of one save.

    Attributes:
        token: Part of the names of shards.
        shards: How many there are.
        own: Part of the names of the other files, if it is another.
    """

    token: str
    shards: int
    own: str = ""

    def shard(self, number: int) -> str:
        """Return the name of a shard file."""
        return f"shard-{self.token}-{number:05d}-of-{self.shards:05d}.safetensors"

    @property
    def module(self) -> str:
        """Name of the file with tensors that are in no buffer."""
        return f"module-{self.own or self.token}.safetensors"

    @property
    def trainer(self) -> str:
        """Name of the file with the rest."""
        return f"trainer-{self.own or self.token}.pt"


@dataclass(frozen=True)
class Contents:
    """What a checkpoint has beside the planes.

    Attributes:
        names: Names of its files.
        buffers: The flat buffers.
        keys: Names of the state dict.
        optimizers: For each optimizer the first name of each of its parameters.
        versions: Versions of what saves.
        module: Tensors that are in no buffer; on rank 0.
        trainer: Everything else, serialized; on rank 0.
        aside: Where a file is that had the folder's name; "" if there was none.
        claim: The right to save to the folder; on rank 0.
    """

    names: Names
    buffers: tuple[Buffer, ...]
    keys: tuple[str, ...]
    optimizers: tuple[tuple[str, ...], ...]
    versions: dict[str, str]
    module: dict[str, Tensor]
    trainer: bytes
    aside: str
    claim: Claim | None

    def manifest(self, files: Sequence[FileInfo]) -> Manifest:
        """Return the manifest, given the files of all ranks."""
        names = self.names
        shards = tuple(names.shard(i) for i in range(names.shards))
        rest = (self.keys, self.optimizers, self.versions, tuple(files))
        return Manifest(shards, names.module, names.trainer, self.buffers, *rest)


def describe(engine: Engine, kept: set[str], *, with_state: bool) -> list[tuple[FlatBuffer, Buffer]]:
    """Return the buffers that have parameters to be kept, as the engine and as the manifest has them."""
    names: dict[int, list[str]] = {}
    for name, param in engine.root.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    found: list[tuple[FlatBuffer, Buffer]] = []
    for unit in engine.units:
        for number, buffer in enumerate(unit.buffers):
            params = tuple(
                Param(tuple(names[id(o.param)]), o.shape, offset, NAMES[buffer.view_dtype], None if o.whole else o.part)
                for o, offset in zip(buffer.origins, buffer.layout.offsets, strict=True)
                if kept & set(names[id(o.param)])
            )
            if params:
                planes = {"weight": NAMES[buffer.compute_dtype]}
                planes.update({p: NAMES[plane_dtype(p)] for p in _planes(buffer, with_state)})
                label = f"{unit.name or '<root>'}#{number}"
                found.append((buffer, Buffer(label, buffer.layout.padded_numel, planes, params)))
    return found


def _planes(buffer: FlatBuffer, with_state: bool) -> list[str]:
    if buffer.state is None:
        return []
    return [p for p in buffer.state.planes if with_state or p in (*LOW_PLANES, "ema")]


def layout(buffers: Sequence[Buffer], shards: int) -> tuple[bytes, list[dict[str, int]]]:
    """Return the header of a shard file, and the bytes of each plane of each buffer in it."""
    tensors = {f"{b.name}/{p}": (dtype, (b.numel // shards,)) for b in buffers for p, dtype in b.planes.items()}
    sizes = [{p: DTYPES[d].itemsize * (b.numel // shards) for p, d in b.planes.items()} for b in buffers]
    return header(tensors), sizes


def others(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return copies of the tensors that are in no buffer."""
    found = {n: v for n, v in checkpoint["state_dict"].items() if isinstance(v, Tensor) and not v.is_meta}
    return {n: v.detach().cpu().clone() for n, v in found.items()}


def refuse_changes(engine: Engine, state: Mapping[str, Any]) -> None:
    """Refuse a state dict in which weights have other names or values than they have: shards hold them as they are."""
    params = engine.root.named_parameters(remove_duplicate=False)
    ours = {name for name, param in params if engine.places_of(param)}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta == (name in ours):
            continue
        what = f"put other values in the place of {name!r}" if name in ours else f"gave a weight the name {name!r}"
        raise ValueError(
            f"a hook that edits checkpoint['state_dict'] {what}. A sharded checkpoint has the weights as they are, "
            "less the names that are removed: pass state_dict_type='full' to ZinfStrategy, or edit what is loaded"
        )


def serialized(checkpoint: Mapping[str, Any]) -> bytes:
    """Return everything but the state dict, as ``torch.save`` writes it."""
    content = io.BytesIO()
    torch.save({key: value for key, value in checkpoint.items() if key != "state_dict"}, content)
    # Hands its bytes over, without a copy. A view (getbuffer) in a cycle of garbage crashes Python 3.12.0 and 3.12.1.
    return content.getvalue()


def write_bytes(folder: Folder, name: str, content: bytes) -> FileInfo:
    """Write a file."""
    writer = Writer(folder, name)
    try:
        writer.write(content)
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


def optimizer_names(
    engine: Engine, optimizers: Sequence[torch.optim.Optimizer], saved: Mapping[str, Param]
) -> tuple[tuple[str, ...], ...]:
    """Return for each optimizer the first name of each of its parameters that is saved."""
    first: dict[int, str] = {}
    for name, param in engine.root.named_parameters():
        first[id(param)] = name
    return tuple(
        tuple(first[id(p)] for p in owned_params(optimizer) if first[id(p)] in saved) for optimizer in optimizers
    )
