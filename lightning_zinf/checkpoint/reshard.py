"""The same checkpoint in another number of shards, with bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lightning_zinf.checkpoint.files import DTYPES, Writer, header, raw_bytes, verified
from lightning_zinf.checkpoint.folder import Folder
from lightning_zinf.checkpoint.manifest import MANIFEST, Buffer, FileInfo
from lightning_zinf.checkpoint.source import Checkpoint
from lightning_zinf.layout import SHARD_ALIGNMENT, round_up

Progress = Callable[[int], None]
PADDING_BYTES = 256 * 2**20
"""Padding that any checkpoint may have."""


def reshard(
    source: Checkpoint,
    out: str | os.PathLike[str],
    shards: int,
    *,
    chunk_bytes: int = 64 * 2**20,
    progress: Progress = lambda nbytes: None,
) -> None:
    """Write a checkpoint again in ``shards`` shard files.

    Loading needs no such thing: any number of ranks reads any number of shards. It is for file systems that like fewer
    files, or for many ranks that would all read the same one.

    Args:
        source: The checkpoint.
        out: The folder to write.
        shards: Number of shard files.
        chunk_bytes: Bytes that are read at a time.
        progress: Called with bytes as they are written.

    Raises:
        ValueError: If so many shards would be padding for the most part, before anything is written.
    """
    buffers = cut(source.manifest.buffers, shards)
    folder = Folder(out)
    folder.make()
    names = tuple(f"shard-{i:05d}-of-{shards:05d}.safetensors" for i in range(shards))
    infos = [
        _write_shard(source, folder, name, buffers, (i, shards), chunk_bytes, progress) for i, name in enumerate(names)
    ]
    infos += [_copy(source, folder, name) for name in (source.manifest.module, source.manifest.trainer)]
    manifest = replace(source.manifest, shards=names, buffers=buffers, files=tuple(infos))
    folder.replace(MANIFEST, manifest.to_json().encode())


def cut(buffers: Sequence[Buffer], shards: int) -> tuple[Buffer, ...]:
    """Return buffers padded for ``shards`` equal shards, each of a multiple of 4096 bytes of every plane.

    Raises:
        ValueError: If that takes more padding than there are values, and more than 256 MiB.
    """
    least = SHARD_ALIGNMENT // min(DTYPES[d].itemsize for b in buffers for d in b.planes.values())
    padded = tuple(replace(b, numel=round_up(b.numel, least * shards)) for b in buffers)
    values = sum(sum(p.numel for p in b.params) * _itemsize(b) for b in buffers)
    padding = sum(b.numel * _itemsize(b) for b in padded) - values
    room = max(values, PADDING_BYTES)
    each = sum(least * _itemsize(b) for b in buffers)  # a shard file has no less
    if padding > room and shards > 1:
        raise ValueError(
            f"{shards:,} shards would take {padding / 2**20:,.1f} MiB of padding for {values / 2**20:,.1f} MiB of "
            f"values, since each has at least {each:,} bytes of the checkpoint's {len(buffers)} buffers: ask for at "
            f"most {max(1, room // each):,}"
        )
    return padded


def _itemsize(buffer: Buffer) -> int:
    return sum(DTYPES[dtype].itemsize for dtype in buffer.planes.values())


def _write_shard(
    source: Checkpoint,
    folder: Folder,
    name: str,
    buffers: tuple[Buffer, ...],
    which: tuple[int, int],
    chunk_bytes: int,
    progress: Progress,
) -> FileInfo:
    number, shards = which
    writer = Writer(folder, name)
    try:
        tensors = {f"{b.name}/{p}": (d, (b.numel // shards,)) for b in buffers for p, d in b.planes.items()}
        writer.write(header(tensors))
        for old, new in zip(source.manifest.buffers, buffers, strict=True):
            start, stop = number * new.numel // shards, (number + 1) * new.numel // shards
            for plane, dtype in new.planes.items():
                for low in range(start, min(stop, old.numel), chunk_bytes // 4):
                    values = source.plane(old, plane, low, min(low + chunk_bytes // 4, stop, old.numel))
                    writer.write(raw_bytes(values))
                    progress(values.nbytes)
                padding = stop - max(start, min(stop, old.numel))
                writer.write(raw_bytes(torch.zeros(padding, dtype=DTYPES[dtype])))
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


def _copy(source: Checkpoint, folder: Folder, name: str) -> FileInfo:
    writer = Writer(folder, name)
    writer.write(verified(source.folder, source.infos[name]))
    return writer.finish()
