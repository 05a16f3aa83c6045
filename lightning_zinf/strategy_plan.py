"""The strategy's plan: stored with the run, and completed by what its first training step keeps for backward.

Note [Measured once]
~~~~~~~~~~~~~~~~~~~~
A module's engine, and so its plan, outlive a run. Another run measures again what no longer holds: both activations and
speeds if its first batch has other shapes than the one that was measured, if gradients are accumulated or clipped
otherwise, if other parameters learn, or other modules are in training mode. Other options of the strategy make another
engine. If it differs on one rank, all measure. A batch in which no tensors are found (an object of the user's own)
tells nothing, so its run measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_zinf.engine.placing import agree, move
from lightning_zinf.engine.profile import Kind, kind_of
from lightning_zinf.memory.planner import Plan, complete
from lightning_zinf.memory.planner.speeds import Speeds, best_rings, with_speeds
from lightning_zinf.planning.report import duration, human, memory_text, refusal
from lightning_zinf.planning.store import save_plan
from lightning_zinf.strategy_ranks import RanksPart


class PlanPart(RanksPart):
    """What the strategy does with its plan while it trains."""

    debug: bool
    _next_plan: Plan | None = None
    _stored: Plan | None = None
    _begins = False
    _kind: Kind | None = None
    _samples = 1

    def _begin_plan(self) -> None:
        """Keep the plan with the run."""
        self._stored = None
        self._store_plan()

    def on_train_start(self) -> None:
        """Have measured what is not known yet: here, since a run may have a learning rate finder's before its own."""
        super().on_train_start()
        self._end_measuring()
        assert self.lightning_module is not None
        if self.engine.plan is not self._stored:
            self._store_plan()
        self._begins = not self.lightning_module.trainer.fast_dev_run  # type: ignore[attr-defined]

    def _measure_what_is_new(self, batch: Any) -> None:
        """Have measured, from this step on, what has not been measured of such steps before."""
        engine, plan = self.engine, self.engine.plan
        kind = self._kind = kind_of(engine.root, batch, *self._accumulate_and_clip())
        measured = (plan.model.profiled, plan.prediction is not None)  # the same on all ranks
        same = tuple(kind is not None and kind == of for of in (engine.profiled_for, engine.probed_for))
        if any(measured) and engine.rounds is not None:
            told = engine.rounds.meet("a comparison of the first batch with earlier ones", bytes(same))
            same = tuple(map(all, zip(*told, strict=True)))
        if not (measured[0] and same[0]):
            engine.measure()
        if not (measured[1] and same[1]):
            engine.probe_speeds()

    def _accumulate_and_clip(self) -> tuple[int, bool]:
        """Return the micro-batches of a step, and whether gradients are clipped by their norm."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        clip = bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm != "value"
        return trainer.accumulate_grad_batches, clip

    def _store_plan(self) -> None:
        """Keep the plan where the run's logger keeps the rest."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        folder = None if trainer.logger is None or trainer.fast_dev_run else trainer.log_dir  # type: ignore[attr-defined]
        self._stored = None if folder is None else self.engine.plan
        if folder is not None and self.global_rank == 0:
            save_plan(self.engine.plan, folder)

    def _follow_plan(self, batch: Any) -> None:
        """Before a training step: complete the plan once a step has been measured, and move what it has elsewhere."""
        engine = self.engine
        if self._begins:
            self._begins = False
            self._measure_what_is_new(batch)
        if engine.profile is not None:
            self._complete_plan()
            self._samples = next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim), 1)
        if self._next_plan is not None and engine.between_steps:
            plan, self._next_plan = self._next_plan, None
            if move(engine, plan):
                self._completed()
                rank_zero_info(f"zinf: planes have moved to make room for activations\n{memory_text(engine.plan)}")

        if engine.probe is not None and (speeds := engine.probed()) is not None:
            self._follow_speeds(speeds)

    @contextmanager
    def explaining_memory(self) -> Iterator[None]:
        """Where the accelerator's memory runs out inside, say what the strategy takes of it, and what takes less.

        Raises:
            torch.OutOfMemoryError: With that.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            kept = sum(item.nbytes for item in self.engine.plan.items if item.tier == "device")
            raise torch.OutOfMemoryError(
                f"{error}\nzinf: weights, state, gradients and slots take up to {human(kept)} of the accelerator's "
                "memory; memory.device_bytes bounds that, and offload_params='cpu' takes less. For activations, "
                "activation_checkpointing=True, offload_activations='cpu' or a smaller batch take less"
            ) from error

    def on_validation_start(self) -> None:
        """Leave the evaluation out of what is measured of steps."""
        if (engine := self._engine) is not None and engine.probe is not None:
            engine.probe.evaluation_begins()
        super().on_validation_start()

    def on_validation_end(self) -> None:
        """Go on with what is measured of steps."""
        super().on_validation_end()
        if (engine := self._engine) is not None and engine.probe is not None:
            engine.probe.evaluation_ended()

    def on_train_end(self) -> None:
        """Complete the plan of a run that had one training step."""
        engine = self._engine
        if engine is not None and engine.profile is not None:
            self._complete_plan()
        self._end_measuring()
        super().on_train_end()

    def _end_measuring(self) -> None:
        engine = self._engine
        if engine is not None:
            engine.stop_measuring()
            engine.stop_probing()
        self._next_plan = None

    def _follow_speeds(self, speeds: Speeds) -> None:
        """Plan once more, with speeds that are known now, and move planes if a step is predicted to be faster then."""
        engine = self.engine
        engine.plan = before = with_speeds(engine.plan, speeds)
        engine.probed_for = self._kind
        plan = best_rings(before)
        if plan is before:
            agree(engine, plan.decision)  # others may be about to move
        elif move(engine, plan) and before.prediction is not None and plan.prediction is not None:
            rank_zero_info(
                f"zinf: planes have moved, as the speeds measured in this run suggest: a step is predicted to take "
                f"{duration(plan.prediction.seconds)} instead of {duration(before.prediction.seconds)}\n"
                f"{memory_text(engine.plan)}"
            )
        self._store_plan()

    def _completed(self) -> None:
        """The engine's plan has what the first step keeps for backward."""
        self.engine.profiled_for = self._kind
        self.engine.given_back = 0  # the plan's machine has it as free now
        self._store_plan()

    def _complete_plan(self) -> None:
        engine = self.engine
        kept = engine.measured(self._samples)
        if kept is None:
            return
        accumulate, clip = self._accumulate_and_clip()
        plan = complete(
            engine.plan,
            kept,
            accumulate=accumulate,
            clip=clip,
            given_back=engine.given_back,
        )
        agree(engine, plan.decision)
        told = f"zinf: the first training step kept {human(kept.total)} for backward"
        if kept.grown:
            told += " (by which the memory in use grew)"
        if kept.device_peak:
            told += f", and tensors on the accelerator took {human(kept.device_peak)} at most"
        if plan.decision != engine.plan.decision:
            self._next_plan = plan
            rank_zero_info(f"{told}: memory is short, so fewer planes will rest there from the next step on")
        else:
            engine.plan = plan
            self._completed()
            needs = "; ".join(
                f"{tier.tier} {human(tier.needed)} of {human(tier.available)}" for tier in plan.tiers if tier.needed
            )
            rank_zero_info(f"{told}; with it a step needs: {needs}" + (f"\n{memory_text(plan)}" if self.debug else ""))
        short = [tier for tier in plan.tiers if not tier.fits]
        if short:
            rank_zero_warn(
                f"{told}; with it a step needs {human(short[0].needed)} of {short[0].tier} memory, and "
                f"{human(short[0].available)} were free when training began\n{refusal(plan)}"
            )
