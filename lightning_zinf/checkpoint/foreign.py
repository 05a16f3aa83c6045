"""Writing a sharded checkpoint of one shard from what somebody else saved."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_zinf import __version__
from lightning_zinf.checkpoint.files import DTYPES, Writer, header, raw_bytes, write_safetensors
from lightning_zinf.checkpoint.folder import Folder
from lightning_zinf.checkpoint.manifest import MANIFEST, Buffer, FileInfo, Manifest

_SHARD, _MODULE, _TRAINER = "shard-00000-of-00001.safetensors", "module.safetensors", "trainer.pt"
Progress = Callable[[int], None]


def write_converted(
    folder: Folder,
    buffers: Sequence[Buffer],
    read: Callable[[Buffer, str], Iterable[Tensor]],
    others: Mapping[str, Tensor],
    names: Sequence[str],
    optimizers: Sequence[Sequence[str]],
    rest: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Write a checkpoint; the manifest comes last.

    Args:
        folder: Where.
        buffers: One for each parameter, which it begins with.
        read: Yields a plane of a buffer, in pieces of any shape and dtype, one after the other.
        others: Tensors that are in no buffer.
        names: The names of the state dict, in its order.
        optimizers: For each optimizer the first name of each of its parameters.
        rest: Everything else that Lightning keeps.
        progress: Called with bytes as they are written.
    """
    folder.make()
    infos: list[FileInfo] = []
    writer = Writer(folder, _SHARD)
    try:
        writer.write(header({f"{b.name}/{p}": (d, (b.numel,)) for b in buffers for p, d in b.planes.items()}))
        for buffer in buffers:
            for plane, dtype in buffer.planes.items():
                left = buffer.numel
                for piece in read(buffer, plane):
                    writer.write(raw_bytes(piece.to(DTYPES[dtype]).contiguous()))
                    progress(piece.nbytes)
                    left -= piece.numel()
                writer.write(raw_bytes(torch.zeros(left, dtype=DTYPES[dtype])))
        infos.append(writer.finish())
    except BaseException:
        writer.abandon()
        raise
    infos.append(write_safetensors(folder, _MODULE, others))
    content = io.BytesIO()
    torch.save(dict(rest), content)
    writer = Writer(folder, _TRAINER)
    try:
        writer.write(content.getvalue())
        infos.append(writer.finish())
    except BaseException:
        writer.abandon()
        raise
    manifest = Manifest(
        (_SHARD,),
        _MODULE,
        _TRAINER,
        tuple(buffers),
        tuple(names),
        tuple(map(tuple, optimizers)),
        {"lightning-zinf": __version__, "torch": str(torch.__version__)},
        tuple(infos),
    )
    folder.replace(MANIFEST, manifest.to_json().encode())
