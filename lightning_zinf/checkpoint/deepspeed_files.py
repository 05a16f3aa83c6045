"""Reading checkpoints of DeepSpeed, ZeRO-1, 2 and 3, without deepspeed and without a whole file in memory.

Note [What DeepSpeed writes]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Each rank has a file with its part of the float32 masters and of the optimizer's state, as flat tensors without names.
``param_shapes`` beside the model says which parameters are in them, in which order.

- Stages 1 and 2: a flat tensor for each param group, cut into equal parts. The masters lack padding at the end, the
  optimizer's state has it. Since 0.19 each parameter may be followed by padding of its own. With
  ``round_robin_gradients`` the order is not that of the param group.
- Stage 3: a flat tensor for each sub-group, and a param group has several. Every parameter is cut into equal parts, the
  last one padded, so a rank has the same range of every parameter. The names of those that are frozen, and the ranks'
  parts of them, are beside the model.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_zinf.checkpoint.files import NAMES
from lightning_zinf.checkpoint.manifest import CheckpointError
from lightning_zinf.checkpoint.unpickle import restricted_load

_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_CHUNK = 1 << 22
"""Elements that are copied at a time."""
_PREFIX = "_forward_module."
"""What Lightning before 2.1 put before every name."""


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in the ranks' flat tensors.

    Attributes:
        shape: Its shape.
        group: Number of the flat tensor: of the param group, or of the sub-group in stage 3.
        spans: ``(rank, first element, end)`` of its parts, in its order.
    """

    shape: tuple[int, ...]
    group: int
    spans: tuple[tuple[int, int, int], ...]


class DeepSpeedCheckpoint:
    """A checkpoint of DeepSpeed that is open for reading.

    Args:
        path: The folder that was saved to, with a file ``latest``, or the one of a step in it.

    Raises:
        CheckpointError: If it is none, has parts that cannot be converted, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.folder = _step_folder(Path(path))
        self.optimizers = [restricted_load(file) for file in _rank_files(self.folder)]
        try:
            self.states = [o["optimizer_state_dict"] for o in self.optimizers]
            self.stage = _stage(self.states[0])
            self.models = [restricted_load(file) for file in self._model_files()]
            self.model = self.models[0]
            self.groups: list[dict[str, tuple[int, ...]]] = [
                {_name(n): tuple(s) for n, s in shapes.items()} for shapes in self.model["param_shapes"]
            ]
            self.module = {_name(n): value for n, value in self.model["module"].items()}
            self.places = self._places()
            self.frozen = self._frozen()
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{self.folder} is damaged, or of a version of DeepSpeed that is not known: {type(error).__name__}: "
                f"{error}"
            ) from None

    def _model_files(self) -> list[Path]:
        counts = self.states[0]["partition_count"]
        expected = max(counts) if isinstance(counts, (list, tuple)) else int(counts)
        if expected != len(self.states):
            raise CheckpointError(f"{self.folder} was saved by {expected} ranks, and has files of {len(self.states)}")
        if self.stage < 3:
            return [self.folder / "mp_rank_00_model_states.pt"]
        return [self.folder / f"zero_pp_rank_{r}_mp_rank_00_model_states.pt" for r in range(len(self.states))]

    # ------------------------------------------------------------------ flat tensors

    def masters(self, rank: int, group: int) -> Tensor:
        """Return a rank's part of the float32 masters."""
        found = self.states[rank]["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"][group]
        assert isinstance(found, Tensor), found
        return found

    def base(self, rank: int) -> dict[str, Any]:
        """Return what torch.optim calls a state dict, of a rank's flat tensors."""
        found = self.states[rank]["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.folder} is an elastic checkpoint of DeepSpeed, which cannot be converted")
        return found

    def entry(self, group: int, rank: int = 0) -> dict[str, Any]:
        """Return the optimizer's state of a flat tensor, empty before the first step."""
        return dict(self.base(rank)["state"].get(group) or {})

    def planes(self, group: int) -> list[str]:
        """Return the names of state that has an element for each one of a flat tensor."""
        least = self.masters(0, group).numel()
        return [k for k, v in self.entry(group).items() if isinstance(v, Tensor) and v.dim() and v.numel() >= least]

    def flat(self, rank: int, group: int, plane: str) -> Tensor:
        """Return a rank's part of a plane."""
        found: Tensor = self.masters(rank, group) if plane == "weight" else self.entry(group, rank)[plane]
        return found

    def _places(self) -> dict[str, Place]:
        found: dict[str, Place] = {}
        for group, shapes in enumerate(self.groups):
            found.update((self._parts if self.stage == 3 else self._cuts)(group, shapes))
            for rank in range(len(self.states)):
                self._check(group, rank, [s for n in shapes for s in found[n].spans if s[0] == rank])
        return found

    def _cuts(self, group: int, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Place]]:
        """Yield places in a flat tensor that is cut into equal parts."""
        size = max(self.masters(rank, group).numel() for rank in range(len(self.states)))
        padding = (self.states[0].get("param_alignment_paddings") or {group: [0] * len(shapes)})[group]
        start = 0
        for (name, shape), after in zip(shapes.items(), padding, strict=True):
            spans, at, end = [], start, start + math.prod(shape)
            while at < end and size:
                rank, low = divmod(at, size)
                if rank == len(self.states):
                    raise CheckpointError(self._short(group, start + math.prod(shape), size * rank))
                high = min(size, low + end - at)
                spans.append((rank, low, high))
                at += high - low
            yield name, Place(shape, group, tuple(spans))
            start = end + after

    def _parts(self, group: int, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Place]]:
        """Yield places of parameters that are cut one by one."""
        start, world = 0, len(self.states)
        for name, shape in shapes.items():
            numel = math.prod(shape)
            part = -(-numel // world)
            yield name, Place(shape, group, tuple(_split(numel, part, world, start)))
            start += part

    def _check(self, group: int, rank: int, spans: Sequence[tuple[int, int, int]]) -> None:
        needed = max((high for _, _, high in spans), default=0)
        for plane in ("weight", *self.planes(group)):
            if (have := self.flat(rank, group, plane).numel()) < needed:
                raise CheckpointError(self._short(group, needed, have))

    def _short(self, group: int, needed: int, have: int) -> str:
        return (
            f"{self.folder}: {needed} elements are needed of flat tensor {group}, and there are {have}. If the "
            "optimizer's state was on NVMe, DeepSpeed did not save it in these files"
        )

    # ------------------------------------------------------------------ parameters

    @cached_property
    def shared(self) -> dict[str, str]:
        """The names of tied parameters, and of those that they are tied to."""
        found = self.model.get("shared_params") or {}
        pairs = found.items() if isinstance(found, Mapping) else found
        return {_name(a): _name(b) for a, b in pairs}

    def _frozen(self) -> dict[str, Place | Tensor]:
        """Return what is not trained: parts in stage 3, or a tensor."""
        found: dict[str, Place | Tensor] = {}
        buffers = {_name(n) for n in self.model.get("buffer_names") or ()}
        shapes = {_name(n): tuple(s) for n, s in (self.model.get("frozen_param_shapes") or {}).items()}
        for name, value in self.module.items():
            if name in buffers or name in self.places or name in self.shared or not isinstance(value, Tensor):
                continue
            if self.stage < 3 or (value.numel() and name not in shapes):
                found[name] = value
                continue
            if name not in shapes:
                raise CheckpointError(f"{self.folder} has no values for parameter {name!r}")
            numel, world = math.prod(shapes[name]), len(self.models)
            place = Place(shapes[name], -1, tuple(_split(numel, -(-numel // world), world, 0)))
            if short := [r for r, _, high in place.spans if self._fragment(r, name).numel() < high]:
                raise CheckpointError(f"{self.folder}: rank {short[0]} has too little of frozen parameter {name!r}")
            found[name] = place
        return found

    def _fragment(self, rank: int, name: str) -> Tensor:
        fragments = self.models[rank]["frozen_param_fragments"]
        found: Tensor = fragments[name] if name in fragments else fragments[_PREFIX + name]
        return found

    def dtype(self, name: str) -> str:
        """Return the dtype of a frozen parameter, as safetensors names it, or "" if it has none there."""
        value = self.frozen[name]
        return NAMES.get((value if isinstance(value, Tensor) else self._fragment(0, name)).dtype, "")

    def chunks(self, name: str, plane: str) -> Iterator[Tensor]:
        """Yield the elements of a parameter, or of a plane of its state."""
        place = self.places.get(name) or self.frozen[name]
        if isinstance(place, Tensor):
            yield from place.reshape(-1).split(_CHUNK)
            return
        for rank, low, high in place.spans:
            flat = self._fragment(rank, name) if place.group < 0 else self.flat(rank, place.group, plane)
            yield from flat.reshape(-1)[low:high].split(_CHUNK)


def _name(name: str) -> str:
    return str(name).removeprefix(_PREFIX)


def _split(numel: int, part: int, world: int, start: int) -> Iterator[tuple[int, int, int]]:
    """Yield where the ranks have a parameter that is cut into parts of ``part`` elements."""
    for rank in range(world):
        if (count := min(part, numel - rank * part)) > 0:
            yield rank, start, start + count


def _stage(state: Mapping[str, Any]) -> int:
    if "zero_stage" not in state:
        if "single_partition_of_fp32_groups" in state:
            return 1  # BF16_Optimizer does not say
        raise KeyError("zero_stage")
    stage = state["zero_stage"]
    return int(stage if isinstance(stage, int) else stage.arguments[0])


def _step_folder(path: Path) -> Path:
    """Return the folder with the files.

    Raises:
        CheckpointError: If there is none.
    """
    latest = path / "latest"
    if latest.is_file():
        tag = latest.read_text().strip()
        if tag in ("", ".", "..") or "/" in tag or not (path / tag).is_dir():
            raise CheckpointError(f"{latest} names {tag!r}, and there is no such folder in {path}")
        return path / tag
    if any(path.glob("*_optim_states.pt")):
        return path
    raise CheckpointError(
        f"{path} has neither a file 'latest' nor *_optim_states.pt: it is no checkpoint that DeepSpeed saved with ZeRO"
    )


def _rank_files(folder: Path) -> list[Path]:
    """Return the optimizer's file of each rank.

    Raises:
        CheckpointError: If one is missing, or there are files of another kind of parallelism.
    """
    if strange := sorted(p.name for p in folder.iterdir() if re.match(r"layer_|expp_rank|expert_", p.name)):
        raise CheckpointError(f"{folder} has {strange[0]}: pipelines and experts of DeepSpeed cannot be converted")
    found: dict[int, Path] = {}
    for file in sorted(folder.glob("*_optim_states.pt")):
        match = _OPTIMIZER.fullmatch(file.name)
        if match is None or int(match[2]):
            raise CheckpointError(f"{file} is of a model that DeepSpeed ran with model parallelism: not convertible")
        if int(match[1]) in found:
            raise CheckpointError(f"{folder} has {found[int(match[1])].name} and {file.name}: remove the older one")
        found[int(match[1])] = file
    if not found or sorted(found) != list(range(len(found))):
        raise CheckpointError(f"{folder} has files of ranks {sorted(found)}: some are missing")
    return [found[rank] for rank in sorted(found)]
