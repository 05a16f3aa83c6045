"""The strategy over several ranks: processes, and meetings before Lightning's own collectives.

Whoever waits in a collective cannot serve weights to others, so all ranks meet before each. Between batches they also
agree on whose signal handlers run.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_zinf import _compat
from lightning_zinf.comm.group import Ranks, ranks_of
from lightning_zinf.engine.engine import Engine
from lightning_zinf.engine.partition import engine_of
from lightning_zinf.engine.shared_pages import SharedPager
from lightning_zinf.loaders import EvenLoader, needs_agreement
from lightning_zinf.signals import DeferredSignals

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy as _Base
else:
    _Base = object


class RanksPart(_Base):
    """What the strategy does because there may be several ranks."""

    package: str
    shard_size: int | None
    start_method: str
    _failed: bool
    _joined: bool
    _signals: DeferredSignals | None
    _building: SharedPager | None

    @property
    def engine(self) -> Engine:
        """The engine of the module.

        Raises:
            RuntimeError: If there is none yet.
        """
        engine = self._engine
        if engine is None:
            raise RuntimeError("the zinf strategy has set up no module yet: its engine is there from on_fit_start on")
        return engine

    @property
    def _engine(self) -> Engine | None:
        # Asked for each time: another Trainer with other options may have partitioned the module anew.
        return None if self.lightning_module is None else engine_of(self.lightning_module)

    # ------------------------------------------------------------------ processes

    @property
    def _alone(self) -> bool:
        """Whether there is one process, which needs no process group and nothing to launch it."""
        return max(self.world_size, self.num_nodes * self.num_processes) == 1

    def _configure_launcher(self) -> None:
        # Called when the Trainer is built, once devices and nodes are known.
        if self._alone:
            self._launcher = None  # nothing to launch, so a notebook will do
        else:
            super()._configure_launcher()

    def setup_distributed(self) -> None:
        """Set the ranks, and join the other processes if there are any."""
        if self._alone:
            self.set_world_ranks()
        else:
            super().setup_distributed()

    def _get_process_group_backend(self) -> str:
        if self._process_group_backend is None and self.root_device.type == "cuda":
            return "cpu:gloo,cuda:nccl"  # what is offloaded cannot go through nccl
        return str(super()._get_process_group_backend())

    def process_dataloader(self, dataloader: object) -> object:
        """Have training loaders without a length end on all ranks at once."""
        loader: object = super().process_dataloader(dataloader)
        assert self.lightning_module is not None
        if self._alone or not self.lightning_module.trainer.training or not needs_agreement(loader):
            return loader
        return EvenLoader(loader, self._agree)

    def _agree(self, mine: bool) -> bool:
        """Whether all ranks say yes."""
        rounds = self.engine.rounds
        assert rounds is not None, "one rank needs no agreement"
        return all(answer == b"yes" for answer in rounds.meet("the next training batch", b"yes" if mine else b"no"))

    def _ranks(self) -> Ranks | None:
        if self._alone:
            return None
        return ranks_of(self.shard_size, self._timeout or timedelta(days=1), self.num_processes)

    def _meet(self, place: str) -> None:
        if self._building is not None:
            self._building.meet(place)
            return
        engine = self._engine
        if engine is None or self._failed:
            return
        if not self._joined and engine.rounds is not None and engine.rounds.channel.broken is not None:
            return  # what ended an earlier run; this one has new ways to the other ranks when it is set up
        engine.meet(place)

    # ------------------------------------------------------------------ signals

    def on_train_start(self) -> None:
        """From here on signal handlers wait for the end of a batch."""
        super().on_train_start()
        self._defer_signals()

    def _defer_signals(self) -> None:
        if self._signals is None:
            self._signals = DeferredSignals()
        else:  # since the sanity check
            self._signals.adopt()

    def _between_batches(self) -> None:
        if not self._alone:
            self._meet("the next batch")
        self._handle_signals("the next batch")
        if self._alone:  # else Lightning does so right after, on all ranks
            assert self.lightning_module is not None
            _compat.stop_if_terminated(self.package, self.lightning_module.trainer)

    def _handle_signals(self, place: str, *, last: bool = False) -> None:
        if self._signals is not None:
            told = [self._signals.tell()]
            rounds = self.engine.rounds
            if rounds is not None:
                told = rounds.meet(f"the signals before {place}", told[0])
            self._signals.handle(told, last=last)

    def on_train_end(self) -> None:
        """Run the signal handlers that still wait, and let later ones run at once."""
        self._end_signals("the end of training")
        super().on_train_end()

    def _end_signals(self, place: str) -> None:
        """Run the handlers that still wait, on all ranks, and let later ones run at once."""
        if self._signals is not None:
            self._handle_signals(place, last=True)
            self._signals.give_back()
            self._handle_signals(f"what follows {place}", last=True)
            self._release_signals()

    def _release_signals(self) -> None:
        """Let handlers run at once, where those that still wait must not run."""
        if self._signals is not None:
            self._signals.release()
            self._signals = None

    # ------------------------------------------------------------------ meetings

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks."""
        self._meet(f"a barrier {args[0] if args else kwargs.get('name') or ''}".strip())
        super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return what rank ``src`` has."""
        self._meet("a broadcast")
        return super().broadcast(obj, src)

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Reduce a tensor over all ranks."""
        self._meet("a reduction")
        return super().reduce(tensor, *args, **kwargs)

    def all_gather(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Gather a tensor from all ranks."""
        self._meet("a gathering of tensors")
        gathered: Tensor = super().all_gather(tensor, *args, **kwargs)
        return gathered

    def _sync_buffers(self) -> None:
        """Give all ranks rank 0's buffers (running statistics), which is what DDP evaluates and saves."""
        engine = self._engine
        if engine is not None:
            kept = [
                buffer
                for module in engine.root.modules()
                for name, buffer in module._buffers.items()
                if buffer is not None and name not in module._non_persistent_buffers_set
            ]
            engine.broadcast(kept, "the start of an evaluation")

    def on_validation_start(self) -> None:
        """Evaluate with rank 0's buffers; in the sanity check signal handlers wait for the first batch."""
        assert self.lightning_module is not None
        if self.lightning_module.trainer.sanity_checking:
            self._defer_signals()
        self._sync_buffers()

    def on_test_start(self) -> None:
        """Evaluate with rank 0's buffers."""
        self._sync_buffers()

    def on_predict_start(self) -> None:
        """Predict with rank 0's buffers."""
        self._sync_buffers()

    def on_validation_end(self) -> None:
        """Serve the ranks that have more batches."""
        self._meet("the end of validation")

    def on_test_end(self) -> None:
        """Serve the ranks that have more batches."""
        self._meet("the end of the test")

    def on_predict_end(self) -> None:
        """Serve the ranks that have more batches."""
        self._meet("the end of prediction")
