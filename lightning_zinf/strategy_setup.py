"""Setting the strategy up: from the Trainer's module and the options to a partitioned model with bound optimizers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_zinf import _compat, ops
from lightning_zinf.config import (
    IOConfig,
    MemoryConfig,
    Offload,
    OffloadActivations,
    OverlapConfig,
    PartitionConfig,
    TilingConfig,
    nvme_paths,
)
from lightning_zinf.conversions import guard_conversions
from lightning_zinf.engine.construction import paged_construction
from lightning_zinf.engine.partition import describe_activations, engine_of, forget, partition, tiers
from lightning_zinf.engine.shared_pages import SharedPager
from lightning_zinf.optim.binding import binding_of
from lightning_zinf.optimizers import bind_all, planes_of, rules_of, states_to_keep
from lightning_zinf.planning.report import memory_text
from lightning_zinf.strategy_checkpoints import CheckpointsPart

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_COPIES = "it averages whole copies of the module, which are not offloaded"
REFUSED_CALLBACKS = {
    "StochasticWeightAveraging": f"{_COPIES}: remove the callback, or train with another strategy",
    "WeightAveraging": f"{_COPIES}: use lightning_zinf.ZinfEMA for an exponential moving average",
    "ModelPruning": "it puts new parameters into the module, which are not partitioned: prune before or after training",
}


def refuse_take_over(module: LightningModule, ours: type) -> None:
    """Refuse that another strategy runs a module whose weights come and go by messages between ranks.

    Its own collectives would wait for ranks that wait for such a message.

    Args:
        module: The module.
        ours: What the class of the strategy is a subclass of, if it is ours.

    Raises:
        ValueError: With what to do instead.
    """
    engine, trainer = engine_of(module), module._trainer
    strategy = None if trainer is None or trainer.state.status != "running" else trainer.strategy
    if strategy is None or isinstance(strategy, ours) or engine is None or engine.rounds is None:
        return
    if not all(buffer.unseen for unit in engine.units for buffer in unit.buffers):
        raise ValueError(
            f"{type(strategy).__name__} cannot run this module: its weights are shards over the ranks, which the zinf "
            "strategy brings as they are used. Run it with the zinf strategy, or load a checkpoint into a new module"
        )


class SetupPart(CheckpointsPart):
    """How the strategy builds, partitions and binds what it trains."""

    stage: int
    offload_params: Offload
    offload_optimizer: Offload
    activation_checkpointing: bool | list[str]
    offload_activations: OffloadActivations
    nvme_path: str | list[str] | None
    units: list[str] | None
    memory: MemoryConfig
    overlap: OverlapConfig
    io: IOConfig
    tiling: TilingConfig

    def setup_environment(self) -> None:
        """Refuse what cannot work before anything is copied or built for it."""
        self._joined = False
        self._release_signals()  # of a run whose end nobody told us of, as a callback had raised there
        if self.lightning_module is not None:
            trainer = self.lightning_module.trainer
            self._refuse_callbacks(trainer)
            if self._alone:
                _compat.keep_samplers(trainer)
        super().setup_environment()

    def _refuse_callbacks(self, trainer: Trainer) -> None:
        for kind, reason in REFUSED_CALLBACKS.items():
            found = _compat.instances_of(self.package, trainer.callbacks, [kind])  # type: ignore[attr-defined]
            if found:
                raise ValueError(f"the zinf strategy does not support {found[0]}: {reason}")

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:  # type: ignore[override,unused-ignore]
        """Create tensors in host memory: the engine moves what belongs on the device."""
        with super().tensor_init_context(empty_init), torch.device("cpu"):
            yield

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:  # type: ignore[override,unused-ignore]
        """Page parameters as ``configure_model`` makes them."""
        config, ranks = self._partition_config(), None
        if config.stage == 3 and self._engine is None:  # else the module is built, and its engine talks to other ranks
            ranks = self._ranks()
        with paged_construction(config, 1 if self._alone else self.num_processes, ranks) as pager:
            self._building = pager if isinstance(pager, SharedPager) else None
            yield

    def setup(self, trainer: Trainer) -> None:
        """Partition the module, and bind its optimizers to the engine."""
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        ops.set_num_threads(torch.get_num_threads())
        self._failed = False
        self.model = self.precision_plugin.convert_module(self.lightning_module)
        fitting = trainer.state.fn == "fit"
        if fitting and self._layer_sync and not self._alone:  # one process has no other to synchronise BatchNorm with
            self.model = self._layer_sync.apply(self.model)
        self.model_to_device()
        if fitting:
            self._reset_optimizers_and_schedulers()
            self.setup_optimizers(trainer)
        self._partition(self.lightning_module, bind=fitting)
        self.setup_precision_plugin()
        if fitting:
            _compat.before_batches(trainer, self._between_batches)
            self.refuse_plugin()
            self._announce()
            self._begin_plan()

    def model_to_device(self) -> None:
        """Move buffers and metrics; the engine moves the parameters."""
        assert self.model is not None
        _compat.move_all_but_parameters(self.model, self.root_device)

    def _partition(self, module: LightningModule, *, bind: bool) -> None:
        config = self._partition_config()
        ranks = self._ranks()
        engine = engine_of(module)
        reusable = engine is not None and engine.join(ranks) and self._equal(engine.config, config)
        optimizers = [o for o in map(_compat.unwrapped, self._optimizers) if not _compat.is_mock(self.package, o)]
        rules = rules_of(optimizers) if bind else []
        states = states_to_keep(optimizers, engine if reusable else None) if bind else []
        if not reusable:
            if engine is not None:
                forget(module)
            trained = [p for o in optimizers for group in o.param_groups for p in group["params"]] if bind else []
            more = tuple(p for c in module.trainer.callbacks for p in getattr(c, "state_planes", ()))  # type: ignore[attr-defined]
            planes = {i: p + more for i, p in planes_of(optimizers, rules).items()} if bind else None
            engine = partition(module, config, trained, ranks, planes)
            guard_conversions(module, partial(refuse_take_over, module, SetupPart))
            if self._building is not None:
                self._building.give_back()
        self._building = None
        self._joined = True
        if bind:
            assert engine is not None
            bind_all(optimizers, rules, engine, states)
            for optimizer in optimizers:
                binding_of(optimizer).watches = _compat.zeroes_itself(self.package, module)
            self.optimizers = self._optimizers  # so that Lightning wraps them as the classes that we made them

    def _equal(self, old: PartitionConfig, new: PartitionConfig) -> bool:
        if self.nvme_path is None:  # another Trainer's default folder is as good
            new = replace(new, nvme_paths=old.nvme_paths)
        return old == new

    def _partition_config(self) -> PartitionConfig:
        assert self.lightning_module is not None
        root = self.lightning_module.trainer.default_root_dir
        recomputed = self.activation_checkpointing
        plugin: Any = self.precision_plugin  # which is always ours
        return PartitionConfig(
            device=self.root_device,
            precision=plugin.precision,
            offload_params=self.offload_params if self.stage == 3 else "none",
            offload_optimizer=self.offload_optimizer,
            nvme_paths=nvme_paths(self.nvme_path, os.getcwd() if "://" in root else root),
            units=tuple(self.units or ()),
            memory=self.memory,
            overlap=self.overlap,
            io=self.io,
            tiling=self.tiling,
            stage=3 if self._alone else self.stage,
            shard_size=None if self._alone else self.shard_size,
            activation_checkpointing=recomputed if isinstance(recomputed, bool) else tuple(recomputed),
            offload_activations=self.offload_activations,
        )

    def _announce(self) -> None:
        engine = self.engine
        rank_zero_info(
            f"zinf: stage {self.stage}, {self.precision_plugin.precision}, {len(engine.units)} units; "
            f"weights on {tiers(engine, 'weights')}, optimizer state on {tiers(engine, 'optimizer state')}"
            + (f"; {describe_activations(engine)}" if engine.activations is not None else "")
            + (f", NVMe files in {', '.join(engine.config.nvme_paths)}" if engine.context.has_nvme else "")
            + f"\n{memory_text(engine.plan)}"
        )
