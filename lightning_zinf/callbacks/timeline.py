"""Writes a timeline of what the engine did, to be opened in Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_zinf.engine.engine import Engine
from lightning_zinf.monitor.trace import Trace
from lightning_zinf.strategy import ZinfStrategyBody

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback as _Base
else:
    _Base = object


class ZinfTimelineBody(_Base):
    """Records what the zinf strategy's engine does in a few training steps, in a file for https://ui.perfetto.dev.

    There is a track for each stage: reads and writes of NVMe, copies to and from the device, collectives, gathers of
    units, their forward and backward, optimizer updates, and the times that the computation waited. Counters show the
    bytes under way in each stage, and what is in use of each memory budget. Every rank writes a file of its own; the
    files of ranks of one machine have one clock.

    Updates of state on NVMe run when the weights are next needed: those of the last step recorded are seen in the step
    after it only.

    Args:
        path: The files' name; ``timeline.json`` becomes ``timeline-rank0.json`` and so on. With the suffix ``.json.gz``
            they are compressed. A relative path starts from the Trainer's ``default_root_dir``.
        steps: First optimizer step to record, and the one to stop before, counted as ``trainer.global_step``. The first
            step of a run fetches on demand, so it looks different from the others.

    Raises:
        ValueError: If there are no steps in the range, or the path ends neither in ``.json`` nor in ``.json.gz``.
    """

    def __init__(self, path: str = "timeline.json", steps: tuple[int, int] = (2, 5)) -> None:
        super().__init__()
        start, stop = steps
        if not 0 <= start < stop:
            raise ValueError(f"steps must be (start, stop) with 0 <= start < stop, got ({start}, {stop})")
        if not str(path).endswith((".json", ".json.gz")):
            raise ValueError(f"path must end in .json or .json.gz, got {str(path)!r}")
        self.path = str(path)
        self.steps = (start, stop)
        self._engine: Engine | None = None
        self._trace: Trace | None = None
        self._recorded = False

    def file_of(self, trainer: Trainer, rank: int) -> Path:
        """Return the file of a rank."""
        suffix = ".json.gz" if self.path.endswith(".gz") else ".json"
        stem = self.path.removesuffix(suffix)
        return Path(trainer.default_root_dir) / f"{stem}-rank{rank}{suffix}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the engine."""
        self._engine = self._trace = None
        self._recorded = False
        if isinstance(trainer.strategy, ZinfStrategyBody):
            self._engine = trainer.strategy.engine
            return
        rank_zero_warn(
            "ZinfTimeline records nothing: it needs Trainer(strategy='zinf'), and this Trainer has "
            f"{type(trainer.strategy).__name__}"
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Begin to record, or end."""
        start, stop = self.steps
        if self._trace is not None and trainer.global_step >= stop:
            self._save(trainer)
        elif self._engine is not None and self._trace is None and start <= trainer.global_step < stop:
            self._trace = self._engine.counters.trace = Trace(trainer.global_rank)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what is recorded if training ends before the steps do."""
        self._save(trainer)
        if self._engine is not None and not self._recorded:
            rank_zero_warn(
                f"ZinfTimeline recorded nothing: training ended at step {trainer.global_step}, and steps={self.steps} "
                "are asked for"
            )
        self._engine = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what is recorded: it shows what led to the exception."""
        self._save(trainer)
        self._engine = None

    def _save(self, trainer: Trainer) -> None:
        trace, self._trace = self._trace, None
        if trace is None or self._engine is None:
            return
        self._engine.counters.trace = None
        self._recorded = True
        trace.save(self.file_of(trainer, trainer.global_rank))
