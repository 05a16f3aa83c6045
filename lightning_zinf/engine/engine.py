"""The engine: one model's units, as the strategy and the optimizers see them."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_zinf.comm.group import Ranks, sum_over_shards
from lightning_zinf.engine.activations import staying_storages
from lightning_zinf.engine.buffer import FlatBuffer
from lightning_zinf.engine.hooks import Absent, Hooks
from lightning_zinf.engine.profile import Kind, StepProfile
from lightning_zinf.engine.speeds import SpeedProbe
from lightning_zinf.engine.units import Unit
from lightning_zinf.memory.placement import Placement
from lightning_zinf.memory.planner import Kept, Plan
from lightning_zinf.memory.planner.speeds import Speeds, may_choose
from lightning_zinf.memory.streams import module_of
from lightning_zinf.optim.update import Update
from lightning_zinf.parameters import owner_of

if TYPE_CHECKING:
    from lightning_zinf.config import PartitionConfig


_SPEEDS = struct.Struct("<6d")


def _numbers(speeds: Speeds | None) -> tuple[float, ...]:
    if speeds is None:
        return (0.0,) * 6
    rates = (speeds.nvme_read, speeds.nvme_write, speeds.nvme_mixed)
    return (1.0, speeds.compute_seconds, speeds.update_seconds, *(rate or 0.0 for rate in rates))


class Engine(Hooks):
    """Gathers and releases the units of one model.

    Built by :func:`lightning_zinf.engine.partition.partition`, with the arguments of ``Frames``.
    """

    placement: Placement
    plan: Plan
    config: PartitionConfig
    probe: SpeedProbe | None = None
    """Measures speeds, for a few steps of a run."""
    given_back = 0
    """Bytes of host memory that the model took before it was partitioned, which the plan's machine has not as free."""
    profiled_for: Kind | None = None
    """The kind of step that the plan's activations were measured of."""
    probed_for: Kind | None = None
    """The kind of step that its speeds were measured of."""
    between_steps = False
    """Whether no backward has run since the last step of an optimizer, which sets it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """Stay the one engine: a copied module's hooks lead here, where the copy is unknown."""
        return self

    def __reduce__(self) -> Any:
        """Leave a stand-in in the pickle of a module, whose hooks do nothing."""
        return Absent, ()

    # ------------------------------------------------------------------ the plan

    def measure(self) -> None:
        """Have the next training step measured, see ``profile.py``."""

        def computing() -> int:
            return self._frames[-1].needs[0].index if self._frames and self._frames[-1].needs else len(self.units) - 1

        staying = functools.partial(staying_storages, self.root, self.units)
        self.profile = StepProfile(self.context.device, computing, staying)

    def measured(self, samples: int) -> Kept | None:
        """Return what a training step has kept for backward on the rank that kept most; None if none has ended yet.

        With several ranks, all of them must call it. Once there is something, measuring is over.

        Args:
            samples: Samples of its micro-batch.
        """
        profile = self.profile
        assert profile is not None
        count, seen = len(self.units), profile.seen
        saved = [profile.saved.get(i, 0) for i in range(count)]
        saved[-1] += profile.saved.get(-1, 0)  # what could not be told apart is the root's
        staying = [profile.staying.get(i, 0) for i in range(count)]
        module = module_of(self.context.device)
        peak = 0 if module is None else int(module.max_memory_allocated(self.context.device))
        mine = [samples if seen else 0, int(-1 in profile.saved), peak, *saved, *staying]
        form = f"<{len(mine)}q"
        told = [struct.pack(form, *mine)]
        if self.rounds is not None:
            told = self.rounds.meet("what the first step kept for backward", told[0])
        most = [max(column) for column in zip(*(struct.unpack(form, t) for t in told), strict=True)]
        if not most[0]:
            return None
        self.stop_measuring()
        names = [u.name for u in self.units]
        return Kept(
            dict(zip(names, most[3 : count + 3], strict=True)),
            dict(zip(names, most[count + 3 :], strict=True)),
            samples=most[0],
            grown=bool(most[1]),
            device_peak=most[2],
        )

    def stop_measuring(self) -> None:
        """Measure no more of what is kept for backward."""
        self.profile = self._net.profile = None

    def probe_speeds(self) -> None:
        """Have speeds measured in some of the coming steps, if there is anything that they decide."""
        if self.config.overlap.replan and may_choose(self.plan):
            self.probe = SpeedProbe(self.counters)

    def probed(self) -> Speeds | None:
        """Return the speeds once they have been measured: the lowest of all ranks.

        While there is a probe, all ranks must call it before every training step.
        """
        if self.probe is None or not self.between_steps:
            return None
        speeds = self.probe.between_steps()
        if not self.probe.due:
            return None
        self.probe = None
        told = [_SPEEDS.pack(*_numbers(speeds))]
        if self.rounds is not None:
            told = self.rounds.meet("speeds that were measured", told[0])
        everyone = [_SPEEDS.unpack(t) for t in told]
        if not all(measured for measured, *_ in everyone):
            return None
        _, compute, update, *rates = zip(*everyone, strict=True)
        return Speeds(max(compute), max(update), *(min(rate) or None for rate in rates))

    def stop_probing(self) -> None:
        """Measure no more speeds."""
        if self.probe is not None:
            self.probe.stop()
        self.probe = None

    # ------------------------------------------------------------------ steps

    def reset(self) -> None:
        """Get ready for the next step after an exception left frames open."""
        super().reset()
        self.between_steps = False  # a rank that failed before its backward would have it otherwise than the others

    def before_backward(self) -> None:
        """Make room for the gradients of a backward that is about to start."""
        after_step, self.between_steps = self.between_steps, False
        if self.profile is not None:
            self.profile.forward_ended()
        self.pager.gather(self._flipping)
        for parameter in self.tiled:
            parameter.note_changes()
        for unit in self.units:
            for buffer in unit.buffers:
                buffer.gradients.before_backward()
        self.pager.before_backward(after_step=after_step)
        if self._needs_net:  # recomputation saves tensors too, and so does a backward that builds a graph
            self._net.enter()
            self._backward_nets += 1

    def after_backward(self, *, failed: bool = False) -> None:
        """Release what a backward that has ended left behind; with several ranks, finish reducing its gradients.

        Args:
            failed: It ended with an exception.

        Raises:
            RuntimeError: If a gradient went past the tiles of a parameter.
        """
        if self.profile is not None and not failed:
            self.profile.backward_ended()
        if self._backward_nets:
            self._backward_nets -= 1
            self._net.exit()
        self.early.end()
        self._after_backward()
        if self.activations is not None:
            self.activations.after_backward(failed=failed)
        if not failed:
            for parameter in self.tiled:
                parameter.check_grad()
        if self.reducer is not None and self.reducer.early and not failed:
            self._finish_reduction("the end of a backward")
        else:
            for unit in self.units:
                for buffer in unit.buffers:
                    buffer.gradients.hide()

    def reduce_gradients(self) -> None:
        """An optimizer is about to use the gradients: have all of them reduced over the ranks."""
        if self.reducer is not None and (self.reducer.dirty or not self.reducer.early):
            self._finish_reduction("an optimizer step")

    def begin_updates(self, place: str) -> None:
        """Weights are about to be updated: wait until no rank needs the old ones any more.

        Else a rank that is a little behind would gather a mixture of both.

        Raises:
            OSError: On all ranks, if a checkpoint that is being saved in the background cannot be.
        """
        if self.saving is not None:
            self.saving.settle()  # units that no forward has used since
        self.meet(place)
        self.pager.forget_mixed()

    def sum_over_shards(self, value: float, place: str) -> float:
        """Return the sum of a float64 over the shards, one on each rank."""
        if self.context.comm is None or self.rounds is None:
            return value
        return sum_over_shards(value, self.context.comm.ranks, self.rounds, place)

    def join(self, ranks: Ranks | None) -> bool:
        """Go on with these ranks; return False if the model is cut for others."""
        comm = self.context.comm
        if comm is None or self.rounds is None or ranks is None:
            return comm is None and ranks is None
        if any(getattr(comm.ranks, n) != getattr(ranks, n) for n in ("rank", "world_size", "shard_size")):
            return False
        comm.ranks = ranks
        self.rounds.channel = ranks.channel
        self.reset()  # an exception in a callback's on_exception keeps Lightning from telling us of the first one
        self._running = True
        return True

    def meet(self, place: str) -> None:
        """Wait for the other ranks to come to ``place`` too, and serve them until then. Call it before a collective."""
        if self.saving is not None:
            self.saving.poll(place)
        elif self.rounds is not None:
            self.rounds.meet(place)

    def _finish_reduction(self, place: str) -> None:
        """Reduce all gradients; refuse weights that only some ranks changed outside of compute.

        Each rank keeps its own shard only, so parts of such changes would get lost.

        Raises:
            ValueError: On every rank.
        """
        assert self.reducer is not None
        assert self.rounds is not None
        if self.reducer.finish(place):
            return
        told = self.rounds.meet("a comparison of changed parameters", self.context.last_change.encode())
        self.context.changes = 0
        raise ValueError(
            "code outside of training steps changed parameters in different ways on the ranks (last changed: "
            f"{', '.join(sorted({t.decode() for t in told if t}))}). Each rank keeps only its own shard of a weight, "
            "so the change has to be the same on every rank: do it on all of them, with the same values"
        )

    def update(self, buffer: FlatBuffer, update: Update) -> None:
        """Apply an optimizer step to a buffer, now or when its weights are next needed.

        To be called between ``begin_updates`` and ``stepped``, on all ranks for the same buffers.
        """
        self.pager.update(buffer, update)

    def stepped(self) -> None:
        """An optimizer step is complete: start to fetch what the next training step begins with."""
        self.pager.arrive()
        if self.config.overlap.update == "step":
            self.pager.flush()
        elif self.pager.has_pending:
            self.pager.prefetch(wrap=True)

    def updating_early(self, apply: Callable[[Unit], None]) -> AbstractContextManager[None]:
        """Update units in a backward that runs inside, as far as that gives the same bits.

        Args:
            apply: Updates a unit whose gradients are complete.
        """
        return self.early.allowed(apply)

    def loaded(self, unit: Unit) -> AbstractContextManager[Unit]:
        """Have a unit's weights loaded and its updates applied, to read or replace whole planes."""
        return self.pager.loaded(unit)

    def flush(self) -> None:
        """Apply every pending update, take in the user's changes, and wait for every write."""
        self.pager.flush()

    def broadcast(self, tensors: Sequence[Tensor], place: str) -> None:
        """Give tensors the values that they have on rank 0; all ranks must call this."""
        if self.context.comm is None:
            return
        self.meet(place)
        with torch.no_grad():
            for tensor in tensors:
                self.context.comm.broadcast(tensor)

    def replaced(self) -> None:
        """Take in weights that code outside of a step has replaced; with several ranks, the same on all of them.

        A rank that is ahead serves others while they are still at it, and what it gathers then is in part what was
        there before. So gathered weights count for nothing once all ranks are done.
        """
        self.flush()
        if self.rounds is not None:
            self.rounds.meet("the end of loading weights")
            self.pager.forget_gathered()
            self.context.changes = 0  # they may have been taken in by parts, which ranks cut differently

    def end_run(self) -> None:
        """With several ranks, leave gradients alone until :meth:`join`, and drop those that there are.

        Whoever uses the module after a run has gradients of his own: another strategy, or a backward on one rank. And
        the guards of ours would raise in ``module.to(...)``; the next run starts without gradients anyway.
        """
        self._running = False
        for unit in self.units:
            for buffer in unit.buffers:
                buffer.gradients.spent.clear()
                if self.reducer is not None:
                    buffer.gradients.clear(range(len(buffer.params)))

    def release_host(self) -> None:
        """Take in what code outside of a step did to parameters, and release them."""
        self.pager.flush_host()

    def unit_of(self, param: nn.Parameter) -> tuple[Unit, FlatBuffer, int] | None:
        """Return where a parameter lives, or None if this engine does not manage it."""
        return self.pager.unit_of(param)

    def places_of(self, param: nn.Parameter) -> list[tuple[Unit, FlatBuffer, int]]:
        """Return where a parameter of the user lives: one place, or that of each of its tiles; none if not here."""
        entry = owner_of(param)
        tiled = None if entry is None else next((t for t in self.tiled if t is entry[0]), None)
        places = map(self.unit_of, [param] if tiled is None else tiled.tiles)
        return [place for place in places if place is not None]

    def dissolve(self) -> None:
        """Turn every parameter back into an ordinary tensor with the master's value, and give all memory back.

        Optimizer state is lost. The model must fit into the accelerator's memory.
        """
        if self.saving is not None:
            self.saving.wait()
        self.pager.flush()
        self.meet("dissolving the model")
        for handle in self._handles:
            handle.remove()
        if self.activations is not None:
            self.activations.remove()
        for unit in self.units:
            with self.pager.loaded(unit), torch.inference_mode(False), torch.no_grad():
                values = [[v.to(b.view_dtype, copy=True) for v in b.views_of(b.read_master())] for b in unit.buffers]
            for buffer, tensors in zip(unit.buffers, values, strict=True):
                buffer.let_go(tensors)
        for parameter in self.tiled:
            parameter.dissolve()
        self.context.close()
