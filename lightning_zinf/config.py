"""Every option of the strategy, as frozen dataclasses.

Each field is documented under ``Args``: LightningCLI turns the text into the command line's help, so there is one
place for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Offload = Literal["auto", "none", "cpu", "nvme"]
OffloadActivations = Literal["none", "cpu", "nvme"]
Tier = Literal["device", "host", "nvme"]
Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]


def _check_positive(name: str, value: object, more: str = "") -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value <= 0):
        raise ValueError(f"{name} must be a positive whole number of bytes or None{more}, got {value!r}")


@dataclass(frozen=True)
class MemoryConfig:
    """How much memory the engine may use for pages, and how the model is cut into units.

    Args:
        host_bytes: Budget in bytes of host memory. Where ``offload_*`` is ``"auto"`` it bounds all that the engine
            keeps: weights, gradients, optimizer state, and what they pass through; units that do not fit go to NVMe,
            and ``None`` takes 60 % of the free memory. Where they are all given it bounds only what pages pass
            through (gathered weights on a CPU accelerator, staging for optimizer state), and ``None`` takes a few
            units' worth, at most a quarter of the free memory.
        device_bytes: Budget in bytes of accelerator memory: with ``"auto"`` for all that the engine keeps there, else
            for gathered weights. ``None`` takes what is given above, of the accelerator's memory. Not used on a CPU
            accelerator.
        unit_bytes: A module subtree without repeated blocks becomes one unit if its parameters are at most this many
            bytes; larger subtrees are cut along their children.
        full_read_bytes: ``model.state_dict()`` or ``copy.deepcopy(model)`` of a paged model larger than this raises
            instead of filling the memory. ``None`` takes half of the free host memory.
        activation_bytes: Budget in bytes for activations on their way: of host memory that they pass through to and
            from NVMe, and of copies from an accelerator. It comes on top of ``host_bytes``. ``None`` takes 256 MiB, at
            most an eighth of the free host memory.
        activation_min_bytes: Smaller saved tensors stay where they are with ``offload_activations``.
    """

    host_bytes: int | None = None
    device_bytes: int | None = None
    unit_bytes: int = 16 * 2**20
    full_read_bytes: int | None = None
    activation_bytes: int | None = None
    activation_min_bytes: int = 64 * 2**10

    def __post_init__(self) -> None:
        _check_positive("memory.host_bytes", self.host_bytes)
        _check_positive("memory.device_bytes", self.device_bytes)
        _check_positive("memory.unit_bytes", self.unit_bytes)
        _check_positive("memory.full_read_bytes", self.full_read_bytes)
        _check_positive("memory.activation_bytes", self.activation_bytes)
        _check_positive("memory.activation_min_bytes", self.activation_min_bytes)


@dataclass(frozen=True)
class OverlapConfig:
    """What runs ahead of the computation.

    Args:
        prefetch: Read units ahead of their use, in the order that the previous step recorded. ``False`` fetches on
            demand (for debugging; results are the same).
        update: When offloaded state is updated; results are the same. ``auto``: in backward, as gradients are complete,
            where nothing needs all of them first (clipping by norm, loss scaling, ``on_after_backward``,
            ``on_before_optimizer_step`` and the like; with several ranks in stages 2 and 3, as gradients are reduced),
            else in the next forward just before the weights are used. ``forward``: always the latter, so that a step
            which fails in backward has changed no weight. ``step``: at once, in ``optimizer.step()`` (for debugging
            and comparison).
        replan: Where ``memory.host_bytes`` is given and tiers are ``"auto"``, measure a few steps and plan once more
            how much of the budget planes get and how much the memory that they pass through; results are the same.
    """

    prefetch: bool = True
    update: Literal["auto", "forward", "step"] = "auto"
    replan: bool = True

    def __post_init__(self) -> None:
        if self.update not in ("auto", "forward", "step"):
            raise ValueError(f"overlap.update must be 'auto', 'forward' or 'step', got {self.update!r}")


@dataclass(frozen=True)
class IOConfig:
    """How files are read and written.

    Args:
        threads: Number of I/O threads.
        queue_depth: Most requests under way at once.
        block_bytes: Size in bytes of the pieces that a request is cut into, and of the stripes over several
            ``nvme_path``.
        backend: ``auto`` takes io_uring where a run-time probe finds it usable and fast, else a pool of threads.
        tile_numel: Elements of optimizer state read, updated and written as one piece.
        direct: Bypass the page cache (O_DIRECT) where the file system allows it.
    """

    threads: int = 8
    queue_depth: int = 64
    block_bytes: int = 2**20
    backend: Literal["auto", "threads", "io_uring"] = "auto"
    tile_numel: int = 2**20
    direct: bool = True

    def __post_init__(self) -> None:
        for name in ("threads", "queue_depth", "block_bytes", "tile_numel"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"io.{name} must be a positive whole number, got {value!r}")
        if self.block_bytes % 4096:
            raise ValueError(f"io.block_bytes must be a multiple of 4096, got {self.block_bytes}")
        if self.tile_numel % 4096:
            raise ValueError(f"io.tile_numel must be a multiple of 4096, got {self.tile_numel}")
        if self.backend not in ("auto", "threads", "io_uring"):
            raise ValueError(f"io.backend must be 'auto', 'threads' or 'io_uring', got {self.backend!r}")


def nvme_paths(
    given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None, root: str | os.PathLike[str]
) -> tuple[str, ...]:
    """Return the folders for NVMe files: the option, else $ZINF_NVME_PATH, else one below the Trainer's root.

    Args:
        given: The option: a folder, several, or None. The environment variable may have several too, with
            ``os.pathsep`` between them.
        root: The Trainer's ``default_root_dir``.

    Raises:
        TypeError: If the option is something else.
        ValueError: If it is an empty list, or has an empty name or a URL.
    """
    if given is None:
        found = os.environ.get("ZINF_NVME_PATH", "").split(os.pathsep)
        return tuple(os.path.expanduser(path) for path in found if path) or (str(Path(root) / "zinf_nvme"),)
    several = [given] if isinstance(given, (str, os.PathLike)) else given
    if not isinstance(several, (list, tuple)) or not all(isinstance(p, (str, os.PathLike)) for p in several):
        raise TypeError(f"nvme_path must be a folder or a list of folders, got {given!r}")
    if not several or not all(os.fspath(path) for path in several):
        raise ValueError(f"nvme_path must name at least one folder, and no empty one, got {given!r}")
    if urls := [path for path in map(os.fspath, several) if "://" in path]:
        raise ValueError(f"nvme_path must be on a disk of this machine, got the URL {urls[0]!r}")
    return tuple(os.path.expanduser(os.fspath(path)) for path in several)


@dataclass(frozen=True)
class CheckpointConfig:
    """How sharded checkpoints are saved.

    Args:
        async_save: Let training go on while a checkpoint that is saved during ``fit`` is being written. It is complete
            at the latest when the next one is saved, when a checkpoint is loaded, and when ``fit`` ends. What goes
            wrong is raised by a later step. ``False`` waits for each one.
        copy_bytes: Host memory in bytes for copies of what training changes before it has been written; beyond that,
            training waits. ``None`` takes a quarter of the free memory, shared by the processes of a machine. What
            copies of float32 weights took is kept for the next save while it is no more than that quarter.
    """

    async_save: bool = True
    copy_bytes: int | None = None

    def __post_init__(self) -> None:
        _check_positive("checkpoint.copy_bytes", self.copy_bytes)


@dataclass(frozen=True)
class TilingConfig:
    """Which layers are computed in tiles, so that only one tile of their weight has to be gathered at once.

    Args:
        max_tile_bytes: Layers whose gathered weight has more bytes are cut into tiles of at most this many: Linear,
            Embedding, convolutions with one group and Conv1D of transformers. ``auto`` takes what the budget of slots
            for gathered weights allows (``memory.device_bytes``, on a CPU accelerator ``memory.host_bytes``, else a
            quarter of the free memory). ``None`` tiles nothing but layers that ask for it (``TiledLinear``).
    """

    max_tile_bytes: int | Literal["auto"] | None = None

    def __post_init__(self) -> None:
        if self.max_tile_bytes != "auto":
            _check_positive("tiling.max_tile_bytes", self.max_tile_bytes, " or 'auto'")


def check_offload(name: str, value: str) -> None:
    """Raise ValueError unless ``value`` is one of the offload targets."""
    choices = ("auto", "none", "cpu", "nvme")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_activations(checkpointing: object, offload: object) -> None:
    """Raise ValueError unless these are values of ``activation_checkpointing`` and ``offload_activations``."""
    names = checkpointing if isinstance(checkpointing, (list, tuple)) else ()
    if not isinstance(checkpointing, (bool, list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"activation_checkpointing must be True, False or a list of class names, got {checkpointing!r}"
        )
    choices = ("none", "cpu", "nvme")
    if offload not in choices:
        raise ValueError(f"offload_activations must be one of {', '.join(map(repr, choices))}, got {offload!r}")


@dataclass(frozen=True)
class PartitionConfig:
    """What decides how a model is partitioned; an engine is reused while this stays the same.

    Attributes:
        device: Where compute runs.
        precision: Lightning's name of the precision.
        offload_params: Where weights rest.
        offload_optimizer: Where optimizer state rests.
        nvme_paths: Folders for what goes to NVMe, which is striped over them.
        units: Class names of modules to take as units.
        memory: Budgets.
        overlap: What runs ahead.
        io: How files are read and written.
        tiling: Which layers are computed in tiles.
        stage: What is partitioned over ranks: 1 optimizer state, 2 also gradients, 3 also weights.
        shard_size: Number of ranks that share one copy of the model; None for all.
        aliased: Whether host and device are one memory; None means: on a CPU.
        activation_checkpointing: Whether to recompute units in backward; or class names of the modules to recompute.
        offload_activations: Where activations go between forward and backward.
    """

    device: torch.device
    precision: Precision = "32-true"
    offload_params: Offload = "auto"
    offload_optimizer: Offload = "auto"
    nvme_paths: tuple[str, ...] = ("zinf_nvme",)
    units: tuple[str, ...] = ()
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    io: IOConfig = field(default_factory=IOConfig)
    tiling: TilingConfig = field(default_factory=TilingConfig)
    stage: int = 3
    shard_size: int | None = None
    aliased: bool | None = None
    activation_checkpointing: bool | tuple[str, ...] = False
    offload_activations: OffloadActivations = "none"
