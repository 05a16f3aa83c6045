"""When a Trainer lets updates run in backward, and that it changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback
from lightning_cases import Net, assert_same, loader, net, trainer, weights

import lightning_zinf
from lightning_zinf.config import OverlapConfig


def updated_early(folder: Path, kind: type[Net] = Net, update: str = "auto", **options: Any) -> tuple[list[int], Any]:
    """Fit; return how many units each optimizer step had updated in backward, and the weights."""
    counts: list[int] = []

    class Counts(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            counts.append(len(trainer.strategy.engine.early.updated))
            trainer.strategy.engine.early.updated.clear()

    strategy = lightning_zinf.ZinfStrategy(
        offload_params="nvme",
        offload_optimizer="nvme",
        units=["Linear"],
        overlap=OverlapConfig(update=update),  # type: ignore[arg-type]
        nvme_path=folder / "nvme",
    )
    callbacks = [Counts(), *options.pop("callbacks", [])]
    module = net(kind)
    trainer(folder, strategy, callbacks=callbacks, **options).fit(module, loader(6))
    return counts, weights(module)


class AfterBackward(Net):
    def on_after_backward(self) -> None:
        pass


class BeforeStep(Callback):
    def on_before_optimizer_step(self, *args: Any) -> None:
        pass


class Manual(Net):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)  # type: ignore[arg-type]
        self.optimizers().step()  # type: ignore[union-attr]


def test_steps_are_taken_in_backward_with_the_bits_of_later_ones(tmp_path: Path) -> None:
    early, ours = updated_early(tmp_path)
    assert early[0] == 0
    assert min(early[1:]) > 0
    for update in ("forward", "step"):
        late, theirs = updated_early(tmp_path, update=update)
        assert set(late) == {0}
        assert_same(ours, theirs)


def test_accumulated_gradients_are_used_with_the_last_micro_batch(tmp_path: Path) -> None:
    early, ours = updated_early(tmp_path, accumulate_grad_batches=2)
    assert [count > 0 for count in early] == [False, True, False, True, False, True]
    assert_same(ours, updated_early(tmp_path, update="step", accumulate_grad_batches=2)[1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Net, {"gradient_clip_val": 0.5}),
        (Net, {"callbacks": [BeforeStep()]}),
        (AfterBackward, {}),
        (Manual, {}),
    ],
    ids=["clipping", "callback", "hook", "manual"],
)
def test_what_needs_all_gradients_first_gets_them(kind: type[Net], options: dict[str, Any], tmp_path: Path) -> None:
    early, ours = updated_early(tmp_path, kind, **options)
    assert set(early) == {0}
    assert_same(ours, updated_early(tmp_path, kind, update="step", **options)[1])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("place", ["cpu", "nvme"])
def test_squares_are_summed_as_gradients_come_unless_code_may_change_them(
    place: str, precision: Any, tmp_path: Path
) -> None:
    found = {}
    for kind in (Net, AfterBackward):
        counted: list[tuple[int, int]] = []

        class Counts(Callback):
            def on_train_end(self, trainer: Any, module: Any, counted: Any = counted) -> None:
                counters = trainer.strategy.engine.counters
                counted.append((counters.norm_ahead_bytes, counters.norm_bytes))

        strategy = lightning_zinf.ZinfStrategy(
            offload_params="none", offload_optimizer=place, nvme_path=tmp_path / "nvme"
        )
        module, options = net(kind), {"gradient_clip_val": 0.1, "callbacks": [Counts()], "precision": precision}
        trainer(tmp_path, strategy, **options).fit(module, loader(6))
        nbytes = 6 * sum(p.numel() for p in module.parameters()) * (4 if precision == "32-true" else 2)
        assert counted == [(nbytes, 0) if kind is Net else (0, nbytes)]
        found[kind] = weights(module)
    assert_same(found[Net], found[AfterBackward])


def test_a_bad_option_is_named() -> None:
    with pytest.raises(ValueError, match=r"overlap.update must be 'auto', 'forward' or 'step', got 'backward'"):
        OverlapConfig(update="backward")  # type: ignore[arg-type]
