"""Saving: every rank streams its shard to a file of its own, and the manifest comes last.

Note [Commit]
~~~~~~~~~~~~~
Files get new names each time, so whatever a folder had before stays as it is. Then the ranks tell rank 0 the checksums
of what they wrote, or what went wrong. Only if all is well, and on disk, the manifest takes the place of an older one,
in one step; then the older files go. So at every instant the folder has the old checkpoint, or the new one, or none; a
folder without a manifest is not a checkpoint.

What is saved is the state as it is when ``save`` is called. Planes are read later, by other threads, while training
goes on (``engine/snapshot.py``, ``stream.py``, ``saving.py``); everything else is serialized at once. Saving in the
foreground is the same, and waits for the end.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_zinf.checkpoint.claim import Claim
from lightning_zinf.checkpoint.files import DTYPES, NAMES, Folder, Writer, header, write_safetensors
from lightning_zinf.checkpoint.manifest import MANIFEST, Buffer, CheckpointError, FileInfo, Manifest, Param
from lightning_zinf.checkpoint.saving import BackgroundSaving, Plan
from lightning_zinf.checkpoint.stream import Destination, destination, places, write_shard
from lightning_zinf.config import IOConfig
from lightning_zinf.engine.snapshot import Snapshot
from lightning_zinf.memory.machine import free_host_bytes
from lightning_zinf.memory.state import LOW_PLANES, plane_dtype
from lightning_zinf.monitor.counters import Counters
from lightning_zinf.optim.state_dict import owned_params

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer
    from lightning_zinf.engine.engine import Engine

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
        if isinstance(value, nn.Parameter) and (found := engine.places_of(value)):
            state[name] = torch.empty(value.shape, dtype=found[0][1].view_dtype, device="meta")
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
    *,
    background: bool = False,
    copy_bytes: int | None = None,
) -> None:
    """Save a checkpoint; with several ranks, all of them call this with the same path.

    One that is still being saved is waited for first.

    Args:
        engine: The model's engine.
        checkpoint: What Lightning gathered. Parameters whose names are not in its ``state_dict`` are left out.
        path: The folder.
        optimizers: Those whose planes are kept; none for weights alone.
        versions: Versions of what saves.
        storage_options: Options for the file system.
        background: Return while files are being written. ``engine.saving`` is what goes on.
        copy_bytes: Host memory for copies of what training changes before it has been written, in bytes. By default
            a quarter of what is free, shared with the other ranks of this machine.

    Raises:
        OSError: If a rank could not write, on all ranks; what was there before stays. In the background, that is raised
            by a later step, or by ``engine.saving.wait()``.
        ValueError: If a hook renamed weights or put others in their place.
    """
    if engine.saving is not None:
        engine.saving.wait()
    folder = Folder(path, storage_options)
    if folder.local:
        engine.release_host()
    else:
        engine.flush()  # files elsewhere are written from their beginning, so all of it has to be there
    plan, at_once = _prepare(engine, checkpoint, folder, optimizers, versions, copy_bytes)
    saving = BackgroundSaving(engine, plan)
    if at_once or not background:
        saving.wait()


@dataclass(frozen=True)
class _Contents:
    """What a checkpoint has beside the planes."""

    names: Names
    buffers: tuple[Buffer, ...]
    keys: tuple[str, ...]
    optimizers: tuple[tuple[str, ...], ...]
    versions: dict[str, str]
    module: dict[str, Tensor]
    trainer: memoryview
    aside: str
    claim: Claim | None

    def manifest(self, files: Sequence[FileInfo]) -> Manifest:
        names = self.names
        shards = tuple(names.shard(i) for i in range(names.shards))
        rest = (self.keys, self.optimizers, self.versions, tuple(files))
        return Manifest(shards, names.module, names.trainer, self.buffers, *rest)


def _prepare(
    engine: Engine,
    checkpoint: Mapping[str, Any],
    folder: Folder,
    optimizers: Sequence[torch.optim.Optimizer],
    versions: dict[str, str],
    copy_bytes: int | None,
) -> tuple[Plan, bool]:
    """Take the snapshot, and serialize what is small; return whether to wait until all is written, too.

    Raises:
        OSError: On all ranks, if rank 0 cannot make the folder.
    """
    comm, shards = engine.context.comm, engine.context.shards
    rank = 0 if comm is None else comm.ranks.rank
    token, aside, trainer = uuid.uuid4().hex[:12], "", memoryview(b"")
    own: Exception | None = None
    claim: Claim | None = None
    if rank == 0:
        try:
            _refuse_changes(engine, checkpoint["state_dict"])
            trainer = _serialized(checkpoint)
            aside = folder.put_aside(token)
            folder.make()
            claim = Claim(folder)
        except Exception as problem:  # also what cannot be pickled: the other ranks have to know
            own = problem
    mine = [token, "" if own is None else f"rank 0: {own}", bool(aside)]
    token, error, replaces = _exchange(engine, json.dumps(mine))[0]
    if error:
        if aside:
            folder.put_back(aside)
        if own is not None and not isinstance(own, OSError):
            raise own
        raise OSError(f"{folder.url} was not saved: {error}") from own
    buffers = _describe(engine, set(checkpoint["state_dict"]), with_state=bool(optimizers))
    contents = _Contents(
        Names(token, shards),
        tuple(b for _, b in buffers),
        tuple(checkpoint["state_dict"]),
        _optimizer_names(engine, optimizers, {p.names[0]: p for _, b in buffers for p in b.params}),
        versions,
        {} if rank else _others(checkpoint),
        trainer,
        aside,
        claim,
    )
    if copy_bytes is None:
        copy_bytes = free_host_bytes() // (4 * (1 if comm is None else comm.ranks.local_size))
    return _plan(engine, folder, rank, contents, buffers, copy_bytes), replaces


def _plan(
    engine: Engine,
    folder: Folder,
    rank: int,
    contents: _Contents,
    buffers: Sequence[tuple[FlatBuffer, Buffer]],
    copy_bytes: int,
) -> Plan:
    shards, names, io_config = engine.context.shards, contents.names, engine.config.io
    kept = buffers if rank < shards else ()  # the other ranks have copies of the same
    head, sizes = _layout([b for _, b in kept], shards)
    where, nbytes = places(head, sizes)
    pairs = [(buffer, own) for (buffer, _), own in zip(kept, where, strict=True)]
    snapshot = Snapshot(pairs, copy_bytes, in_order=not folder.local)
    nvme = engine.context.nvme if engine.context.has_nvme else None

    def write() -> tuple[list[FileInfo], Counters]:
        written: list[FileInfo] = []
        moved = Counters()
        try:
            if rank < shards:
                folder.make()
                begin = functools.partial(_begin, folder, names.shard(rank), io_config)
                info, moved = write_shard(snapshot, head, nbytes, begin, nvme)
                written.append(info)
            if rank == 0:
                written.append(write_safetensors(folder, names.module, contents.module))
                written.append(_write_bytes(folder, names.trainer, contents.trainer))
        except BaseException:
            folder.remove([info.path for info in written])
            raise
        return written, moved

    def commit(files: Sequence[FileInfo]) -> None:
        before = _files_of(folder)
        assert contents.claim is not None
        contents.claim.check(files)
        folder.sync()
        folder.replace(MANIFEST, contents.manifest(files).to_json().encode())
        try:
            if contents.aside:
                os.unlink(contents.aside)
            stale = before | {name for name in folder.names() if _OURS.fullmatch(name)}
            if named := _files_of(folder):  # which are not these, if another run has committed meanwhile
                folder.remove(sorted(stale - named))
        except OSError as problem:
            warnings.warn(f"{folder.url} was saved, but what it replaces is still there: {problem}", stacklevel=1)
        contents.claim.release()

    def undo(written: Sequence[FileInfo]) -> None:
        if names.trainer not in _files_of(folder):  # else it is committed, and what failed came after that
            folder.remove([info.path for info in written])

    def restore() -> None:
        if contents.claim is not None:
            contents.claim.release()
        if contents.aside:
            folder.put_back(contents.aside)

    return Plan(folder, snapshot, write, commit, undo, restore)


def _begin(folder: Folder, name: str, io_config: IOConfig, nbytes: int) -> Destination:
    return destination(folder, name, nbytes, io_config)


def _files_of(folder: Folder) -> set[str]:
    """Return the files of the checkpoint that is there already."""
    try:
        return {info.path for info in Manifest.from_json(folder.read(MANIFEST), MANIFEST).files}
    except (FileNotFoundError, CheckpointError):
        return set()


def _exchange(engine: Engine, told: str) -> list[Any]:
    """Return what every rank tells, from JSON."""
    if engine.rounds is None:
        return [json.loads(told)]
    return [json.loads(a) for a in engine.rounds.meet("saving a checkpoint", told.encode())]


def _describe(engine: Engine, kept: set[str], *, with_state: bool) -> list[tuple[FlatBuffer, Buffer]]:
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


def _layout(buffers: Sequence[Buffer], shards: int) -> tuple[bytes, list[dict[str, int]]]:
    """Return the header of a shard file, and the bytes of each plane of each buffer in it."""
    tensors = {f"{b.name}/{p}": (dtype, (b.numel // shards,)) for b in buffers for p, dtype in b.planes.items()}
    sizes = [{p: DTYPES[d].itemsize * (b.numel // shards) for p, d in b.planes.items()} for b in buffers]
    return header(tensors), sizes


def _others(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return copies of the tensors that are in no buffer."""
    found = {n: v for n, v in checkpoint["state_dict"].items() if isinstance(v, Tensor) and not v.is_meta}
    return {n: v.detach().cpu().clone() for n, v in found.items()}


def _refuse_changes(engine: Engine, state: Mapping[str, Any]) -> None:
    """Refuse a state dict in which weights have other names or values than they have: shards hold them as they are."""
    params = engine.root.named_parameters(remove_duplicate=False)
    ours = {name for name, param in params if engine.unit_of(param) is not None}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta == (name in ours):
            continue
        what = f"put other values in the place of {name!r}" if name in ours else f"gave a weight the name {name!r}"
        raise ValueError(
            f"a hook that edits checkpoint['state_dict'] {what}. A sharded checkpoint has the weights as they are, "
            "less the names that are removed: pass state_dict_type='full' to ZinfStrategy, or edit what is loaded"
        )


def _serialized(checkpoint: Mapping[str, Any]) -> memoryview:
    content = io.BytesIO()
    torch.save({key: value for key, value in checkpoint.items() if key != "state_dict"}, content)
    return content.getbuffer()


def _write_bytes(folder: Folder, name: str, content: memoryview) -> FileInfo:
    writer = Writer(folder, name)
    try:
        writer.write(content)
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


def _optimizer_names(
    engine: Engine, optimizers: Sequence[torch.optim.Optimizer], saved: Mapping[str, Param]
) -> tuple[tuple[str, ...], ...]:
    first: dict[int, str] = {}
    for name, param in engine.root.named_parameters():
        first[id(param)] = name
    return tuple(
        tuple(first[id(p)] for p in owned_params(optimizer) if first[id(p)] in saved) for optimizer in optimizers
    )
