"""A snapshot is what there was when it was taken, whatever training does meanwhile."""

from __future__ import annotations

import itertools
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from async_saves import dawdling
from driver import Session, Where, session
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_cases import assert_same
from models import ZOO
from oracle import Recipe
from snapshot_states import save_now, saved_state, state_of

from lightning_zinf.checkpoint.manifest import BLOCK_BYTES
from lightning_zinf.checkpoint.stream import BlockSums

PLACES = {
    "memory": Where("none", "none"),
    "paged in memory": Where("cpu", "cpu", aliased=False, tight=True),
    "device": Where("none", "none", aliased=False),
    "state on nvme": Where("none", "nvme"),
    "mirrored": Where("none", "nvme", aliased=False),
    "nvme": Where("nvme", "nvme", tight=True),
    "in backward": Where("nvme", "nvme", early=True),
    "part in memory": Where("nvme", "nvme", share=0.5),
    "nvme and device": Where("nvme", "nvme", aliased=False, tight=True),
}
ACTIONS = ["step", "save", "read", "change", "evaluate", "moments", "flush"]


def act(running: Session, action: str, number: int) -> None:
    """Do something between steps."""
    params = [p for _, p in running.model.named_parameters()]
    param = params[number % len(params)]
    if action == "step":
        running.step()
    elif action == "read":
        param.detach().sum()
    elif action == "change":
        with torch.no_grad():
            param.data.mul_(0.5).add_(0.01 * number)
    elif action == "evaluate":
        with torch.no_grad():
            running.forward(kind="validate")
    elif action == "moments":
        state = running.optimizer.state_dict()
        for entry in state["state"].values():
            entry["exp_avg"].mul_(0.5)
        running.optimizer.load_state_dict(state)
    elif action == "flush":
        running.engine.flush()


def check(
    place: str, name: str, precision: str, actions: list[str], copy_bytes: int, recipe: Recipe | None = None
) -> None:
    """Every checkpoint has what there was when it was saved, and training is as if none had been."""
    recipe = recipe or Recipe(accumulate=1, clip_norm=None if PLACES[place].early else 0.5)
    with tempfile.TemporaryDirectory() as folder:
        root, expected = Path(folder), []
        with session(ZOO[name], root / "plain", PLACES[place], precision, recipe) as running:
            for number, action in enumerate(actions):
                if action == "save":
                    expected.append(state_of(running))
                else:
                    act(running, action, number)
            last = state_of(running)
        with session(ZOO[name], root / "saved", PLACES[place], precision, recipe) as running:
            saves = 0
            with dawdling(len(actions)):
                for number, action in enumerate(actions):
                    if action == "save":
                        save_now(running, root / f"{saves}.ckpt", background=True, copy_bytes=copy_bytes)
                        saves += 1
                    else:
                        act(running, action, number)
                if running.engine.saving is not None:
                    running.engine.saving.wait()
            for at, state in enumerate(expected):
                found = saved_state(running, root / f"{at}.ckpt")
                assert_same(dict(sorted(found.items())), dict(sorted(state.items())))
            assert_same(state_of(running), last)


USUAL = ["step", "save", "step", "change", "save", "read", "change", "step", "evaluate", "save", "moments", "step"]


@pytest.mark.parametrize("place", PLACES)
def test_training_goes_on_while_it_is_saved(place: str) -> None:
    check(place, "gpt", "32-true" if "nvme" in place else "bf16-mixed", USUAL, 1 << 30)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("place", PLACES)
def test_everywhere_in_all_precisions(place: str, precision: str) -> None:
    check(place, "gpt", precision, USUAL, 1 << 30)


@pytest.mark.parametrize("name", ["mixture", "late", "encoder-decoder"])
def test_no_deadlock_where_there_is_little_room_for_copies(name: str) -> None:
    """Units that steps use in other orders than the file has them, or not at all, or only from some step on."""
    for place, copy_bytes in (("memory", 0), ("memory", 20000), ("nvme", 0)):
        check(place, name, "32-true", ["step", "save", "step", "step", "save", "step"], copy_bytes)


def test_optimizers_whose_state_changes_when_they_are_applied() -> None:
    recipe = Recipe(accumulate=1, optimizer=torch.optim.NAdam, options={"foreach": False})
    check("nvme", "gpt", "bf16-mixed", ["step", "save", "step", "step"], 1 << 30, recipe)


SEQUENCES = {
    "place": st.sampled_from(sorted(PLACES)),
    "name": st.sampled_from(["gpt", "mixture", "unused"]),
    "precision": st.sampled_from(["32-true", "bf16-mixed"]),
    "actions": st.lists(st.sampled_from(["step", "save", *ACTIONS]), min_size=3, max_size=10),
    "copy_bytes": st.sampled_from([0, 30000, 1 << 30]),
}


@settings(max_examples=8, deadline=None)
@given(**SEQUENCES)
def test_any_sequence(place: str, name: str, precision: str, actions: list[str], copy_bytes: int) -> None:
    check(place, name, precision, ["step", *actions], copy_bytes)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(**SEQUENCES)
def test_many_sequences(place: str, name: str, precision: str, actions: list[str], copy_bytes: int) -> None:
    check(place, name, precision, ["step", *actions], copy_bytes)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_checksums_of_blocks_in_any_order(data: Any) -> None:
    size = data.draw(st.integers(1, 3)) * BLOCK_BYTES + data.draw(st.integers(-5000, 5000))
    content = torch.arange(size // 8 + 1, dtype=torch.int64).view(torch.uint8)[:size].numpy().tobytes()
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=6))})
    parts = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    sums = BlockSums(size)
    for start, stop in parts:
        sums.add(start, memoryview(content)[start:stop])
    assert sums.blocks() == tuple(zlib.crc32(content[at : at + BLOCK_BYTES]) for at in range(0, size, BLOCK_BYTES))
