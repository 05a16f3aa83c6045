"""The strategy: Lightning's calls, turned into the engine's.

``lightning_zinf.lightning`` and ``lightning_zinf.pl`` make a class of this body for each of Lightning's two packages.
It does no tensor arithmetic, and keeps no state that the engine has: a module's engine outlives the Trainer, so that
``fit`` then ``test`` then ``save_checkpoint``, with one Trainer or several, work on the same weights.
"""

# No `from __future__ import annotations`: LightningCLI reads the annotations of the constructor.
import math
from datetime import timedelta
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_zinf import precision as precisions
from lightning_zinf.checkpoint.full import full_state_dict
from lightning_zinf.config import (
    CheckpointConfig,
    IOConfig,
    MemoryConfig,
    Offload,
    OffloadActivations,
    OverlapConfig,
    TilingConfig,
    check_activations,
    check_offload,
    nvme_paths,
)
from lightning_zinf.engine.partition import forget
from lightning_zinf.engine.shared_pages import SharedPager
from lightning_zinf.optim.binding import binding_of
from lightning_zinf.strategy_setup import SetupPart


def _check_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a lightning_zinf.{kind.__name__}, got {value!r}")


class ZinfStrategyBody(SetupPart):
    """ZeRO-Infinity: trains models larger than the accelerator's memory, unchanged.

    Parameters, gradients and optimizer state live on the device, in host memory or on NVMe, wherever there is room, and
    come when they are used. Use it as ``Trainer(strategy="zinf")``, or as an object to set options.

    Args:
        stage: What is partitioned: 1 optimizer state, 2 also gradients, 3 also weights. Stages 1 and 2 keep the weights
            on the device.
        offload_params: Where weights rest. ``auto`` takes the fastest tier with room, ``none`` the device, ``cpu`` host
            memory, ``nvme`` files below ``nvme_path``. Stages 1 and 2 take ``auto`` for ``none``.
        offload_optimizer: Where optimizer state rests, with the same choices.
        activation_checkpointing: True has each unit that is made of several modules (the repeated blocks of a network)
            keep only its inputs in forward, and compute the rest again in backward; a list of class names says which
            modules do so instead. Results keep their bits.
        offload_activations: Where activations go between forward and backward: ``none`` leaves them on the device,
            ``cpu`` takes them to host memory, ``nvme`` to files below ``nvme_path``. With ``activation_checkpointing``
            the inputs of the units go, without it all large tensors that autograd saves. On a CPU, host memory is where
            they are, so ``cpu`` does what ``none`` does.
        nvme_path: Folder on a fast local disk, or a list of folders on several, which are read and written at once. By
            default the environment variable ZINF_NVME_PATH (several folders with ``:`` between them), else
            ``zinf_nvme`` in the Trainer's ``default_root_dir``.
        units: Class names of modules whose parameters are gathered and released together. By default the repeated
            blocks of the model.
        memory: Budgets for memory that weights and state pass through.
        overlap: What runs ahead of the computation.
        io: How files are read and written.
        tiling: Which layers are computed in tiles, so that a layer may be larger than the memory for gathered weights.
        shard_size: Number of ranks that share one copy of the model; the groups of ranks have one copy each (hybrid
            sharding), as for ranks of one node each. By default all ranks share one. It must divide the number of
            ranks.
        process_group_backend: Backend of torch.distributed; by default ``gloo`` on a CPU, and on CUDA ``nccl`` with
            ``gloo`` for tensors in host memory. One process makes no process group.
        timeout: Longest time to wait for other ranks.
        start_method: How to start the processes: ``popen`` runs the script again for each, ``spawn``, ``fork`` and
            ``forkserver`` start copies of this process (``fork`` works in a notebook). One process starts no other.
        state_dict_type: What checkpoints are. ``full``: one file as any strategy writes it, whose saving needs memory
            for the whole model. ``sharded``: a folder that every rank streams its shard to, which loads into any number
            of ranks and which ``zinf consolidate`` turns into one file. ``auto`` takes ``sharded`` where there are
            several ranks or anything rests on NVMe, and ``full`` elsewhere. Either is loaded.
        checkpoint: How sharded checkpoints are saved.
        debug: Print what moved, and how long the computation waited for it, at the end of every run.

    Raises:
        ValueError: If an option has a value that it cannot have, or that goes against another one.
    """

    strategy_name = "zinf"

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 3,
        offload_params: Offload = "auto",
        offload_optimizer: Offload = "auto",
        activation_checkpointing: bool | list[str] = False,
        offload_activations: OffloadActivations = "none",
        nvme_path: str | list[str] | None = None,
        units: list[str] | None = None,
        memory: MemoryConfig = MemoryConfig(),  # noqa: B008  # frozen, and LightningCLI shows its fields
        overlap: OverlapConfig = OverlapConfig(),  # noqa: B008
        io: IOConfig = IOConfig(),  # noqa: B008
        tiling: TilingConfig = TilingConfig(),  # noqa: B008
        shard_size: int | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        state_dict_type: Literal["auto", "full", "sharded"] = "auto",
        checkpoint: CheckpointConfig = CheckpointConfig(),  # noqa: B008
        debug: bool = False,
    ) -> None:
        if timeout is not None and not isinstance(timeout, timedelta):
            raise ValueError(f"timeout must be a datetime.timedelta or None, got {timeout!r}")
        if start_method not in ("popen", "spawn", "fork", "forkserver"):
            raise ValueError(f"start_method must be 'popen', 'spawn', 'fork' or 'forkserver', got {start_method!r}")
        super().__init__(
            process_group_backend=process_group_backend, timeout=timeout or timedelta(days=1), start_method=start_method
        )
        self.state_dict_type = state_dict_type
        self.checkpoint = checkpoint
        self.stage = stage
        self.shard_size = shard_size
        self.start_method = start_method
        self._failed = False
        self._joined = False
        self._signals = None
        self._building: SharedPager | None = None
        self.offload_params = offload_params
        self.offload_optimizer = offload_optimizer
        self.activation_checkpointing = activation_checkpointing
        self.offload_activations = offload_activations
        self.nvme_path = nvme_path
        self.units = units
        self.memory = memory
        self.overlap = overlap
        self.io = io
        self.tiling = tiling
        self.debug = debug
        self._check_options()

    def _check_options(self) -> None:
        """Refuse what options cannot be, once for all that use them."""
        shard_size, stage, units = self.shard_size, self.stage, self.units
        if shard_size is not None and (not isinstance(shard_size, int) or shard_size < 1):
            raise ValueError(f"shard_size must be a positive number of ranks or None, got {shard_size!r}")
        if stage not in (1, 2, 3) or isinstance(stage, bool):
            raise ValueError(f"stage must be 1, 2 or 3, got {stage!r}")
        check_offload("offload_params", self.offload_params)
        check_offload("offload_optimizer", self.offload_optimizer)
        check_activations(self.activation_checkpointing, self.offload_activations)
        if stage < 3 and self.offload_params in ("cpu", "nvme"):
            raise ValueError(
                f"offload_params={self.offload_params!r} needs stage=3: stages 1 and 2 keep weights on the device"
            )
        _check_kind("memory", self.memory, MemoryConfig)
        _check_kind("overlap", self.overlap, OverlapConfig)
        _check_kind("io", self.io, IOConfig)
        _check_kind("checkpoint", self.checkpoint, CheckpointConfig)
        _check_kind("tiling", self.tiling, TilingConfig)
        if isinstance(units, str) or not all(isinstance(unit, str) for unit in units or ()):
            raise ValueError(f"units must be a list of class names, got {units!r}")
        if self.state_dict_type not in ("auto", "full", "sharded"):
            raise ValueError(f"state_dict_type must be 'auto', 'full' or 'sharded', got {self.state_dict_type!r}")
        nvme_paths(self.nvme_path, ".")

    @classmethod
    def precision_class(cls) -> Any:
        """Return the precision plugin for the same Lightning package."""
        raise NotImplementedError

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register the presets, and not those of the base class."""
        import lightning_zinf_boot

        lightning_zinf_boot.register(strategy_registry, cls.__module__)

    # ------------------------------------------------------------------ for users

    def grad_norm(self, optimizer: Any | None = None) -> float:
        """Return the 2-norm of the gradients as they are now, before clipping.

        ``torch.nn.utils.clip_grad_norm_`` and ``lightning.pytorch.utilities.grad_norm`` see only gradients that rest in
        ``p.grad``; this sees all of them. Call it in ``on_before_optimizer_step``.

        Args:
            optimizer: Whose parameters; all optimizers by default.
        """
        optimizers = self.optimizers if optimizer is None else [optimizer]
        return math.sqrt(sum(binding_of(o).grad_norm() ** 2 for o in optimizers))

    def clip_grad_norm_(self, max_norm: float, optimizer: Any | None = None) -> float:
        """Have the coming step of an optimizer clip its gradients to a norm, and return their norm before.

        For manual optimization, as ``torch.nn.utils.clip_grad_norm_`` would, wherever gradients are. With several
        ranks, all of them must call it.

        Args:
            max_norm: Largest norm of all gradients of the optimizer as one vector.
            optimizer: Whose; may be left out if there is one.

        Raises:
            ValueError: If there are several optimizers and none is named.
        """
        if optimizer is None:
            if len(self.optimizers) != 1:
                raise ValueError(f"clip_grad_norm_: say which of the {len(self.optimizers)} optimizers is meant")
            optimizer = self.optimizers[0]
        return binding_of(optimizer).clip_by_norm(float(max_norm))

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return the module's state dict with every weight whole, as float32 masters on the CPU.

        With several ranks, all of them must call it.
        """
        return full_state_dict(self.engine)

    # ------------------------------------------------------------------ precision

    @property
    def precision_plugin(self) -> Any:
        """The precision plugin, which is always ours."""
        if self._precision_plugin is None:
            self._precision_plugin = self.precision_class()("32-true", self)
        return self._precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any | None) -> None:
        self._precision_plugin = None if plugin is None else precisions.replace(plugin, self)

    # ------------------------------------------------------------------ steps

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's training step."""
        self._follow_plan(args)
        with self.explaining_memory(), self.engine.frame("train") as outputs:
            outputs.append(super().training_step(*args, **kwargs))
        return outputs[-1]

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's validation step."""
        with self.engine.frame("validate") as outputs:
            outputs.append(super().validation_step(*args, **kwargs))
        return outputs[-1]

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's test step."""
        with self.engine.frame("test") as outputs:
            outputs.append(super().test_step(*args, **kwargs))
        return outputs[-1]

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's predict step."""
        with self.engine.frame("predict") as outputs:
            outputs.append(super().predict_step(*args, **kwargs))
        return outputs[-1]

    # ------------------------------------------------------------------ the end

    def on_exception(self, exception: BaseException) -> None:
        """Get the engine ready for whatever comes next."""
        self._release_signals()
        self._building = None
        if self._engine is not None:
            self._end_measuring()
            self._engine.reset()
            if self._engine.rounds is not None:
                self._failed = True
                kind, text = type(exception).__name__, str(exception)[:500]
                self._engine.rounds.channel.abort(f"rank {self.global_rank} stopped with {kind}: {text}")
                if self._engine.saving is not None:
                    self._engine.saving.abandon()  # other ranks may not come any more

    def teardown(self) -> None:
        """Finish what is under way.

        The module stays partitioned: its weights and its optimizer state stay where they are, so that using and saving
        it after ``fit`` works. The base class would move all of it to the CPU.

        Raises:
            OSError: On all ranks, if a checkpoint that was being saved in the background cannot be.
        """
        self._end_signals("the end of a run without training")
        try:
            self._end_saving()
        finally:
            self._tear_down()

    def _tear_down(self) -> None:
        engine = self._engine
        if engine is not None:
            engine.flush()
            engine.end_run()
            if self.debug:
                counted = "\n".join(f"  {name:<22}  {value:,.6g}" for name, value in engine.counters.snapshot().items())
                rank_zero_info(f"zinf counters:\n{counted}")
            assert self.lightning_module is not None
            if self._layer_sync and not self._alone and self.lightning_module.trainer.state.fn == "fit":
                # As DDP does: after fit the module has to work without other ranks.
                self.model = self._layer_sync.revert(self.lightning_module)
            if self._start_method != "popen" and not self._alone and not self._failed:
                forget(self.lightning_module)  # the launcher takes the whole state dict to the main process
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
