"""Several ranks complete their plan alike, and move the same planes at the same step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import measured
import pytest
import torch
from lightning_cases import net
from plan_cases import Deep
from pool import pool

from lightning_zinf.memory.planner.speeds import Speeds

MIB = 2**20


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}])
def test_ranks_move_alike(options: dict[str, Any], tmp_path: Path) -> None:
    """Only rank 1 keeps much; both make room, and the bits are those of a run that keeps all in memory."""
    ample = pool(2).run(measured.fit_measured, tmp_path, options, None, None)
    free = 3 * MIB
    before = pool(2).run(measured.fit_measured, tmp_path, {**options, "fast_dev_run": 1}, free, None)[0]["plan"]
    (host,) = (t for t in before["tiers"] if t["tier"] == "host")
    assert before["placement"]["optimizer"] == "nvme"
    planes = sum(r["bytes"] for r in before["residency"] if r["tier"] != "nvme")
    # Of one rank: what is left, what the model took before it was partitioned, and half of what the rank keeps there.
    present = sum(p.nbytes for p in net(Deep).parameters())
    much = (host["available"] - host["needed"]) // 2 + present + planes // 2
    found = pool(2).run(measured.fit_measured, tmp_path, options, free, [1000, much])
    assert found[0]["tiers"] == found[1]["tiers"]
    assert found[0]["plan"]["items"] == found[1]["plan"]["items"]
    assert found[0]["plan"]["residency"] == found[1]["plan"]["residency"]
    saved = [u["saved"] for u in found[0]["plan"]["activations_measured"]["units"]]
    assert max(saved) == much
    assert found[0]["fits"], found[0]["plan"]["items"]
    held = found[0]["held"]
    assert held[-1] < held[0]
    every = options.get("accumulate_grad_batches", 1)
    assert held[every] == held[0] > held[every + 1] == held[-1]  # noted before the step that moves
    for rank in found:
        for name, weight in ample[0]["weights"].items():
            assert torch.equal(rank["weights"][name], weight), name


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_ranks_follow_the_slowest(options: dict[str, Any], tmp_path: Path) -> None:
    """One rank's disk is slow; both plan by it, move alike, and have the bits of a run that keeps all in memory."""
    slow, fast = Speeds(1e-4, 1e-5, 1e6, 1e6, 1e6), Speeds(1e-3, 1e-4, 1e9, 1e9, 1e9)
    ample = pool(2).run(measured.fit_with_speeds, tmp_path, options, None, [fast, fast])
    budget = sum(p.nbytes for p in net(Deep).parameters()) * 7 // 4
    found = pool(2).run(measured.fit_with_speeds, tmp_path, options, budget, [fast, slow])
    for name in ("tiers", "rates", "rings", "pages"):
        assert found[0][name] == found[1][name], name
    assert found[0]["rates"]["nvme_read"] == 1e6
    assert found[0]["rings"]["share"] < 0.5
    assert found[0]["tiers"][0] != found[0]["tiers"][-1]
    for rank in found:
        for name, weight in ample[0]["weights"].items():
            assert torch.equal(rank["weights"][name], weight), name


def test_after_an_exception_on_one_rank_steps_are_counted_alike(tmp_path: Path) -> None:
    """One rank breaks between its forward and its backward, the other in its backward; then both fit again."""
    budget = sum(p.nbytes for p in net(Deep).parameters()) * 7 // 4
    found = pool(2).run(measured.fit_again_within, tmp_path, budget)
    for said, between, predicted in found:
        assert "broken on purpose" in said[0]
        assert said[1] == ""
        assert between == [False, True]
        assert predicted


@pytest.mark.parametrize("shares", [[1 / 16, None], [None, 1 / 16], [1 / 16, 3 / 4]])
def test_ranks_that_plan_differently_all_raise(shares: list[float | None], tmp_path: Path) -> None:
    """Before anything moves, also where one of them would leave all as it is."""
    budget = sum(p.nbytes for p in net(Deep).parameters()) * 7 // 4
    found = pool(2).run(measured.plan_apart, tmp_path, budget, shares)
    for said, stayed in found:
        assert said.startswith("RuntimeError: the ranks have made different plans"), said
        assert stayed
    decided = re.findall(r"rank (\d) \((\w{8})\): (\d+) moves, [^;.]* bytes on nvme", found[0][0])
    assert [rank for rank, *_ in decided] == ["0", "1"]
    assert decided[0][1] != decided[1][1]
    assert [int(moves) > 0 for *_, moves in decided] == [share is not None for share in shares]


def test_a_fit_is_measured_again_where_batches_of_one_rank_differ(tmp_path: Path) -> None:
    found = pool(2).run(measured.fit_with_batches, tmp_path, [[4, 4], [4, 6], [4, 6], [2, 3]])
    assert found == [[4, 6, 6, 3]] * 2
