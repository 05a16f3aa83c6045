"""Lightning's contract with a strategy, section by section: what needs two ranks, and no other test is about.

See ``tests/lightning/test_contract_sections.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sections
import torch
from lightning_cases import Net, assert_close, assert_same
from pool import pool

SETTINGS: dict[str, dict[str, Any]] = {
    "stage-1": {"stage": 1},
    "stage-2": {"stage": 2},
    "stage-3": {"stage": 3},
    "nvme": {"offload_params": "nvme", "offload_optimizer": "nvme"},
}
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS)
SOME_SLOW = pytest.mark.parametrize(
    "setting", ["stage-1", "stage-3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("stage-2", "nvme"))]
)
ALONE = ["forward", "training_step", "backward", "on_after_backward", "on_before_optimizer_step", "None"]


def two(function: Any, *args: Any) -> list[Any]:
    return pool(2).run(function, *args, timeout=60)


@EVERY_SETTING
def test_1_04_method_by_method_on_ranks(setting: str, tmp_path: Path) -> None:
    """Section 1.4 (method by method): evaluation without a fit uses rank 0's weights everywhere, and gradients are
    reduced once a step in stage 1, where they can wait, and in each backward in the others."""
    first, second = two(sections.evaluate, tmp_path, SETTINGS[setting])
    torch.manual_seed(0)
    model = Net()
    for weights, _ in (first, second):
        assert_same(weights, dict(model.state_dict()))
    for found in two(sections.accumulate, tmp_path, SETTINGS[setting]):
        assert found[1] > 0
        assert found[4] == found[1] * (1 if setting == "stage-1" else 4)


@EVERY_SETTING
def test_1_05_traps_inference_mode_on_ranks(setting: str, tmp_path: Path) -> None:
    """Section 1.5 (traps), 2: weights gathered under ``inference_mode`` are in nobody's way. Lightning takes
    ``no_grad`` with gloo, so the ranks hide it."""
    modes, left, weights = zip(*two(sections.infer, tmp_path, SETTINGS[setting]), strict=True)
    assert modes == ({True},) * 2
    assert left == ({False},) * 2
    assert_same(weights[0], weights[1])


@SOME_SLOW
@pytest.mark.parametrize("where", ALONE)
def test_1_05_traps_an_exception_on_one_rank(setting: str, where: str, tmp_path: Path) -> None:
    """Section 1.5 (traps), 9 and 11: wherever one rank raises, all raise, and can fit the same module and others
    again. What the failed step had under way between ranks is in nobody's way."""
    ranks = two(sections.break_and_go_on, tmp_path, SETTINGS[setting], where, False)
    reason = "Skipping the `training_step` by returning None" if where == "None" else "broken on purpose"
    assert f"rank 1 stopped with RuntimeError: {reason}" in ranks[0][0]
    assert ranks[1][0].startswith(f"RuntimeError: {reason}")
    for (_, *found), expected in zip(ranks, two(sections.stop_and_go_on, tmp_path, SETTINGS[setting]), strict=True):
        for mine, oracle in zip(found, expected, strict=True):
            assert_same(mine, oracle)


@SOME_SLOW
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_1_05_traps_one_rank_saves_on_an_exception(setting: str, where: str, tmp_path: Path) -> None:
    """Section 1.5 (traps), 10: a checkpoint needs all ranks. If one alone is to save it, all raise, at once."""
    ranks = two(sections.break_and_go_on, tmp_path, SETTINGS[setting], where, True)
    for said, *_ in ranks:
        assert "the ranks wait for each other at different places: rank 0 is at " in said
        assert "; rank 1 is at saving a checkpoint after an exception." in said
    assert not list(tmp_path.rglob("*.ckpt"))
    for (_, *found), expected in zip(ranks, two(sections.stop_and_go_on, tmp_path, SETTINGS[setting]), strict=True):
        for mine, oracle in zip(found, expected, strict=True):
            assert_same(mine, oracle)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_1_05_traps_all_ranks_save_on_an_exception(kind: str, tmp_path: Path) -> None:
    """Section 1.5 (traps), 10: if all ranks raise, for whatever reasons, the checkpoint is saved."""
    setting = {**SETTINGS["nvme"], "state_dict_type": kind}
    ranks = two(sections.all_break_and_save, tmp_path, setting)
    for rank, (said, steps, weights) in enumerate(ranks):
        assert said == f"RuntimeError: broken on rank {rank}"
        assert steps == 2
        assert_same(weights, ranks[0][2])
    assert not torch.equal(ranks[0][2]["head.weight"], sections.net().head.weight)


@EVERY_SETTING
def test_1_06_overflow_on_one_rank(setting: str, tmp_path: Path) -> None:
    """Section 1.6 (precision and clipping): a gradient that is not finite on one rank has all leave the step out."""
    first, second = two(sections.overflow, tmp_path, SETTINGS[setting])
    assert first == second
    scales, biases = zip(*first, strict=True)
    assert scales == (1024.0, 1024.0, 512.0, 512.0)
    assert biases[0] != biases[1] == biases[2] != biases[3]


@EVERY_SETTING
def test_1_07_gradients_that_are_not_synchronised_at_once(setting: str, tmp_path: Path) -> None:
    """Section 1.7 (manual optimization): ``toggle_model(sync_grad=False)`` changes when gradients go out at most."""
    ours = two(sections.unsynchronised, tmp_path, SETTINGS[setting])
    theirs = two(sections.unsynchronised, tmp_path, "ddp")
    assert_same(ours[0], ours[1])
    assert_close(ours[0], theirs[0])


@EVERY_SETTING
def test_1_08_names_that_differ(setting: str, tmp_path: Path) -> None:
    """Section 1.8 (checkpoints): all ranks save under rank 0's name."""
    for saved, loaded in two(sections.save_under_other_names, tmp_path, SETTINGS[setting]):
        assert_same(saved, loaded)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["saved-0.ckpt"]


@EVERY_SETTING
def test_1_08_saving_in_the_middle_on_ranks(setting: str, tmp_path: Path) -> None:
    """Section 1.8 (checkpoints): ranks that save at different places of a forward have the weights of the step before
    in the checkpoint, and go on as if they had not."""
    for saving, plain, before, loaded in two(sections.save_in_the_middle, tmp_path, SETTINGS[setting]):
        assert_same(saving, plain)
        assert_same(loaded, before)


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_1_08_signals_on_ranks(setting: str, tmp_path: Path) -> None:
    """Section 1.8 (checkpoints): handlers of signals that come at different places of a step run before the same batch
    on all ranks; what they save is a whole step. A signal to one rank is handled there when training ends."""
    for handled, (signalled, plain, step, loaded) in two(sections.save_at_a_signal, tmp_path, SETTINGS[setting]):
        assert handled == [2]
        assert_same(signalled, plain)
        assert_same(loaded, step)
    (alone, a), (none, b) = two(sections.a_signal_to_one_rank, tmp_path, SETTINGS[setting])
    assert (alone, none) == ([4], [])
    assert_same(a, b)
    assert_same(a, plain)


def test_1_08_signals_in_the_sanity_check_on_ranks(tmp_path: Path) -> None:
    """Section 1.8 (checkpoints): a handler that saves runs before the first batch, on all ranks."""
    for handled, before, saved in two(sections.save_at_a_signal_in_the_sanity_check, tmp_path, SETTINGS["nvme"]):
        assert handled == [(False, 0)]
        assert_same(saved, before)


def test_1_09_sigterm_on_ranks(tmp_path: Path) -> None:
    """Section 1.9 (processes): SIGTERM to one rank ends training on all of them, after the same step."""
    found = two(sections.sigterm_to_one_rank, tmp_path, SETTINGS["stage-3"])
    assert found == [("SIGTERMException", 2)] * 2
