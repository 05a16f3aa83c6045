"""Exponential moving averages of the weights, sharded and offloaded as the optimizer's state is."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_zinf.checkpoint.full import full_state_dict, load_full_state_dict, load_plane
from lightning_zinf.checkpoint.load import load_averages
from lightning_zinf.checkpoint.source import Averages, Checkpoint, ShardedStateDict
from lightning_zinf.engine.buffer import FlatBuffer
from lightning_zinf.engine.engine import Engine
from lightning_zinf.optim.average import PLANE, Average, Swap
from lightning_zinf.optim.binding import OptimizerBinding, binding_of
from lightning_zinf.optim.update import Update
from lightning_zinf.strategy import ZinfStrategyBody

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback as _Base
else:
    _Base = object


class ZinfEMABody(_Base):
    """Keeps an exponential moving average of the weights, and validates with it.

    It does what Lightning's ``EMAWeightAveraging`` does, for models of the zinf strategy: the average is one more plane
    of each rank's shard, 4 bytes a parameter over all ranks, on the tier that has the optimizer's state. After a step
    it is ``decay * average + (1 - decay) * weight``, in float32; the first time it is the weight.

    During validation the weights are exchanged with the average, once there is one, and after training they are the
    average. Checkpoints have the average as ``state_dict``, which is what testing from one uses, and beside it the
    weights, from which training goes on: whole ones as ``current_model_state``, as Lightning's callback writes them
    (either resumes from the other's), sharded ones as a plane of the shards.

    Args:
        decay: Weight of the old average, from 0 to 1.
        use_buffers: Average buffers (running statistics) too.
        update_every_n_steps: Optimizer steps from one update of the average to the next; 0 for none by steps.
        update_starting_at_step: First step, counted from 0, that updates the average; by default the first of all.
        update_starting_at_epoch: First epoch, counted from 0, whose end updates the average; by default none does.

    Raises:
        ValueError: If an argument is out of range.
    """

    state_planes = (PLANE,)

    def __init__(
        self,
        decay: float = 0.999,
        use_buffers: bool = True,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be from 0 to 1, got {decay}")
        if update_every_n_steps < 0:
            raise ValueError(f"update_every_n_steps must be 0 or more, got {update_every_n_steps}")
        self.decay = decay
        self.use_buffers = use_buffers
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch
        self._engine: Engine | None = None
        self._bindings: list[OptimizerBinding] = []
        self._buffers: dict[str, Tensor] = {}
        self._swapped = False
        self._ended: tuple[Any, int] = (lambda: None, 0)  # the engine of a fit that is over, and its number of averages

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether a step, or the end of an epoch, updates the average; may be overridden.

        Args:
            step_idx: Number of the optimizer step, from 0.
            epoch_idx: Number of the epoch, from 0.
        """
        if step_idx is not None and self.update_every_n_steps:
            started = step_idx >= (self.update_starting_at_step or 0)
            return started and step_idx % self.update_every_n_steps == 0
        return (
            epoch_idx is not None
            and self.update_starting_at_epoch is not None
            and epoch_idx >= self.update_starting_at_epoch
        )

    @property
    def _averaged(self) -> int:
        return max((b.averaged for b in self._bindings), default=0)

    # ------------------------------------------------------------------ training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the engine.

        Raises:
            ValueError: If the Trainer has another strategy.
        """
        if not isinstance(trainer.strategy, ZinfStrategyBody):
            raise ValueError(
                f"ZinfEMA needs Trainer(strategy='zinf'), and this Trainer has {type(trainer.strategy).__name__}: use "
                "lightning.pytorch.callbacks.EMAWeightAveraging with it"
            )
        self._engine = trainer.strategy.engine
        self._bindings = [binding_of(o) for o in trainer.optimizers]
        for binding in self._bindings:
            binding.averaged = 0
        self._buffers = {}
        self._swapped = False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Have the coming step update the average."""
        if self.should_update(step_idx=trainer.global_step):
            binding = binding_of(optimizer)
            self._add_planes(binding)
            binding.average = self.decay if binding.averaged else 0.0

    def _add_planes(self, binding: OptimizerBinding) -> None:
        """Begin averages of parameters that an optimizer has got since the plan was made."""
        assert self._engine is not None
        added = [b for b in binding.buffers() if b.state is None or PLANE not in b.state.planes]
        for buffer in added:
            buffer.need_planes((PLANE,))
        self._update([(buffer, Average()) for buffer in added])

    def _update(self, updates: list[tuple[FlatBuffer, Update]]) -> None:
        assert self._engine is not None
        if updates:
            self._engine.begin_updates("an update of averages")
            for buffer, update in updates:
                self._engine.update(buffer, update)
            self._engine.stepped()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average the buffers."""
        stepped = not trainer.fit_loop._should_accumulate()
        if self.use_buffers and stepped and self.should_update(step_idx=trainer.global_step - 1):
            self._average_buffers(pl_module)

    def _average_buffers(self, module: LightningModule) -> None:
        for name, buffer in module.named_buffers():
            if name not in self._buffers:
                self._buffers[name] = buffer.detach().clone()
            else:  # whole numbers are cut off, as torch does it
                self._buffers[name].copy_(self.decay * self._buffers[name] + (1 - self.decay) * buffer.detach())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the average, if epochs do."""
        if not self.should_update(epoch_idx=trainer.current_epoch):
            return
        for binding in self._bindings:
            self._add_planes(binding)
            self._update([(b, Average(self.decay if binding.averaged else 0.0)) for b in binding.buffers()])
            binding.averaged += 1
        if self.use_buffers:
            self._average_buffers(pl_module)

    # ------------------------------------------------------------------ exchanging

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate with the average."""
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the weights."""
        if self._swapped:
            self._swap(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the place of the weights."""
        if not self._swapped:
            self._swap(pl_module)
        assert self._engine is not None
        self._ended = (weakref.ref(self._engine), self._averaged)
        self._engine, self._bindings = None, []

    def _swap(self, module: LightningModule) -> None:
        if self._engine is None or not self._averaged:
            return
        self._update([(b, Swap()) for binding in self._bindings if binding.averaged for b in binding.buffers()])
        self._engine.broadcast(list(self._buffers.values()), "the exchange of averages")
        with torch.no_grad():
            for name, value in module.named_buffers():
                if name in self._buffers:
                    other = self._buffers[name].clone()
                    self._buffers[name].copy_(value)
                    value.copy_(other)
        self._swapped = not self._swapped

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as ``state_dict`` and the weights as ``current_model_state``."""
        assert isinstance(trainer.strategy, ZinfStrategyBody)
        engine, averaged = self._engine, self._averaged
        if engine is None and self._ended[0]() is trainer.strategy._engine:
            engine, averaged = trainer.strategy._engine, self._ended[1]
        if engine is None or not averaged:
            return
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(averaged)}
        if trainer.strategy.saves_shards:  # which have the plane
            checkpoint["averaging_buffers"] = {name: buffer.cpu() for name, buffer in self._buffers.items()}
            checkpoint["averaging_swapped"] = self._swapped
            return
        averages = full_state_dict(engine, keep=trainer.is_global_zero, plane=PLANE)
        if trainer.is_global_zero:
            averages.update({name: buffer.cpu() for name, buffer in self._buffers.items() if name in averages})
        pairs = (averages, checkpoint["state_dict"])
        checkpoint["state_dict"], checkpoint["current_model_state"] = reversed(pairs) if self._swapped else pairs

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take weights and average from a checkpoint."""
        if self._engine is None:
            return
        state = checkpoint["state_dict"]
        if isinstance(state, ShardedStateDict) and state.averages is not None:
            self._load_shards(pl_module, state.source, state.averages)
            for binding in self._bindings:
                binding.averaged = int(checkpoint["averaging_state"]["n_averaged"])
            return
        if "current_model_state" not in checkpoint or "averaging_state" not in checkpoint:
            rank_zero_info("The checkpoint has no average of the weights: ZinfEMA begins a new one.")
            return
        load_full_state_dict(self._engine, checkpoint["current_model_state"])
        names = {name for name, _ in pl_module.named_buffers()}
        self._buffers = {n: v.clone() for n, v in checkpoint["state_dict"].items() if n in names}
        for binding in self._bindings:
            self._add_planes(binding)
            binding.averaged = int(checkpoint["averaging_state"]["n_averaged"])
        load_plane(self._engine, PLANE, checkpoint["state_dict"])

    def _load_shards(self, module: LightningModule, source: Checkpoint, averages: Averages) -> None:
        assert self._engine is not None
        for binding in self._bindings:
            self._add_planes(binding)
        load_averages(self._engine, source, averages)
        self._swapped, self._buffers = False, {}
        for name, buffer in module.named_buffers():
            if name not in averages.buffers:
                continue
            other = averages.buffers[name].to(buffer.device)
            kept = source.tensor(name) if name in source.names() else None  # the module saves persistent ones alone
            average, last = (kept, other) if averages.swapped else (other, kept)
            self._buffers[name] = (other if average is None else average).clone()
            if last is not None:
                buffer.copy_(last)
