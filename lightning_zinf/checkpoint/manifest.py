"""The manifest of a sharded checkpoint: what it says, as data. docs/checkpoint-format.md is the specification.

This file knows neither torch.distributed nor any file: the tools use it offline.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_zinf.layout import FlatLayout

FORMAT = "lightning-zinf"
VERSION = 1
"""Readers refuse a larger one."""
MANIFEST = "manifest.json"
BLOCK_BYTES = 16 * 2**20
"""Bytes of a file that one checksum is for."""
ITEMSIZES = {"F32": 4, "BF16": 2, "F16": 2, "I16": 2}
"""Dtypes of planes, as safetensors names them."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the file and the reason."""


@dataclass(frozen=True)
class Param:
    """A parameter in a flat buffer.

    Attributes:
        names: Its name in the module, and those that are tied to it.
        shape: Its shape.
        offset: Its first element in the buffer.
        dtype: Its dtype for the user, as safetensors names it.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    offset: int
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Buffer:
    """A flat buffer, cut into as many equal shards as there are shard files.

    Attributes:
        name: Its name, which is part of the names of its tensors: ``<name>/<plane>``.
        numel: Elements of the whole buffer, padding included.
        planes: Dtype of each plane; ``weight`` is always there.
        params: Its parameters.
    """

    name: str
    numel: int
    planes: dict[str, str]
    params: tuple[Param, ...]


@dataclass(frozen=True)
class FileInfo:
    """A file of the checkpoint.

    Attributes:
        path: Its name in the folder.
        nbytes: Its size.
        crc32: Checksum of each block of :data:`BLOCK_BYTES`, the last one shorter.
    """

    path: str
    nbytes: int
    crc32: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint has.

    Attributes:
        shards: The shard files, in order.
        module: The file with tensors that are not in buffers: running statistics, parameters that are not managed.
        trainer: The file with everything else, as ``torch.save`` writes it.
        buffers: The flat buffers.
        names: The names of the state dict, in its order.
        optimizers: For each optimizer the name of its parameters, in the order of its param groups.
        versions: Versions of what wrote it.
        files: Size and checksums of every file.
    """

    shards: tuple[str, ...]
    module: str
    trainer: str
    buffers: tuple[Buffer, ...]
    names: tuple[str, ...]
    optimizers: tuple[tuple[str, ...], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    files: tuple[FileInfo, ...] = ()

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps({"format": FORMAT, "version": VERSION, "block_bytes": BLOCK_BYTES, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str | bytes, where: str) -> Manifest:
        """Return the manifest that ``text`` is.

        Args:
            text: The JSON.
            where: Its path, for messages.

        Raises:
            CheckpointError: If it is none, or one of a newer format, or does not make sense.
        """
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{where} is not JSON ({error}): the file is damaged") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise CheckpointError(f"{where} is not the manifest of a lightning-zinf checkpoint")
        if not isinstance(raw.get("version"), int) or raw["version"] > VERSION:
            raise CheckpointError(
                f"{where} has format version {raw.get('version')!r}, and this lightning-zinf reads up to {VERSION}: "
                "upgrade lightning-zinf"
            )
        try:
            manifest = _parse(raw)
            _check(manifest, raw["block_bytes"])
        except CheckpointError as error:
            raise CheckpointError(f"{where} is damaged: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{where} is damaged: {type(error).__name__}: {error}") from None
        return manifest

    def layout(self, buffer: Buffer) -> FlatLayout:
        """Return where the parameters of a buffer lie, and how it is cut."""
        params = buffer.params
        return FlatLayout(
            tuple(p.shape for p in params),
            tuple(p.offset for p in params),
            tuple(p.numel for p in params),
            buffer.numel,
            len(self.shards),
        )

    def locations(self) -> dict[str, tuple[Buffer, Param]]:
        """Return where each parameter is, by every name that it has."""
        return {name: (b, p) for b in self.buffers for p in b.params for name in p.names}


def _parse(raw: Mapping[str, Any]) -> Manifest:
    buffers = tuple(
        Buffer(
            str(b["name"]),
            _whole(b["numel"]),
            {str(k): str(v) for k, v in b["planes"].items()},
            tuple(
                Param(tuple(map(str, p["names"])), tuple(map(_whole, p["shape"])), _whole(p["offset"]), str(p["dtype"]))
                for p in b["params"]
            ),
        )
        for b in raw["buffers"]
    )
    files = tuple(FileInfo(str(f["path"]), _whole(f["nbytes"]), tuple(map(_whole, f["crc32"]))) for f in raw["files"])
    return Manifest(
        tuple(map(str, raw["shards"])),
        str(raw["module"]),
        str(raw["trainer"]),
        buffers,
        tuple(map(str, raw["names"])),
        tuple(tuple(map(str, names)) for names in raw["optimizers"]),
        {str(k): str(v) for k, v in raw["versions"].items()},
        files,
    )


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _check(manifest: Manifest, block_bytes: Any) -> None:
    """Refuse what does not make sense, so that no reader has to look again."""

    def refuse(reason: str) -> None:
        raise CheckpointError(reason)

    if block_bytes != BLOCK_BYTES:
        refuse(f"block_bytes is {block_bytes!r}, not {BLOCK_BYTES}")
    infos = {info.path: info for info in manifest.files}
    for path in (*manifest.shards, manifest.module, manifest.trainer):
        if path not in infos or "/" in path or path in ("", ".", ".."):
            refuse(f"file {path!r} is not listed, or not a plain name")
    for info in manifest.files:
        if len(info.crc32) != -(-info.nbytes // BLOCK_BYTES):
            refuse(f"file {info.path!r} of {info.nbytes} bytes has {len(info.crc32)} checksums")
    if not manifest.shards:
        refuse("there are no shards")
    seen: set[str] = set()
    for buffer in manifest.buffers:
        if buffer.numel % len(manifest.shards) or buffer.planes.get("weight") not in ITEMSIZES:
            refuse(f"buffer {buffer.name!r} has {buffer.numel} elements and planes {buffer.planes}")
        if any(dtype not in ITEMSIZES for dtype in buffer.planes.values()):
            refuse(f"buffer {buffer.name!r} has planes {buffer.planes}")
        end = 0
        for param in sorted(buffer.params, key=lambda p: p.offset):
            if not param.names or param.offset < end or param.offset + param.numel > buffer.numel:
                refuse(f"parameter {param.names} does not lie within buffer {buffer.name!r}")
            if seen & set(param.names):
                refuse(f"parameter {param.names} is there twice")
            seen |= set(param.names)
            end = param.offset + param.numel
    if len(set(manifest.names)) != len(manifest.names) or not seen <= set(manifest.names):
        refuse("names of parameters are missing or there twice")
    for names in manifest.optimizers:
        if missing := [n for n in names if n not in seen]:
            refuse(f"an optimizer has parameter {missing[0]!r}, which is nowhere")
