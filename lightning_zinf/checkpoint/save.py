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

ModelCheckpoint often saves one state twice, under its own name and as the last. Shard files are never written to again,
so the second checkpoint, if nothing has changed since, is links to the files of the first, made after its commit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import uuid
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_zinf.checkpoint.claim import Claim
from lightning_zinf.checkpoint.contents import (
    Contents,
    Names,
    describe,
    layout,
    optimizer_names,
    others,
    refuse_changes,
    serialized,
    write_bytes,
)
from lightning_zinf.checkpoint.files import write_safetensors
from lightning_zinf.checkpoint.folder import Folder
from lightning_zinf.checkpoint.manifest import MANIFEST, Buffer, CheckpointError, FileInfo, Manifest
from lightning_zinf.checkpoint.saving import AnotherError, BackgroundSaving, Plan, copy_room
from lightning_zinf.checkpoint.stream import Destination, destination, places, write_shard
from lightning_zinf.config import IOConfig
from lightning_zinf.engine.snapshot import Snapshot
from lightning_zinf.monitor.counters import Counters

if TYPE_CHECKING:
    from lightning_zinf.engine.buffer import FlatBuffer
    from lightning_zinf.engine.engine import Engine

_OURS = re.compile(r"(shard-[0-9a-f]{12}-\d+-of-\d+|module-[0-9a-f]{12})\.safetensors|trainer-[0-9a-f]{12}\.pt")
"""Names that only a save gives: what one that was killed left behind. Other files in the folder are not ours."""


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

    One that is still being saved is waited for first, unless it has the same state: then its files are used.

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
    folder = Folder(path, storage_options)
    engine.release_host()
    if engine.saving is not None:
        if background and _same_again(engine, checkpoint, folder, optimizers, versions):
            return
        engine.saving.wait()
    if not folder.local:
        engine.flush()  # files elsewhere are written from their beginning, so all of it has to be there
    plan, at_once = _prepare(engine, checkpoint, folder, optimizers, versions, copy_bytes, background=background)
    saving = BackgroundSaving(engine, plan)
    if at_once:
        saving.wait()


def _prepare(
    engine: Engine,
    checkpoint: Mapping[str, Any],
    folder: Folder,
    optimizers: Sequence[torch.optim.Optimizer],
    versions: dict[str, str],
    copy_bytes: int | None,
    *,
    background: bool,
) -> tuple[Plan, bool]:
    """Take the snapshot, and serialize what is small; return whether to wait until all is written, too.

    Raises:
        OSError: On all ranks, if rank 0 cannot make the folder, or there is one that is no checkpoint.
    """
    comm, shards = engine.context.comm, engine.context.shards
    rank = 0 if comm is None else comm.ranks.rank
    token, aside, trainer = uuid.uuid4().hex[:12], "", b""
    own: Exception | None = None
    claim: Claim | None = None
    if rank == 0:
        try:
            refuse_changes(engine, checkpoint["state_dict"])
            trainer = serialized(checkpoint)
            _refuse_others(folder)
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
    buffers = describe(engine, set(checkpoint["state_dict"]), with_state=bool(optimizers))
    contents = Contents(
        Names(token, shards),
        tuple(b for _, b in buffers),
        tuple(checkpoint["state_dict"]),
        optimizer_names(engine, optimizers, {p.names[0]: p for _, b in buffers for p in b.params}),
        versions,
        {} if rank else others(checkpoint),
        trainer,
        aside,
        claim,
    )
    if copy_bytes is None:
        copy_bytes = max(copy_room(engine), sum(m.numel() for m in engine.context.spare_copies))
    at_once = replaces or not background
    return _plan(engine, folder, rank, contents, buffers, copy_bytes, at_rest=at_once), at_once


def _plan(
    engine: Engine,
    folder: Folder,
    rank: int,
    contents: Contents,
    buffers: Sequence[tuple[FlatBuffer, Buffer]],
    copy_bytes: int,
    *,
    at_rest: bool,
) -> Plan:
    shards, names, io_config = engine.context.shards, contents.names, engine.config.io
    kept = buffers if rank < shards else ()  # the other ranks have copies of the same
    head, sizes = layout([b for _, b in kept], shards)
    where, nbytes = places(head, sizes)
    pairs = [(buffer, own) for (buffer, _), own in zip(kept, where, strict=True)]
    snapshot = Snapshot(
        pairs, copy_bytes, in_order=not folder.local, at_rest=at_rest, spare=engine.context.spare_copies
    )
    engine.context.spare_copies = []
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
                written.append(write_bytes(folder, names.trainer, contents.trainer))
        except BaseException:
            folder.remove([info.path for info in written])
            raise
        return written, moved

    def undo(written: Sequence[FileInfo]) -> None:
        if names.trainer not in _files_of(folder):  # else it is committed, and what failed came after that
            folder.remove([info.path for info in written])

    def restore() -> None:
        if contents.claim is not None:
            contents.claim.release()
        if contents.aside:
            folder.put_back(contents.aside)

    return Plan(folder, snapshot, contents, write, functools.partial(_commit, folder, contents), undo, restore)


def _commit(folder: Folder, contents: Contents, files: Sequence[FileInfo]) -> None:
    """Make a checkpoint complete whose files are on disk, and remove those of an older one."""
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


def _same_again(
    engine: Engine,
    checkpoint: Mapping[str, Any],
    folder: Folder,
    optimizers: Sequence[torch.optim.Optimizer],
    versions: dict[str, str],
) -> bool:
    """Have a checkpoint made of the files of the one that is being saved, if it is of the same state, on all ranks."""
    saving = engine.saving
    if not isinstance(saving, BackgroundSaving) or not (folder.local and saving.plan.folder.local):
        return False
    first: Contents = saving.plan.contents
    buffers = tuple(b for _, b in describe(engine, set(checkpoint["state_dict"]), with_state=bool(optimizers)))
    names = optimizer_names(engine, optimizers, {p.names[0]: p for b in buffers for p in b.params})
    same = (buffers, tuple(checkpoint["state_dict"]), names) == (first.buffers, first.keys, first.optimizers)
    same = same and os.path.realpath(folder.path) != os.path.realpath(saving.plan.folder.path)
    if not all(_exchange(engine, json.dumps(same and saving.plan.snapshot.current))):
        return False
    taken = False
    if engine.context.comm is None or engine.context.comm.ranks.rank == 0:
        try:
            own = dataclasses.replace(
                first,
                names=dataclasses.replace(first.names, own=uuid.uuid4().hex[:12]),
                module=others(checkpoint),
                trainer=serialized(checkpoint),
                versions=versions,
                aside="",
                claim=None,
            )
            refuse_changes(engine, checkpoint["state_dict"])
            _refuse_others(folder)
            beside = functools.partial(_save_beside, saving.plan.folder, folder, own)
            taken = not os.path.isfile(folder.path) and saving.also(beside)
        except Exception:  # what cannot be pickled, or saved there: saving it on its own tells all ranks
            taken = False
    return bool(_exchange(engine, json.dumps(taken))[0])


def _save_beside(source: Folder, folder: Folder, contents: Contents, files: Sequence[FileInfo]) -> None:
    """Make a complete checkpoint whose shards are those of another.

    Raises:
        AnotherError: If it cannot be; what was there before stays.
    """
    shards = [info for info in files if info.path in {contents.names.shard(i) for i in range(contents.names.shards)}]
    made: list[str] = []
    try:
        folder.make()
        contents = dataclasses.replace(contents, claim=Claim(folder))
        for info in shards:
            if not folder.exists(info.path):  # else it is the same: an older manifest may name it
                made.append(info.path)
                folder.link(source, info.path)
        made.append(contents.names.module)
        rest = [write_safetensors(folder, contents.names.module, contents.module)]
        made.append(contents.names.trainer)
        rest.append(write_bytes(folder, contents.names.trainer, contents.trainer))
        _commit(folder, contents, [*shards, *rest])
    except OSError as problem:
        if contents.names.trainer not in _files_of(folder):
            folder.remove(made)
        if contents.claim is not None:
            contents.claim.release()
        raise AnotherError(f"{folder.url} was not saved: {problem}") from problem


def _refuse_others(folder: Folder) -> None:
    """Refuse to save beside files that are not of a checkpoint, before anything is written.

    Raises:
        FileExistsError: If there are any, and no checkpoint.
    """
    if not folder.fs.isdir(folder.path) or folder.exists(MANIFEST):
        return
    others = sorted(name for name in folder.names() if name and not _left_over(name))
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise FileExistsError(
            f"{folder.url} is a folder that is no checkpoint, with {', '.join(map(repr, others[:3]))}{more} in it: "
            "give the checkpoint another name, or move what is there. Nothing has been written"
        )


def _left_over(name: str) -> bool:
    """Whether a file is what a save that was killed may leave."""
    return bool(_OURS.fullmatch(name)) or name.startswith(MANIFEST)


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
