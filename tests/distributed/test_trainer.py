"""A Trainer with several ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trainers
from lightning_cases import Net, loader, net
from pool import pool

import lightning_zinf

SETTINGS: dict[str, dict[str, Any]] = {
    "stage-1": {"stage": 1},
    "stage-2": {"stage": 2},
    "stage-3": {"stage": 3},
    "nvme": {"offload_params": "nvme", "offload_optimizer": "nvme"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_as_ddp(setting: str, tmp_path: Path) -> None:
    """With two ranks the mean of gradients is exact, so only Adam's square root may differ, in its last place.

    A step moves a weight by lr = 1e-2 at most, of which the square root and what follows it can be wrong by 2^-21, and
    the addition by 2^-24 of the weight, below 4: over 12 steps 12 * (2^-21 * 1e-2 + 2^-22) < 3e-6. A different weight
    changes later gradients too; three times that is allowed.
    """
    options: dict[str, Any] = {"gradient_clip_val": 10.0}
    ours = pool(2).run(trainers.fit, tmp_path, SETTINGS[setting], options)
    ddp = pool(2).run(trainers.fit, tmp_path, "ddp", options)
    assert ours[0]["steps"] == ddp[0]["steps"] == 12
    for name, weight in ddp[0]["weights"].items():
        torch.testing.assert_close(ours[0]["weights"][name], weight, atol=1e-5, rtol=0)
        assert torch.equal(ours[0]["weights"][name], ours[1]["weights"][name]), name
    assert ours[0]["metrics"].keys() == ddp[0]["metrics"].keys()
    assert ours[0]["metrics"]["val_loss"] == pytest.approx(ddp[0]["metrics"]["val_loss"], rel=1e-4)
    assert ours[0]["metrics"]["val_loss"] == ours[1]["metrics"]["val_loss"]


@pytest.mark.parametrize("options", [{"stage": 2}, {"offload_params": "nvme"}], ids=["stage-2", "stage-3"])
def test_steps_are_taken_in_backward_with_the_bits_of_later_ones(options: dict[str, Any], tmp_path: Path) -> None:
    found = {u: pool(2).run(trainers.fit_early, tmp_path / u, u, options) for u in ("auto", "step")}
    for counts, weights in found["auto"]:
        assert counts[0] == 0
        assert min(counts[1:]) > 0
        for name, weight in found["step"][0][1].items():
            assert torch.equal(weights[name], weight), name
    assert not any(any(counts) for counts, _ in found["step"])


def test_sampler_is_distributed(tmp_path: Path) -> None:
    assert pool(2).run(trainers.batches_of_rank, tmp_path) == [4, 4]


def test_predict_with_uneven_batches(tmp_path: Path) -> None:
    first, second = pool(2).run(trainers.predict_unevenly, tmp_path)
    for found, count in ((first, 3), (second, 1)):
        with torch.no_grad():
            expected = [net()(batch) for batch in loader(count)]
        assert len(found) == count
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_resume(tmp_path: Path) -> None:
    for whole, resumed in pool(2).run(trainers.resume, tmp_path):
        for name in whole:
            assert torch.equal(whole[name], resumed[name]), name


def test_an_exception_on_one_rank_reaches_all(tmp_path: Path) -> None:
    first, second = pool(2).run(trainers.fail_on_one_rank_and_fit_again, tmp_path)
    assert "rank 1 stopped with RuntimeError: broken on purpose" in first[0]
    assert second[0] == "RuntimeError: broken on purpose"
    assert first[1] == second[1] == 4


@pytest.mark.parametrize("offload", ["none", "nvme"])
def test_a_weight_that_one_rank_reads(offload: str, tmp_path: Path) -> None:
    plain = pool(2).run(trainers.fit_unevenly, tmp_path, Net, offload)
    for _ in range(3):  # who waits where is a matter of chance
        for (said, weights), (_, expected) in zip(
            pool(2).run(trainers.fit_unevenly, tmp_path, trainers.Reads, offload), plain, strict=True
        ):
            assert not said
            assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("offload", ["none", "nvme"])
def test_a_weight_that_all_ranks_change(offload: str, tmp_path: Path) -> None:
    plain = pool(2).run(trainers.fit_unevenly, tmp_path, trainers.AllWrite, offload)
    late = pool(2).run(trainers.fit_unevenly, tmp_path, trainers.AllWriteLate, offload)
    for (said, weights), (_, expected) in zip(late, plain, strict=True):
        assert not said
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_weight_that_one_rank_changes(tmp_path: Path) -> None:
    for said, _ in pool(2).run(trainers.fit_unevenly, tmp_path, trainers.Writes, "none"):
        assert "ValueError: code outside of training steps changed parameters in different ways on the ranks" in said
        assert "last changed: <root>" in said


def test_a_mismatch_is_named_within_the_timeout(tmp_path: Path) -> None:
    for said, _ in pool(2).run(trainers.fit_unevenly, tmp_path, trainers.Alone, "none", 1.0):
        assert "ChannelError: rank 1 did not come within 1 s" in said
        assert "rank 0 wants unit '<root>' (parameter 'head.weight', ...)" in said


@pytest.mark.parametrize("setting", SETTINGS)
def test_averages_are_lightnings(setting: str, tmp_path: Path) -> None:
    """With two ranks the mean of gradients is exact, so DDP's weights and averages have the same bits as ours."""
    theirs = pool(2).run(trainers.average, tmp_path, "ddp", True)
    ours = pool(2).run(trainers.average, tmp_path, SETTINGS[setting], False)
    for found in ours:
        for weights, expected in zip(found[:2], theirs[0][:2], strict=True):
            for name, value in expected.items():
                assert torch.equal(weights[name], value), name
        assert found[2] == ours[0][2]
    # Rank 1 of DDP has its own running statistics in its average; ours are rank 0's everywhere.
    assert ours[0][2] == pytest.approx(theirs[0][2], rel=0.5)


@pytest.mark.parametrize("offload", ["none", "nvme"])
def test_what_rank_0_writes(offload: str, tmp_path: Path) -> None:
    assert pool(2).run(trainers.write_on_rank_0, tmp_path, offload) == [[0.0, 1.0, 2.0, 3.0]] * 2


def test_training_data_of_uneven_length(tmp_path: Path) -> None:
    """Every epoch ends for all when it ends for the first, and what was trained on is what all had."""
    uneven = pool(2).run(trainers.fit_streams, tmp_path, (10, 6))
    even = pool(2).run(trainers.fit_streams, tmp_path, (6, 6))
    assert uneven[0][0] == uneven[1][0] == even[0][0] == 6
    for name, value in even[0][1].items():
        assert torch.equal(uneven[0][1][name], value)
        assert torch.equal(uneven[1][1][name], value)


def test_every_rank_writes_its_timeline(tmp_path: Path) -> None:
    def kinds(rank: int) -> set[str]:
        found = json.loads((tmp_path / f"timeline-rank{rank}.json").read_text())["traceEvents"]
        assert {e["pid"] for e in found} == {rank}
        return {e["cat"] for e in found if e["ph"] == "X"}

    timeline = lightning_zinf.ZinfTimeline(steps=(2, 4))
    pool(2).run(trainers.fit, tmp_path, SETTINGS["nvme"], {"callbacks": [timeline, lightning_zinf.ZinfMonitor()]})
    assert kinds(0) == kinds(1) >= {"all_gather", "reduce_scatter", "nvme_read", "nvme_write", "forward", "backward"}


def test_the_monitor_logs_what_goes_between_ranks(tmp_path: Path) -> None:
    options = {"callbacks": [lightning_zinf.ZinfMonitor()], "log_every_n_steps": 2}
    first, second = pool(2).run(trainers.fit, tmp_path, SETTINGS["stage-3"], options)
    for name in ("all_gather_bytes", "reduce_scatter_bytes"):
        assert first["metrics"][f"zinf/{name}_per_step"] == second["metrics"][f"zinf/{name}_per_step"] > 0
    assert first["metrics"]["zinf/all_reduce_bytes_per_step"] == 0
