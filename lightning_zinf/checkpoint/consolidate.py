"""One file from a sharded checkpoint, with bounded memory: a Lightning .ckpt, or safetensors as Hugging Face has them.

Note [Streaming a .ckpt]
~~~~~~~~~~~~~~~~~~~~~~~~
``torch.save`` wants its tensors in memory. Under ``torch.serialization.skip_data`` it reserves room for their bytes
instead of writing them, so it is given tensors whose memory is never touched. Then the file is mapped, shared and
writable, and filled piece by piece: what is in memory is the page cache's, which the system writes out and drops.
A .ckpt is a zip archive. torch leaves out the checksums of what it did not see, so they are computed while bytes are
copied, and written at the end: torch does not look at them, but ``unzip -t`` does.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_zinf.checkpoint.files import DTYPES, NAMES, Writer, header, raw_bytes
from lightning_zinf.checkpoint.folder import Folder
from lightning_zinf.checkpoint.manifest import CheckpointError, Stored
from lightning_zinf.checkpoint.source import Averages, Checkpoint
from lightning_zinf.ops import crc32
from lightning_zinf.optim.average import PLANE

_SINGLE = "model.safetensors"
_TRAINING = ("optimizer_states", "lr_schedulers", "callbacks", "loops", "averaging_state", "current_model_state")
"""Entries of a checkpoint that only going on with training needs."""
_SHARDED = ("averaging_buffers", "averaging_swapped")
"""Entries that only sharded checkpoints have."""
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Piece:
    """Values of a parameter that are streamed.

    Attributes:
        param: Which.
        plane: A plane of its state, or None for its values.
        averages: How the checkpoint has averages.
        average: Whether values are averages, if there are any.
    """

    param: Stored
    plane: str | None
    averages: Averages | None = None
    average: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return DTYPES[self.param.dtype if self.plane is None else self.param.planes[self.plane]]

    def read(self, source: Checkpoint, start: int, stop: int) -> Tensor:
        """Return the elements ``[start, stop)`` of the parameter."""
        return source.elements(self.param, start, stop, self.plane, self.averages, self.average).to(self.dtype)

    def chunks(self, source: Checkpoint, numel: int) -> Iterator[tuple[int, Tensor]]:
        """Yield ``(first element, values)`` in pieces of at most ``numel`` elements."""
        for start in range(0, self.param.numel, numel):
            yield start, self.read(source, start, min(start + numel, self.param.numel))


def to_ckpt(
    source: Checkpoint,
    out: str | os.PathLike[str],
    *,
    weights_only: bool = False,
    current: bool = False,
    chunk_bytes: int = 64 * 2**20,
    trust_pickle: bool = False,
    progress: Progress = lambda nbytes: None,
) -> None:
    """Write a Lightning checkpoint that ``load_from_checkpoint`` and any strategy take.

    Args:
        source: The sharded checkpoint.
        out: The file to write; it appears when it is complete.
        weights_only: Leave out optimizers, loops and callbacks.
        current: Take the weights of the last step also where there is an average of them.
        chunk_bytes: Bytes that are read at a time.
        trust_pickle: Load objects of any class that callbacks or hyper-parameters have.
        progress: Called with bytes as they are written.

    Raises:
        CheckpointError: If the checkpoint is damaged.
        OSError: If the file cannot be written.
    """
    path, pieces = Path(out), dict[int, Piece]()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _content(source, pieces, weights_only, current, trust_pickle)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        open(temporary, "xb").close()  # whose error has a reason and a name, unlike that of torch.save
        with torch.serialization.skip_data():
            torch.save(content, temporary)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            mapped = torch.load(temporary, mmap=True, weights_only=not trust_pickle, map_location="cpu")
        filled: dict[int, tuple[int, int]] = {}
        _fill(content, mapped, filled, _filler(source, pieces, chunk_bytes, progress))
        records = _records(temporary)
        if len(records) != len(filled):
            raise CheckpointError(
                f"{source.url} has {len(records) - len(filled)} tensors inside of objects that are no dicts or lists, "
                "which cannot be streamed: use --weights-only"
            )
        del mapped
        _write_checksums(temporary, records, list(filled.values()))
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _content(
    source: Checkpoint, pieces: dict[int, Piece], weights_only: bool, current: bool, trust_pickle: bool
) -> dict[str, Any]:
    """Return the checkpoint with tensors in it whose memory nobody has touched, noted in ``pieces``."""
    content = source.trainer(weights_only=not trust_pickle)
    averages = Averages.of(content)

    def later(piece: Piece) -> Tensor:
        tensor = torch.empty(piece.param.shape, dtype=piece.dtype)
        pieces[id(tensor)] = piece
        return tensor

    def state(average: bool) -> dict[str, Tensor]:
        tensors = {param.names[0]: later(Piece(param, None, averages, average)) for param in source.params()}
        found = {
            name: tensors[source.locations[name].names[0]] if name in source.locations else source.tensor(name)
            for name in source.names()
        }
        if averages is not None and averages.swapped != average:
            found.update({name: value for name, value in averages.buffers.items() if name in found})
        return found

    content["state_dict"] = state(average=not current)
    if averages is not None and not current and not weights_only:
        content["current_model_state"] = state(average=False)  # as Lightning's callback has it
    left = _SHARDED + _TRAINING * weights_only + ("averaging_state",) * current
    for optimizer, names in zip(content.get("optimizer_states", []), source.manifest.optimizers, strict=False):
        for number, entry in () if weights_only else optimizer["state"].items():
            param = source.locations[names[number]]
            for kind in param.planes:
                if kind not in ("weight", "residual", "master", PLANE):
                    entry[kind] = later(Piece(param, kind))
    return {key: value for key, value in content.items() if key not in left}


def _filler(
    source: Checkpoint, pieces: Mapping[int, Piece], chunk_bytes: int, progress: Progress
) -> Callable[[Tensor, Tensor], int]:
    def fill(given: Tensor, room: Tensor) -> int:
        piece = pieces.get(id(given))
        if piece is None:  # others may see other parts of the same storage
            room.untyped_storage().copy_(given.untyped_storage())
            return crc32(raw_bytes(torch.empty(0, dtype=torch.uint8).set_(room.untyped_storage())))
        flat, crc = room.view(-1), 0
        for start, values in piece.chunks(source, max(1, chunk_bytes // 4)):
            flat[start : start + values.numel()] = values
            crc = crc32(raw_bytes(values), crc)
            progress(values.nbytes)
        return crc

    return fill


def _fill(given: Any, room: Any, filled: dict[int, tuple[int, int]], fill: Callable[[Tensor, Tensor], int]) -> None:
    """Walk through two equal structures and fill the tensors of one from the other, each storage once.

    ``filled`` gets the address and the checksum of each storage of ``room``, by the storage of ``given``.
    """
    if isinstance(given, Tensor):
        key = given.untyped_storage()._cdata
        if key not in filled:
            filled[key] = (0, 0)
            filled[key] = (room.untyped_storage().data_ptr(), fill(given, room))
    elif isinstance(given, Mapping):
        for name, value in given.items():
            _fill(value, room[name], filled, fill)
    elif isinstance(given, (list, tuple)):
        for value, other in zip(given, room, strict=True):
            _fill(value, other, filled, fill)


def _records(path: Path) -> list[zipfile.ZipInfo]:
    """Return the records that have tensors."""
    with zipfile.ZipFile(path) as archive:
        return [info for info in archive.infolist() if "/data/" in info.filename]


def _write_checksums(path: Path, records: list[zipfile.ZipInfo], filled: list[tuple[int, int]]) -> None:
    """Write the checksums of records, of which the addresses are known where they were mapped, and sync the file.

    A checksum is in two places (APPNOTE.TXT 4.3): in the directory, and where flag 3 says so in a descriptor that
    follows the data, else in the header before it.
    """
    full = sorted((r for r in records if r.file_size), key=lambda r: r.header_offset)
    crcs = {r.filename: crc for r, (_, crc) in zip(full, sorted(f for f in filled if f[0]), strict=True)}
    with open(path, "r+b") as file:
        for record in full:
            file.seek(record.header_offset + 26)
            names, extra = struct.unpack("<HH", file.read(4))
            if record.flag_bits & 8:
                file.seek(record.header_offset + 30 + names + extra + record.file_size)
                assert file.read(4) == b"PK\x07\x08", record.filename
            else:
                file.seek(record.header_offset + 14)
            file.write(struct.pack("<I", crcs[record.filename]))
        with zipfile.ZipFile(path) as archive:
            file.seek(archive.start_dir)
            entries = len(archive.infolist())
        for _ in range(entries):
            at = file.tell()
            entry = file.read(46)
            assert entry[:4] == b"PK\x01\x02", at
            sizes = struct.unpack("<HHH", entry[28:34])
            name = file.read(sizes[0]).decode()
            if name in crcs:
                file.seek(at + 16)
                file.write(struct.pack("<I", crcs[name]))
            file.seek(at + 46 + sum(sizes))
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------- safetensors


def to_safetensors(
    source: Checkpoint,
    out: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5 * 10**9,
    strip_prefix: str = "",
    current: bool = False,
    chunk_bytes: int = 64 * 2**20,
    trust_pickle: bool = False,
    progress: Progress = lambda nbytes: None,
) -> list[str]:
    """Write the weights as Hugging Face lays them out, and return the names of the files.

    One ``model.safetensors``, or several with ``model.safetensors.index.json``. Of tied weights only the first name is
    written, as there.

    Args:
        source: The sharded checkpoint.
        out: The folder, which is made.
        max_shard_bytes: Most bytes of tensors in a file, unless a single one is larger.
        strip_prefix: Write only names that begin with this, without it.
        current: Take the weights of the last step also where there is an average of them.
        chunk_bytes: Bytes that are read at a time.
        trust_pickle: Load objects of any class, to find out about averages.
        progress: Called with bytes as they are written.

    Raises:
        CheckpointError: If the checkpoint is damaged, or nothing has the prefix.
    """
    averages = None
    if any(PLANE in buffer.planes for buffer in source.manifest.buffers):
        averages = Averages.of(source.trainer(weights_only=not trust_pickle))
    entries: dict[str, Piece | Tensor] = {
        param.names[0]: Piece(param, None, averages, not current) for param in source.params()
    }
    entries.update({name: source.tensor(name) for name in source.reader(source.manifest.module).tensors})
    if averages is not None and averages.swapped == current:
        entries.update({name: value for name, value in averages.buffers.items() if name in entries})
    entries = {n.removeprefix(strip_prefix): e for n, e in entries.items() if n.startswith(strip_prefix)}
    if not entries:
        raise CheckpointError(f"no name in {source.url} begins with {strip_prefix!r}")
    files: list[dict[str, Piece | Tensor]] = [{}]
    filled = total = 0
    for name, entry in entries.items():
        nbytes = entry.param.numel * entry.dtype.itemsize if isinstance(entry, Piece) else entry.nbytes
        if files[-1] and filled + nbytes > max_shard_bytes:
            files.append({})
            filled = 0
        files[-1][name] = entry
        filled += nbytes
        total += nbytes
    folder = Folder(out)
    folder.make()
    count = len(files)
    paths = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [_SINGLE]
    for path, members in zip(paths, files, strict=True):
        _write_file(source, folder, path, members, chunk_bytes, progress)
    if count > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: path for path, members in zip(paths, files, strict=True) for name in members},
        }
        folder.replace("model.safetensors.index.json", json.dumps(index, indent=2).encode())
        paths.append("model.safetensors.index.json")
    return paths


def _write_file(
    source: Checkpoint, folder: Folder, path: str, entries: Mapping[str, Piece | Tensor], chunk: int, progress: Progress
) -> None:
    writer = Writer(folder, path)
    try:
        described = {
            name: (NAMES[e.dtype], e.param.shape if isinstance(e, Piece) else tuple(e.shape))
            for name, e in entries.items()
        }
        writer.write(header(described, {"format": "pt"}))
        for entry in entries.values():
            if isinstance(entry, Piece):
                for _, values in entry.chunks(source, max(1, chunk // 4)):
                    writer.write(raw_bytes(values))
                    progress(values.nbytes)
            else:
                writer.write(raw_bytes(entry.contiguous()))
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
