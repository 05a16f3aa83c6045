"""Reading a sharded checkpoint: any range of any plane, whole parameters, and the rest.

Nothing here needs a process group: a rank that loads its shard and the offline tools read alike.

Note [Averages in checkpoints]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
With ZinfEMA a shard has two values of a weight: its master, and the plane ``ema``. Which of them is the average depends
on whether the two were exchanged when it was saved, as they are in validation and after training: ``trainer.pt`` says
so (``averaging_swapped``), and has the other values of the module's buffers (``averaging_buffers``). As in Lightning's
whole checkpoints ``state_dict`` is the average; the weights of the last step are what training goes on from.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_zinf.checkpoint.files import DTYPES, Reader, verified
from lightning_zinf.checkpoint.folder import Folder
from lightning_zinf.checkpoint.manifest import MANIFEST, Buffer, CheckpointError, FileInfo, Manifest, Stored
from lightning_zinf.optim.average import PLANE
from lightning_zinf.optim.update import master_of


def is_sharded(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> bool:
    """Whether a path is the folder of a sharded checkpoint, complete or not."""
    folder = Folder(path, storage_options)
    return bool(folder.fs.isdir(folder.path))


@dataclass(frozen=True)
class Averages:
    """How a checkpoint has averages of the weights.

    Attributes:
        swapped: Whether the masters are the averages, and the plane has the weights.
        buffers: The module's other buffers: the averages, or if swapped those of the last step.
    """

    swapped: bool
    buffers: Mapping[str, Tensor]

    @staticmethod
    def of(trainer: Mapping[str, Any]) -> Averages | None:
        """Return what a checkpoint says of its averages, or None if it has none."""
        if "averaging_buffers" not in trainer:
            return None
        return Averages(bool(trainer["averaging_swapped"]), trainer["averaging_buffers"])


class Checkpoint:
    """A sharded checkpoint that is open for reading.

    Args:
        path: Its folder, local or remote.
        storage_options: Options for the file system.

    Raises:
        CheckpointError: If it is not complete, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> None:
        self._readers: dict[str, Reader] = {}
        self.folder = Folder(path, storage_options)
        self.url = self.folder.url
        try:
            text = self.folder.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(self._why_none()) from None
        self.manifest = Manifest.from_json(text, f"{self.url}/{MANIFEST}")
        self.infos = {info.path: info for info in self.manifest.files}
        self.locations = self.manifest.locations()
        self._verified: set[str] = set()

    def _why_none(self) -> str:
        """Say what is where a checkpoint was looked for."""
        fs, path = self.folder.fs, self.folder.path
        if fs.isfile(path):
            return (
                f"{self.url} is a file, and a sharded checkpoint is a folder: a file that Lightning saved is whole "
                "already, and loads with load_from_checkpoint or ckpt_path="
            )
        if self.folder.local and not fs.exists(path):
            return f"{self.url} is not there"
        return f"{self.url} has no {MANIFEST}: it is no sharded checkpoint, or one whose saving did not end"

    def __del__(self) -> None:
        """Close the files: a state dict that a hook has kept may be the last to know them."""
        self.close()

    def __enter__(self) -> Checkpoint:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the files."""
        self.close()

    def close(self) -> None:
        """Close the files."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def reader(self, name: str) -> Reader:
        """Return an open file."""
        if name not in self._readers:
            self._readers[name] = Reader(self.folder, self.infos[name])
        return self._readers[name]

    def verify(self, names: Iterable[str]) -> None:
        """Compare files with their checksums, each once for as long as the checkpoint is open.

        Raises:
            CheckpointError: With the first block that is damaged.
        """
        for name in names:
            if name == self.manifest.trainer:
                verified(self.folder, self.infos[name])
            elif name not in self._verified:
                self.reader(name).verify()
                self._verified.add(name)

    # ------------------------------------------------------------------ ranges of planes

    def pieces(self, buffer: Buffer, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Yield ``(file, first element in its shard, end)`` for the elements ``[start, stop)`` of a buffer."""
        shard = buffer.numel // len(self.manifest.shards)
        while start < stop:
            number, inside = divmod(start, shard)
            end = min(shard, inside + stop - start)
            yield self.manifest.shards[number], inside, end
            start += end - inside

    def plane(self, buffer: Buffer, plane: str, start: int, stop: int) -> Tensor:
        """Return the elements ``[start, stop)`` of a plane."""
        found = torch.empty(stop - start, dtype=DTYPES[buffer.planes[plane]])
        self.fill(buffer, plane, start, found)
        return found

    def fill(self, buffer: Buffer, plane: str, start: int, out: Tensor) -> None:
        """Fill a tensor, of any dtype and device, with the elements of a plane from ``start`` on."""
        wanted = DTYPES[buffer.planes[plane]]
        if out.dtype != wanted or not out.is_cpu or not out.is_contiguous():
            out.copy_(self.plane(buffer, plane, start, start + out.numel()))
            return
        at = 0
        for name, low, high in self.pieces(buffer, start, start + out.numel()):
            reader, tensor = self.reader(name), f"{buffer.name}/{plane}"
            if reader.dtype(tensor) != wanted:
                raise CheckpointError(
                    f"{self.url}/{name}: plane {plane!r} of {buffer.name!r} is {reader.dtype(tensor)}, and the "
                    f"manifest has {buffer.planes[plane]}"
                )
            reader.fill(tensor, low, out[at : at + high - low])
            at += high - low

    def master(self, buffer: Buffer, start: int, stop: int) -> Tensor:
        """Return the float32 masters of the elements ``[start, stop)``."""
        low: dict[str, Tensor] = {
            p: self.plane(buffer, p, start, stop) for p in ("residual", "master") if p in buffer.planes
        }
        return master_of(self.plane(buffer, "weight", start, stop), low).float()

    def values(self, buffer: Buffer, start: int, stop: int, averages: Averages | None, average: bool) -> Tensor:
        """Return float32 values of the elements ``[start, stop)``.

        Args:
            buffer: The buffer.
            start: First element.
            stop: The end.
            averages: How the checkpoint has averages.
            average: Return averages, if there are any, and not the weights of the last step.
        """
        if averages is None or averages.swapped == average or PLANE not in buffer.planes:
            return self.master(buffer, start, stop)
        return self.plane(buffer, PLANE, start, stop)

    def fill_values(self, buffer: Buffer, start: int, out: Tensor, averages: Averages | None, average: bool) -> None:
        """Fill a float32 tensor with what :meth:`values` would return, without a copy where a plane has just that."""
        if averages is not None and averages.swapped != average and PLANE in buffer.planes:
            self.fill(buffer, PLANE, start, out)
        elif "residual" in buffer.planes:
            out.copy_(self.master(buffer, start, start + out.numel()))
        else:
            self.fill(buffer, "master" if "master" in buffer.planes else "weight", start, out)

    # ------------------------------------------------------------------ whole things

    def tensor(self, name: str, plane: str | None = None) -> Tensor:
        """Return a parameter, or a plane of its state, whole; or a tensor that is in no buffer.

        Raises:
            KeyError: If there is none of that name.
        """
        if name not in self.locations:
            reader = self.reader(self.manifest.module)
            if name not in reader.tensors:
                raise KeyError(name)
            return reader.read(name).view(reader.shape(name))
        stored = self.locations[name]
        return self.elements(stored, 0, stored.numel, plane).view(stored.shape)

    def elements(
        self,
        stored: Stored,
        start: int,
        stop: int,
        plane: str | None = None,
        averages: Averages | None = None,
        average: bool = False,
    ) -> Tensor:
        """Return the elements ``[start, stop)`` of a parameter, in its own dtype, or of a plane of its state.

        Args:
            stored: The parameter.
            start: First element.
            stop: The end.
            plane: Name of the plane; None for values.
            averages: How the checkpoint has averages.
            average: Whether values are averages, if there are any.
        """
        parts = [
            self.values(b, low, low + n, averages, average).to(DTYPES[stored.dtype])
            if plane is None
            else self.plane(b, plane, low, low + n)
            for b, low, n in stored.runs(start, stop)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def names(self) -> list[str]:
        """Return every name of the state dict, in its order."""
        return list(self.manifest.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an entry of the state dict."""
        found = self.locations.get(name)
        return self.reader(self.manifest.module).shape(name) if found is None else found.shape

    def params(self) -> list[Stored]:
        """Return every parameter once."""
        return self.manifest.stored()

    def trainer(self, weights_only: bool | None = None) -> dict[str, Any]:
        """Return everything that is no tensor of the model or the optimizers."""
        content = verified(self.folder, self.infos[self.manifest.trainer])
        loaded: dict[str, Any] = torch.load(
            io.BytesIO(content), map_location="cpu", weights_only=True if weights_only is None else weights_only
        )
        return loaded

    def info(self, name: str) -> FileInfo:
        """Return what the manifest says of a file."""
        return self.infos[name]


class ShardedStateDict(dict[str, Any]):
    """A state dict whose tensors are read when they are asked for.

    It is what hooks see as ``checkpoint["state_dict"]``: keys may be removed, or given other values.

    Args:
        source: The checkpoint.
        averages: How it has averages, which are the values then.
    """

    def __init__(self, source: Checkpoint, averages: Averages | None = None) -> None:
        super().__init__(dict.fromkeys(source.names()))
        self.source, self.averages = source, averages
        if averages is not None and not averages.swapped:
            self.update({name: value for name, value in averages.buffers.items() if name in self})

    def __getitem__(self, name: str) -> Any:
        """Return a tensor, whole."""
        value = super().__getitem__(name)
        if value is not None or self.averages is None or name not in self.source.locations:
            return self.source.tensor(name) if value is None else value
        stored = self.source.locations[name]
        return self.source.elements(stored, 0, stored.numel, None, self.averages, average=True).view(stored.shape)

    def read(self, buffer: Buffer, start: int, stop: int) -> Tensor:
        """Return the float32 values of the elements ``[start, stop)`` of a buffer of the checkpoint."""
        return self.source.values(buffer, start, stop, self.averages, average=True)

    def fill(self, buffer: Buffer, start: int, out: Tensor) -> None:
        """Fill a float32 tensor with the values of elements of a buffer of the checkpoint, from ``start`` on."""
        self.source.fill_values(buffer, start, out, self.averages, average=True)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""
        value = super().__getitem__(name)
        return self.source.shape(name) if value is None else tuple(value.shape)

    def changed(self) -> dict[str, Tensor]:
        """Return the entries that somebody has put other values into."""
        return {name: value for name, value in super().items() if value is not None}

    def items(self) -> Any:
        """Yield names and tensors, one at a time."""
        return ((name, self[name]) for name in self)

    def values(self) -> Any:
        """Yield tensors, one at a time."""
        return (self[name] for name in self)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a tensor, or ``default``."""
        return self[name] if name in self else default  # noqa: SIM401  # this is what it is made of
