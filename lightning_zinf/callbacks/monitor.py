"""Logs what the engine moved, and how long the computation waited for it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_zinf.engine.engine import Engine
from lightning_zinf.engine.partition import residency
from lightning_zinf.strategy import ZinfStrategyBody

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback as _Base
else:
    _Base = object

PER_STEP_BYTES = (
    "nvme_read_bytes",
    "nvme_write_bytes",
    "host_to_device_bytes",
    "device_to_host_bytes",
    "all_gather_bytes",
    "reduce_scatter_bytes",
    "all_reduce_bytes",
    "broadcast_bytes",
    "reused_bytes",
    "activation_write_bytes",
    "activation_read_bytes",
    "activation_reused_bytes",
)
_OF_RANKS = ("all_gather_bytes", "reduce_scatter_bytes", "all_reduce_bytes", "broadcast_bytes")
_OF_ACTIVATIONS = ("activation_write_bytes", "activation_read_bytes", "activation_reused_bytes")
STALLS = ("stall_read_seconds", "stall_write_seconds", "stall_gather_seconds")
SINCE_START = ("refills", "faults", "overcommits", "orphaned_slots")


class ZinfMonitorBody(_Base):
    """Logs the traffic, the stalls and the residency of the zinf strategy's engine.

    Every ``Trainer(log_every_n_steps=...)`` steps it logs, to the loggers and to ``trainer.callback_metrics``, as means
    over the optimizer steps since the last time, for this rank:

    - ``zinf/nvme_read_bytes_per_step``, ``zinf/nvme_write_bytes_per_step``, ``zinf/host_to_device_bytes_per_step``,
      ``zinf/device_to_host_bytes_per_step``, and with several ranks ``all_gather``, ``reduce_scatter``, ``all_reduce``
      and ``broadcast`` in the same way; ``zinf/reused_bytes_per_step``: what did not have to be read; with offloaded
      activations ``activation_write``, ``activation_read`` and ``activation_reused``
    - ``zinf/stall_read_seconds_per_step``, ``zinf/stall_write_seconds_per_step``,
      ``zinf/stall_gather_seconds_per_step``: how long the computation waited for reads, for writes and for other ranks;
      ``zinf/stall_seconds_per_step``: all of it, and ``zinf/stall_share``: that part of the whole time
    - ``zinf/update_seconds_per_step``: time in optimizer updates of offloaded state

    and as they are: ``zinf/refills``, ``zinf/faults``, ``zinf/overcommits`` and ``zinf/orphaned_slots`` since training
    started, and ``zinf/resident_bytes/device``, ``.../host`` and ``.../nvme``: what the engine keeps where.
    """

    def __init__(self) -> None:
        super().__init__()
        self._engine: Engine | None = None
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._last_step = 0
        self._last_time = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count."""
        self._engine = None
        if not isinstance(trainer.strategy, ZinfStrategyBody):
            rank_zero_warn(
                f"ZinfMonitor logs nothing: it needs Trainer(strategy='zinf'), and this Trainer has "
                f"{type(trainer.strategy).__name__}"
            )
            return
        self._engine = trainer.strategy.engine
        self._first = self._engine.counters.snapshot()
        self._mark(trainer)

    def _mark(self, trainer: Trainer) -> None:
        assert self._engine is not None
        self._last = self._engine.counters.snapshot()
        self._last_step = trainer.global_step
        self._last_time = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, if it is time to and a step was taken since the last time."""
        # The rule by which Lightning hands logged values to the loggers.
        due = trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()
        if self._engine is None or not due or trainer.global_step == self._last_step:
            return
        metrics = self._metrics(self._engine, trainer.global_step - self._last_step)
        self._mark(trainer)
        pl_module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1, rank_zero_only=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the engine."""
        self._engine = None

    def _metrics(self, engine: Engine, steps: int) -> dict[str, float]:
        grown = engine.counters.since(self._last)
        seconds = time.perf_counter() - self._last_time
        stall = sum(grown[name] for name in STALLS)
        left_out = set(_OF_RANKS if engine.context.comm is None else ())
        left_out |= set(_OF_ACTIVATIONS if engine.context.activations is None else ())
        moved = [name for name in PER_STEP_BYTES if name not in left_out]
        metrics = {f"zinf/{name}_per_step": grown[name] / steps for name in (*moved, *STALLS)}
        metrics["zinf/stall_seconds_per_step"] = stall / steps
        metrics["zinf/stall_share"] = stall / seconds if seconds > 0 else 0.0
        metrics["zinf/update_seconds_per_step"] = grown["update_seconds"] / steps
        total = engine.counters.since(self._first)
        metrics.update({f"zinf/{name}": total[name] for name in SINCE_START})
        tiers = dict.fromkeys(("device", "host", "nvme"), 0)
        for _, tier, nbytes in residency(engine):
            tiers[tier] += nbytes
        metrics.update({f"zinf/resident_bytes/{tier}": float(nbytes) for tier, nbytes in tiers.items()})
        return {name: float(value) for name, value in metrics.items()}
