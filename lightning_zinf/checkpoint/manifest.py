"""The manifest of a sharded checkpoint: what it says, as data. docs/checkpoint-format.md is the specification.

This file knows neither torch.distributed nor any file: the tools use it offline.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_zinf.layout import FlatLayout, Part

FORMAT = "lightning-zinf"
VERSION = 2
"""Readers refuse a larger one. Checkpoints without parameters in parts say 1, which older readers take."""
MANIFEST = "manifest.json"
MAX_RUNS = 2**24
"""Most runs of elements that a parameter may be cut into: a reader looks at each."""
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
        part: Which of its elements are in the buffer, where they are not all.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    offset: int
    dtype: str
    part: Part | None = None

    @property
    def numel(self) -> int:
        """Number of elements in the buffer."""
        return math.prod(self.shape) if self.part is None else self.part.numel

    @property
    def elements(self) -> Part:
        """Which of its elements are in the buffer."""
        return Part.whole(math.prod(self.shape)) if self.part is None else self.part


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
class Stored:
    """A parameter, wherever its elements are.

    Attributes:
        places: The buffers that have them, and what of it is there.
    """

    places: tuple[tuple[Buffer, Param], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Its name in the module, and those that are tied to it."""
        return self.places[0][1].names

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.places[0][1].shape

    @property
    def dtype(self) -> str:
        """Its dtype for the user, as safetensors names it."""
        return self.places[0][1].dtype

    @property
    def planes(self) -> dict[str, str]:
        """Dtype of each plane that it has."""
        return self.places[0][0].planes

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def runs(self, start: int, stop: int) -> Iterator[tuple[Buffer, int, int]]:
        """Yield ``(buffer, first element there, numel)`` for the elements ``[start, stop)``, in their order."""
        while start < stop:
            for buffer, param in self.places:
                found = param.elements.locate(start)
                if found is not None:
                    numel = min(found[1], stop - start)
                    yield buffer, param.offset + found[0], numel
                    start += numel
                    break
            else:
                raise CheckpointError(f"element {start} of parameter {self.names} is in no buffer")


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
        said = asdict(self)
        parts = False
        for param in (p for b in said["buffers"] for p in b["params"]):
            parts = parts or param["part"] is not None
            if param["part"] is None:
                del param["part"]
        return json.dumps(
            {"format": FORMAT, "version": VERSION if parts else 1, "block_bytes": BLOCK_BYTES, **said}, indent=1
        )

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
            tuple(p.shape if p.part is None else (p.numel,) for p in params),
            tuple(p.offset for p in params),
            tuple(p.numel for p in params),
            buffer.numel,
            len(self.shards),
        )

    def stored(self) -> list[Stored]:
        """Return every parameter once."""
        places: dict[str, list[tuple[Buffer, Param]]] = {}
        for buffer in self.buffers:
            for param in buffer.params:
                places.setdefault(param.names[0], []).append((buffer, param))
        return [Stored(tuple(found)) for found in places.values()]

    def locations(self) -> dict[str, Stored]:
        """Return where each parameter is, by every name that it has."""
        return {name: stored for stored in self.stored() for name in stored.names}


def _parse(raw: Mapping[str, Any]) -> Manifest:
    buffers = tuple(
        Buffer(
            str(b["name"]),
            _whole(b["numel"]),
            {str(k): str(v) for k, v in b["planes"].items()},
            tuple(
                Param(
                    tuple(map(str, p["names"])),
                    tuple(map(_whole, p["shape"])),
                    _whole(p["offset"]),
                    str(p["dtype"]),
                    None if p.get("part") is None else _part(p["part"]),
                )
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


def _part(raw: Mapping[str, Any]) -> Part:
    part = Part(_whole(raw["first"]), _whole(raw["length"]), _whole(raw["stride"]), _whole(raw["count"]))
    if not 0 < part.length <= part.stride or not part.count:
        raise ValueError(f"{raw!r} is no part of a parameter")
    return part


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
            if param.part is None and seen & set(param.names):
                refuse(f"parameter {param.names} is there twice")
            seen |= set(param.names)
            end = param.offset + param.numel
    for stored in manifest.stored():
        _check_parts(stored, refuse)
    if len(set(manifest.names)) != len(manifest.names) or not seen <= set(manifest.names):
        refuse("names of parameters are missing or there twice")
    for names in manifest.optimizers:
        if missing := [n for n in names if n not in seen]:
            refuse(f"an optimizer has parameter {missing[0]!r}, which is nowhere")


def _check_parts(stored: Stored, refuse: Callable[[str], None]) -> None:
    """Refuse parameters whose parts do not belong together, overlap, or leave elements out."""
    params = [p for _, p in stored.places]
    if all(p.part is None for p in params) and len(params) == 1:
        return
    alike = all(p.part is not None and (p.names, p.shape, p.dtype) == _identity(params[0]) for p in params)
    parts = [p.elements for p in params]
    inside = all(p.first + (p.count - 1) * p.stride + p.length <= stored.numel for p in parts)
    if sum(p.count for p in parts) > MAX_RUNS:
        refuse(f"parameter {stored.names} is in more than {MAX_RUNS} pieces")
    if not alike or not inside or sum(p.numel for p in parts) != stored.numel:
        refuse(f"the parts of parameter {stored.names} do not make up its {stored.numel} elements")
    if any(b.planes != stored.planes for b, _ in stored.places):
        refuse(f"the parts of parameter {stored.names} have different planes")
    # As many elements as there are, and no start of a run inside of another: so each is there once.
    starts = sorted((p.first + row * p.stride, p.length) for p in parts for row in range(p.count))
    if any(a + length > b for (a, length), (b, _) in itertools.pairwise(starts)):
        refuse(f"the parts of parameter {stored.names} overlap")


def _identity(param: Param) -> tuple[Any, ...]:
    return param.names, param.shape, param.dtype
