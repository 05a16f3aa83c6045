"""Saving: every rank streams its shard to a file of its own, and the manifest comes last.

Note [Commit]
~~~~~~~~~~~~~
Files get new names each time, so whatever a folder had before stays as it is. Then the ranks tell rank 0 the checksums
of what they wrote, or what went wrong. Only if all is well, and on disk, the manifest takes the place of an older one,
in one step; then the older files go. So at every instant the folder has the old checkpoint, or the new one, or none; a
folder without a manifest is not a checkpoint.
"""

from __future__ import annotations

import io
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_zinf.checkpoint.files import NAMES, Folder, Writer, header, raw_bytes, write_safetensors
from lightning_zinf.checkpoint.manifest import MANIFEST, Buffer, CheckpointError, FileInfo, Manifest, Param
from lightning_zinf.memory.state import LOW_PLANES, plane_dtype
from lightning_zinf.optim.state_dict import owned_params

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer
    from lightning_zinf.engine.engine import Engine

CHUNK = 1 << 20
"""Elements of a plane that are in memory at a time, beside those that are being read."""


_OURS = re.compile(r"(shard-[0-9a-f]{12}-\d+-of-\d+|module-[0-9a-f]{12})\.safetensors|trainer-[0-9a-f]{12}\.pt")
"""Names that only a save gives: what one that was killed left behind. Other files in the folder are not ours."""


@dataclass(frozen=True)
class Names:
    """Names of the files of one save."""

    token: str
    shards: int

    def shard(self, number: int) -> str:
        """Return the name of a shard file."""
        return f"shard-{self.token}-{number:05d}-of-{self.shards:05d}.safetensors"

    @property
    def module(self) -> str:
        """Name of the file with tensors that are in no buffer."""
        return f"module-{self.token}.safetensors"

    @property
    def trainer(self) -> str:
        """Name of the file with the rest."""
        return f"trainer-{self.token}.pt"


def placeholders(engine: Engine) -> dict[str, Tensor]:
    """Return the state dict with tensors on the meta device for what the engine has; all else is copied."""
    state: dict[str, Any] = engine.root.state_dict(keep_vars=True)
    for name, value in state.items():
        if isinstance(value, nn.Parameter) and (found := engine.unit_of(value)) is not None:
            state[name] = torch.empty(value.shape, dtype=found[1].view_dtype, device="meta")
        elif isinstance(value, Tensor):
            state[name] = value.detach().cpu().clone()
    return state


def save(
    engine: Engine,
    checkpoint: Mapping[str, Any],
    path: str | os.PathLike[str],
    optimizers: Sequence[torch.optim.Optimizer],
    versions: dict[str, str],
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Save a checkpoint; with several ranks, all of them call this with the same path.

    Args:
        engine: The model's engine.
        checkpoint: What Lightning gathered. Parameters whose names are not in its ``state_dict`` are left out.
        path: The folder.
        optimizers: Those whose planes are kept; none for weights alone.
        versions: Versions of what saves.
        storage_options: Options for the file system.

    Raises:
        OSError: If a rank could not write, on all ranks; what was there before stays.
    """
    engine.flush()
    comm = engine.context.comm
    rank = 0 if comm is None else comm.ranks.rank
    shards = engine.context.shards
    names = Names(_agreed_token(engine), shards)
    folder = Folder(path, storage_options)
    buffers = _describe(engine, set(checkpoint["state_dict"]), with_state=bool(optimizers))
    written: list[FileInfo] = []
    error = file = ""
    own: Exception | None = None
    if rank == 0:
        try:
            file = folder.put_aside(names.token)
            folder.make()
        except OSError as problem:
            error = f"rank 0: {problem}"
    if told := _exchange(engine, json.dumps(error))[0]:
        _undo(folder, [], file)
        raise OSError(f"{folder.url} was not saved: {told}")
    try:
        if rank < shards:  # the other ranks have copies of the same
            folder.make()
            written.append(_write_shard(folder, names.shard(rank), engine, buffers))
        if rank == 0:
            written.extend(_write_rest(folder, names, engine, checkpoint))
    except Exception as problem:  # also what cannot be pickled: the other ranks have to know
        error, own = f"rank {rank}: {problem}", problem
    answers = _exchange(engine, json.dumps([error, [asdict(info) for info in written]]))
    errors = [said for said, _ in answers if said]
    if not errors and rank == 0:
        files = tuple(FileInfo(f["path"], f["nbytes"], tuple(f["crc32"])) for _, infos in answers for f in infos)
        manifest = Manifest(
            tuple(names.shard(i) for i in range(shards)),
            names.module,
            names.trainer,
            tuple(b for _, b in buffers),
            tuple(checkpoint["state_dict"]),
            _optimizer_names(engine, optimizers, {p.names[0]: p for _, b in buffers for p in b.params}),
            versions,
            files,
        )
        before = _files_of(folder)
        try:
            folder.sync()
            folder.replace(MANIFEST, manifest.to_json().encode())
        except OSError as problem:
            errors.append(f"rank 0: {problem}")
    outcome = _exchange(engine, json.dumps(errors))
    if any(outcome):
        _undo(folder, written, file)
        if own is not None and not isinstance(own, OSError):
            raise own
        raise OSError(f"{folder.url} was not saved: {'; '.join(said for errors in outcome for said in errors)}")
    if rank == 0:
        if file:
            os.unlink(file)
        stale = before | {name for name in folder.names() if _OURS.fullmatch(name)}
        folder.remove(sorted(stale - {info.path for info in files}))


def _files_of(folder: Folder) -> set[str]:
    """Return the files of the checkpoint that is there already."""
    try:
        return {info.path for info in Manifest.from_json(folder.read(MANIFEST), MANIFEST).files}
    except (FileNotFoundError, CheckpointError):
        return set()


def _undo(folder: Folder, written: Sequence[FileInfo], file: str) -> None:
    folder.remove([info.path for info in written])
    if file:
        folder.put_back(file)


def _agreed_token(engine: Engine) -> str:
    mine = uuid.uuid4().hex[:12]
    return mine if engine.rounds is None else engine.rounds.meet("saving a checkpoint", mine.encode())[0].decode()


def _exchange(engine: Engine, told: str) -> list[Any]:
    """Return what every rank tells, from JSON."""
    if engine.rounds is None:
        return [json.loads(told)]
    return [json.loads(a) for a in engine.rounds.meet("the end of saving a checkpoint", told.encode())]


def _describe(engine: Engine, kept: set[str], *, with_state: bool) -> list[tuple[FlatBuffer, Buffer]]:
    names: dict[int, list[str]] = {}
    for name, param in engine.root.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    found: list[tuple[FlatBuffer, Buffer]] = []
    for unit in engine.units:
        for number, buffer in enumerate(unit.buffers):
            params = tuple(
                Param(tuple(names[id(p)]), shape, offset, NAMES[buffer.view_dtype])
                for p, shape, offset in zip(buffer.params, buffer.layout.shapes, buffer.layout.offsets, strict=True)
                if kept & set(names[id(p)])
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


def _write_shard(folder: Folder, name: str, engine: Engine, buffers: Sequence[tuple[FlatBuffer, Buffer]]) -> FileInfo:
    writer = Writer(folder, name)
    try:
        shards = engine.context.shards
        tensors = {
            f"{described.name}/{plane}": (dtype, (described.numel // shards,))
            for _, described in buffers
            for plane, dtype in described.planes.items()
        }
        writer.write(header(tensors))
        for buffer, described in buffers:
            for plane in described.planes:
                for chunk in _chunks(buffer, plane):
                    writer.write(raw_bytes(chunk))
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


def _chunks(buffer: FlatBuffer, plane: str) -> Iterator[Tensor]:
    if plane == "weight":
        yield from buffer.weights.shard_chunks(CHUNK)
    else:
        assert buffer.state is not None, buffer
        yield from buffer.state.chunks(plane, CHUNK)


def _write_rest(folder: Folder, names: Names, engine: Engine, checkpoint: Mapping[str, Any]) -> list[FileInfo]:
    module = {n: v for n, v in checkpoint["state_dict"].items() if isinstance(v, Tensor) and not v.is_meta}
    content = io.BytesIO()
    torch.save({key: value for key, value in checkpoint.items() if key != "state_dict"}, content)
    infos = [write_safetensors(folder, names.module, module)]
    writer = Writer(folder, names.trainer)
    try:
        writer.write(content.getbuffer())
        infos.append(writer.finish())
    except BaseException:
        writer.abandon()
        raise
    return infos


def _optimizer_names(
    engine: Engine, optimizers: Sequence[torch.optim.Optimizer], saved: Mapping[str, Param]
) -> tuple[tuple[str, ...], ...]:
    first: dict[int, str] = {}
    for name, param in engine.root.named_parameters():
        first[id(param)] = name
    return tuple(
        tuple(first[id(p)] for p in owned_params(optimizer) if first[id(p)] in saved) for optimizer in optimizers
    )
