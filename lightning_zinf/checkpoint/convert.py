"""To and from torch.distributed.checkpoint, as Lightning's ModelParallelStrategy (FSDP2) lays it out.

One tensor is in memory at a time, either way. What is written for FSDP2 is ``state_dict`` and ``optimizer_<n>``, keyed
by names of parameters, beside ``meta.pt`` with the rest. What comes from there becomes a checkpoint of one shard with a
buffer for each parameter.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from lightning_zinf.checkpoint.consolidate import Piece
from lightning_zinf.checkpoint.files import NAMES
from lightning_zinf.checkpoint.folder import Folder
from lightning_zinf.checkpoint.foreign import write_converted
from lightning_zinf.checkpoint.manifest import ITEMSIZES, Buffer, CheckpointError, Param, Stored
from lightning_zinf.checkpoint.source import Averages, Checkpoint
from lightning_zinf.optim.average import PLANE

_META = "meta.pt"
_MODEL, _OPTIMIZER = "state_dict.", "optimizer_"
Progress = Callable[[int], None]


class _StreamingPlanner(DefaultSavePlanner):
    """Reads a tensor when it is about to be written.

    Args:
        source: The checkpoint.
        pieces: What tensors stand for, by ``id``.
        progress: Called with bytes as they are read.
    """

    def __init__(self, source: Checkpoint, pieces: Mapping[int, Piece], progress: Progress) -> None:
        super().__init__()
        self._source, self._pieces, self._progress = source, pieces, progress

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the values of what ``index`` names."""
        found = super().lookup_object(index)
        piece = self._pieces.get(id(found))
        if piece is None:
            return found
        values = piece.read(self._source, 0, piece.param.numel).view(piece.param.shape)
        self._progress(values.nbytes)
        return values


def to_dcp(
    source: Checkpoint,
    out: str | os.PathLike[str],
    *,
    trust_pickle: bool = False,
    progress: Progress = lambda nbytes: None,
) -> None:
    """Write a checkpoint of torch.distributed.checkpoint that FSDP2 resumes from.

    Args:
        source: The sharded checkpoint.
        out: The folder to write.
        trust_pickle: Load objects of any class that callbacks or hyper-parameters have.
        progress: Called with bytes as they are written.
    """
    pieces: dict[int, Piece] = {}

    def later(param: Stored, plane: str | None) -> Tensor:
        piece = Piece(param, plane, averages)  # training goes on from the weights of the last step
        tensor = torch.empty(param.shape, dtype=piece.dtype)  # memory that nobody touches
        pieces[id(tensor)] = piece
        return tensor

    rest = source.trainer(weights_only=not trust_pickle)
    averages = Averages.of(rest)
    model = {
        name: later(source.locations[name], None) if name in source.locations else source.tensor(name)
        for name in source.names()
    }
    state: dict[str, Any] = {"state_dict": model}
    for number, (optimizer, names) in enumerate(
        zip(rest.pop("optimizer_states", []), source.manifest.optimizers, strict=False)
    ):
        entries = {names[i]: dict(entry) for i, entry in optimizer["state"].items()}
        for name, entry in entries.items():
            param = source.locations[name]
            entry.update({p: later(param, p) for p in _optimizer_planes(param)})
        groups = [{**g, "params": [names[i] for i in g["params"]]} for g in optimizer["param_groups"]]
        state[f"{_OPTIMIZER}{number}"] = {"state": entries, "param_groups": groups}
    planner = _StreamingPlanner(source, pieces, progress)
    state_dict_saver.save(state, checkpoint_id=os.fspath(out), planner=planner, **_alone(state_dict_saver.save))
    torch.save(rest, Path(out) / _META)


def _alone(function: Callable[..., Any]) -> dict[str, Any]:
    """Return what has torch ask no other process. If it is too old for that, it asks none before there is a group."""
    return {"no_dist": True} if "no_dist" in inspect.signature(function).parameters else {}


def _optimizer_planes(param: Stored) -> list[str]:
    return [p for p in param.planes if p not in ("weight", "residual", "master", PLANE)]


# ---------------------------------------------------------------------- from there


def from_dcp(
    path: str | os.PathLike[str], out: str | os.PathLike[str], progress: Progress = lambda nbytes: None
) -> None:
    """Write a sharded checkpoint from one of FSDP2 in Lightning.

    Reading one runs code that is in its pickled metadata: only do so with files that you trust.

    Args:
        path: The folder of the checkpoint.
        out: The folder to write.
        progress: Called with bytes as they are written.

    Raises:
        CheckpointError: If it is none, or has nothing that can be converted.
    """
    reader = FileSystemReader(os.fspath(path))
    try:
        metadata = reader.read_metadata()
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no .metadata: it is no checkpoint of torch.distributed") from None
    tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    weights = {k.removeprefix(_MODEL): k for k in tensors if k.startswith(_MODEL)}
    if not weights:
        raise CheckpointError(f"{path} has no tensors below 'state_dict': was it written by ModelParallelStrategy?")
    rest = torch.load(Path(path) / _META, weights_only=True) if (Path(path) / _META).exists() else {}
    optimizers = _optimizers(reader, metadata, weights)
    floats = {n: k for n, k in weights.items() if NAMES.get(tensors[k].properties.dtype) in ITEMSIZES}
    planes = {n: _planes_of(n, optimizers, tensors) for n in floats}
    buffers = tuple(
        Buffer(
            name,
            max(tensors[key].size.numel(), 1),
            {"weight": NAMES[tensors[key].properties.dtype], **dict.fromkeys(planes[name], "F32")},
            (Param((name,), tuple(tensors[key].size), 0, NAMES[tensors[key].properties.dtype]),),
        )
        for name, key in floats.items()
        if planes[name] or any(name in g["params"] for o in optimizers for g in o["param_groups"]) or not optimizers
    )
    _write(reader, tensors, buffers, planes, weights, optimizers, rest, Folder(out), progress)


def _optimizers(reader: Any, metadata: Metadata, weights: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return what is saved of each optimizer beside tensors of a parameter's shape, by names of parameters."""
    found: list[dict[str, Any]] = []
    while any(k.startswith(f"{_OPTIMIZER}{len(found)}.") for k in metadata.state_dict_metadata):
        prefix = f"{_OPTIMIZER}{len(found)}."
        wanted: dict[str, Any] = {}
        stateful: set[str] = set()
        for key, kind in metadata.state_dict_metadata.items():
            if not key.startswith(prefix):
                continue
            if not isinstance(kind, TensorStorageMetadata):
                wanted[key] = None
            elif not kind.size:  # step counts
                wanted[key] = torch.empty(kind.size, dtype=kind.properties.dtype)
            else:  # a plane; for SGD with momentum there is nothing else
                stateful.add(_path(metadata, key)[2])
        state_dict_loader.load(wanted, storage_reader=reader, **_alone(state_dict_loader.load))
        entries: dict[str, dict[str, Any]] = {name: {} for name in sorted(stateful)}
        groups: dict[int, dict[str, Any]] = {}
        for key, value in wanted.items():
            part, where, field = _path(metadata, key)[1:]
            (entries if part == "state" else groups).setdefault(where, {})[field] = value
        if not groups:
            raise CheckpointError(f"optimizer {len(found)} has no param groups in this checkpoint")
        found.append({"state": entries, "param_groups": [groups[i] for i in sorted(groups)], "prefix": prefix})
    return found


def _path(metadata: Metadata, key: str) -> tuple[Any, Any, Any, Any]:
    """Return ``(optimizer, "state" or "param_groups", parameter or number of the group, field)`` for a flat key."""
    path = tuple((metadata.planner_data or {}).get(key, ()))
    if len(path) != 4 or path[1] not in ("state", "param_groups"):
        raise CheckpointError(f"the checkpoint has {key!r}, which is no entry of an optimizer as FSDP2 saves it")
    return path


def _planes_of(name: str, optimizers: list[dict[str, Any]], tensors: Mapping[str, Any]) -> dict[str, str]:
    """Return the key of each plane of a parameter's optimizer state."""
    return {
        key.removeprefix(f"{optimizer['prefix']}state.{name}."): key
        for optimizer in optimizers
        for key, kind in tensors.items()
        if key.startswith(f"{optimizer['prefix']}state.{name}.") and len(kind.size)
    }


def _write(
    reader: Any,
    tensors: Mapping[str, Any],
    buffers: tuple[Buffer, ...],
    planes: Mapping[str, Mapping[str, str]],
    weights: Mapping[str, str],
    optimizers: list[dict[str, Any]],
    rest: dict[str, Any],
    folder: Folder,
    progress: Progress,
) -> None:
    def read(key: str) -> Tensor:
        wanted = {key: torch.empty(tensors[key].size, dtype=tensors[key].properties.dtype)}
        state_dict_loader.load(wanted, storage_reader=reader, **_alone(state_dict_loader.load))
        return wanted[key]

    def planes_of(buffer: Buffer, plane: str) -> Iterator[Tensor]:
        yield read(weights[buffer.name] if plane == "weight" else planes[buffer.name][plane])

    managed = {b.name for b in buffers}
    others = {name: read(key) for name, key in weights.items() if name not in managed}
    names = [[n for g in o["param_groups"] for n in g["params"]] for o in optimizers]
    rest["optimizer_states"] = [_by_number(o, order) for o, order in zip(optimizers, names, strict=True)]
    write_converted(folder, buffers, planes_of, others, list(weights), names, rest, progress)


def _by_number(optimizer: Mapping[str, Any], order: list[str]) -> dict[str, Any]:
    number = {name: i for i, name in enumerate(order)}
    groups = [{**g, "params": [number[n] for n in g["params"]]} for g in optimizer["param_groups"]]
    return {"state": {number[n]: entry for n, entry in optimizer["state"].items()}, "param_groups": groups}
