"""What Lightning and its users expect of a strategy, with two ranks: as DDP does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contract_models as models
import contracts
import pytest
import torch
from lightning_cases import Net, assert_close, assert_same, loader, net
from pool import pool

SETTINGS: dict[str, dict[str, Any]] = {
    "stage-1": {"stage": 1},
    "stage-2": {"stage": 2},
    "stage-3": {"stage": 3},
    "nvme": {"offload_params": "nvme", "offload_optimizer": "nvme"},
}
NVME = SETTINGS["nvme"]
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS)


def two(function: Any, *args: Any) -> list[Any]:
    return pool(2).run(function, *args)


def check_as_ddp(
    folder: Path, setting: Any, kind: type[Net] = Net, ddp: str = "ddp", batches: int = 12, **options: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Fit as DDP does: weights up to the bound of test_trainer.py, and everything else as well; equal on both ranks."""
    ours = two(contracts.fit, folder, SETTINGS[setting], kind, options, batches)
    theirs = two(contracts.fit, folder, ddp, kind, options, batches)
    assert_close(ours[0]["weights"], theirs[0]["weights"])
    parameters = {name for name, _ in net(kind).named_parameters()}
    for name in parameters:
        assert torch.equal(ours[0]["weights"][name], ours[1]["weights"][name]), name
        assert not torch.equal(ours[0]["weights"][name], net(kind).state_dict()[name]) or "experts.3" in name, name
    for mine, oracle in zip(ours, theirs, strict=True):
        assert mine["steps"] == oracle["steps"]
        assert mine["rates"] == oracle["rates"]
        assert mine["metrics"] == pytest.approx(oracle["metrics"], rel=1e-4, abs=1e-4)
        assert mine["test"] == pytest.approx(oracle["test"], rel=1e-4, abs=1e-4)
    return ours, theirs


# ---------------------------------------------------------------------- loops


@EVERY_SETTING
def test_manual_optimization_as_ddp(setting: str, tmp_path: Path) -> None:
    ours, _ = check_as_ddp(tmp_path, setting, models.Manual)
    assert ours[0]["steps"] == 12


@EVERY_SETTING
def test_manual_optimization_with_two_optimizers_as_ddp(setting: str, tmp_path: Path) -> None:
    # One optimizer's parameters are out of the graph while the other's turn lasts.
    ours, _ = check_as_ddp(tmp_path, setting, models.Alternating, "ddp_find_unused_parameters_true")
    assert ours[0]["steps"] == 18


@EVERY_SETTING
def test_gan_with_toggled_optimizers_as_ddp(setting: str, tmp_path: Path) -> None:
    ours, _ = check_as_ddp(tmp_path, setting, models.Gan, "ddp_find_unused_parameters_true")
    assert ours[0]["steps"] == 24


@EVERY_SETTING
def test_accumulation_steps_on_the_tail_of_an_epoch_as_ddp(setting: str, tmp_path: Path) -> None:
    # Five batches for each rank: two steps of two, and one of the batch that is left.
    ours, _ = check_as_ddp(tmp_path, setting, batches=10, accumulate_grad_batches=2)
    assert ours[0]["steps"] == 6


@EVERY_SETTING
def test_accumulation_may_change_between_epochs_as_ddp(setting: str, tmp_path: Path) -> None:
    ours, _ = check_as_ddp(tmp_path, setting, accumulation={0: 1, 1: 4})
    assert ours[0]["steps"] == 6 + 2


@EVERY_SETTING
def test_gradients_zeroed_by_the_module_as_ddp(setting: str, tmp_path: Path) -> None:
    check_as_ddp(tmp_path, setting, models.Zeroed)


@EVERY_SETTING
@pytest.mark.parametrize(("algorithm", "bound"), [("norm", 0.5), ("value", 0.01)])
def test_clipping_as_ddp(setting: str, algorithm: str, bound: float, tmp_path: Path) -> None:
    clipped = {"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm}
    ours, _ = check_as_ddp(tmp_path, setting, **clipped)
    # Adam hardly minds the scale of gradients, but its moments do: the bound has to have been reached.
    unclipped = two(contracts.fit, tmp_path, SETTINGS[setting], Net, {})
    assert any(not torch.equal(w, unclipped[0]["weights"][name]) for name, w in ours[0]["weights"].items())


@EVERY_SETTING
def test_own_clipping_of_the_module_as_ddp(setting: str, tmp_path: Path) -> None:
    check_as_ddp(tmp_path, setting, models.Clipped)


@pytest.mark.parametrize("kind", [models.Scheduled, models.ByEpoch, models.OnPlateau])
def test_schedules_as_ddp(kind: type[Net], tmp_path: Path) -> None:
    ours, _ = check_as_ddp(tmp_path, "nvme", kind, max_epochs=3)
    assert ours[0]["rates"][0] < 1e-2


# ---------------------------------------------------------------------- layers


@EVERY_SETTING
def test_synced_batch_norm_as_ddp(setting: str, tmp_path: Path) -> None:
    """Layers that ``sync_batchnorm=True`` puts in talk to other ranks within forward and backward."""
    ours, _ = check_as_ddp(tmp_path, setting, models.Convolved, sync_batchnorm="replaced")
    for name, value in ours[0]["weights"].items():
        assert torch.equal(value, ours[1]["weights"][name]), name  # the statistics as well
    alone = two(contracts.fit, tmp_path, SETTINGS[setting], models.Convolved, {})
    assert not torch.equal(ours[0]["weights"]["norm.running_mean"], alone[0]["weights"]["norm.running_mean"])


def test_sync_batchnorm_puts_in_torch_s_layer(tmp_path: Path) -> None:
    # Which torch has for accelerators only, and says so: the layer was there, and its weights with it.
    ours, theirs = (two(contracts.torch_sync_batch_norm, tmp_path, strategy) for strategy in (NVME, "ddp"))
    for mine, oracle in zip(ours, theirs, strict=True):
        assert mine["kind"] == oracle["kind"] == "_BatchNormXd"  # taken out again after fit
        assert "SyncBatchNorm expected input tensor to be on GPU" in mine["said"]
        assert mine["metrics"] == pytest.approx(oracle["metrics"], rel=1e-5)


@EVERY_SETTING
def test_batch_norm_evaluates_with_the_statistics_of_rank_0(setting: str, tmp_path: Path) -> None:
    ours, theirs = check_as_ddp(tmp_path, setting, models.Convolved)
    for name in ("norm.running_mean", "norm.running_var"):
        assert torch.equal(ours[0]["weights"][name], ours[1]["weights"][name])
        torch.testing.assert_close(ours[1]["weights"][name], theirs[0]["weights"][name])


@EVERY_SETTING
def test_experts_that_ranks_choose_differently_as_ddp(setting: str, tmp_path: Path) -> None:
    ours, theirs = check_as_ddp(tmp_path, setting, models.Routed, "ddp_find_unused_parameters_true")
    assert ours[0]["chosen"] != ours[1]["chosen"]
    assert [rank["chosen"] for rank in ours] == [rank["chosen"] for rank in theirs]
    for name, value in net(models.Routed).state_dict().items():
        if "experts.3" in name:  # no gradient, no step: not even weight decay
            assert torch.equal(ours[0]["weights"][name], value)


@EVERY_SETTING
@pytest.mark.parametrize("accumulate", [1, 3])
def test_parameters_that_only_one_rank_uses_as_ddp(setting: str, accumulate: int, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": accumulate}
    ours = two(contracts.unused, tmp_path, SETTINGS[setting], options)
    theirs = two(contracts.unused, tmp_path, "ddp_find_unused_parameters_true", options)
    assert_close(ours[0][0], theirs[0][0])
    assert ours[0][1] == theirs[0][1]  # parameters that no rank used have no state
    assert_same(ours[0][0], ours[1][0])


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["stage-2", "stage-3", "nvme"])
@pytest.mark.parametrize("what", ["blocks", "module"])
def test_compiled(setting: str, what: str, tmp_path: Path) -> None:
    """aot_eager computes what eager does, so compiling changes no bit, and DDP's bound holds."""
    ours = two(contracts.compiled, tmp_path, SETTINGS[setting], what)
    eager = two(contracts.compiled, tmp_path, SETTINGS[setting], "nothing")
    theirs = two(contracts.compiled, tmp_path, "ddp", what)
    assert min(ours[0]["graphs"], theirs[0]["graphs"]) > eager[0]["graphs"] == 0
    assert_same(ours[0]["weights"], ours[1]["weights"])
    assert_same(ours[0]["weights"], eager[0]["weights"])
    assert_close(ours[0]["weights"], theirs[0]["weights"])
    for mine, plain in zip(ours, eager, strict=True):
        assert len(mine["seen"]) > 0
        assert all(torch.equal(a, b) for a, b in zip(mine["seen"], plain["seen"], strict=True))


# ---------------------------------------------------------------------- logs and collectives


@EVERY_SETTING
def test_metrics_logs_and_collectives_within_steps_as_ddp(setting: str, tmp_path: Path) -> None:
    ours, theirs = check_as_ddp(tmp_path, setting, models.Metered)
    for mine, oracle in zip(ours, theirs, strict=True):
        assert len(mine["seen"]) == len(oracle["seen"]) > 12
        for a, b in zip(mine["seen"], oracle["seen"], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert ours[0]["metrics"]["val_rank"] == 0.5
    assert ours[0]["metrics"]["rank"] == 1.0
    # A metric of a single step is the rank's own; all others are everybody's.
    differing = {n for n, v in ours[0]["metrics"].items() if v != ours[1]["metrics"][n]}
    assert differing == {"train_error_step"}


# ---------------------------------------------------------------------- several calls


@EVERY_SETTING
def test_every_entry_point_in_a_row_as_ddp(setting: str, tmp_path: Path) -> None:
    ours = two(contracts.every_entry_point, tmp_path, SETTINGS[setting])
    theirs = two(contracts.every_entry_point, tmp_path, "ddp")
    for (weights, results), (oracle, expected) in zip(ours, theirs, strict=True):
        assert_close(weights, oracle)
        assert results == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "strategies",
    [
        [NVME, NVME, SETTINGS["stage-2"], SETTINGS["stage-1"]],
        [SETTINGS["stage-2"], "ddp", SETTINGS["stage-2"], "ddp"],
        ["ddp", SETTINGS["stage-1"], "ddp", SETTINGS["stage-3"]],
    ],
    ids=["ours", "stage-2-and-ddp", "ddp-first"],
)
def test_several_trainers_on_one_module_as_ddp(strategies: list[Any], tmp_path: Path) -> None:
    """The same options go on with the engine that is there; others, and other strategies, take the weights over."""
    ours = two(contracts.several_trainers, tmp_path, strategies)
    theirs = two(contracts.several_trainers, tmp_path, ["ddp"] * len(strategies))
    for mine, other, oracle in zip(ours[0], ours[1], theirs[0], strict=True):
        assert_same(mine, other)
        assert_close(mine, oracle)


@pytest.mark.parametrize("setting", ["nvme", "stage-3"])
def test_another_strategy_cannot_take_shards_over(setting: str, tmp_path: Path) -> None:
    """It hung: DDP's collectives waited for ranks that waited for weights."""
    theirs = two(contracts.several_trainers, tmp_path, ["ddp", "ddp"])[0][-1]
    for said, weights in two(contracts.taken_over, tmp_path, SETTINGS[setting], "ddp"):
        assert len(said) == 3
        assert all("DDPStrategy cannot run this module: its weights are shards over the ranks" in s for s in said)
        assert_close(weights, theirs)


@pytest.mark.parametrize("setting", ["stage-1", "stage-2"])
def test_a_rank_alone_may_call_backward_after_fit(setting: str, tmp_path: Path) -> None:
    """Where every rank has all weights, what one of them does after ``fit`` is nobody else's business."""
    for weights, gradients in two(contracts.backward_alone, tmp_path, SETTINGS[setting]):
        model = net()
        model.load_state_dict(weights)
        model.loss(next(iter(loader()))).backward()
        for name, parameter in model.named_parameters():
            if gradients:
                assert torch.equal(gradients[name], parameter.grad), name


@EVERY_SETTING
def test_checkpoint_saved_after_teardown(setting: str, tmp_path: Path) -> None:
    first, second = two(contracts.save_after_teardown, tmp_path, SETTINGS[setting])
    assert_same(first, second)
    direct = first.pop("direct")
    for name in ("fitted", "tested"):
        checkpoint = torch.load(tmp_path / f"{name}.ckpt")
        assert_same(dict(checkpoint["state_dict"]), first)
        assert len(checkpoint["optimizer_states"][0]["state"]) == len(list(net().parameters()))
        loaded = Net.load_from_checkpoint(tmp_path / f"{name}.ckpt")
        assert_same(dict(loaded.state_dict()), first)
    with torch.no_grad():
        assert torch.equal(loaded(next(iter(loader()))), direct)


# ---------------------------------------------------------------------- callbacks


@EVERY_SETTING
def test_model_checkpoint_and_resuming_from_last(setting: str, tmp_path: Path) -> None:
    whole = two(contracts.checkpoints, tmp_path / "whole", SETTINGS[setting], 4, None)
    two(contracts.checkpoints, tmp_path / "parts", SETTINGS[setting], 2, None)
    parts = two(contracts.checkpoints, tmp_path / "parts", SETTINGS[setting], 4, "last")
    theirs = two(contracts.checkpoints, tmp_path / "ddp", "ddp", 4, None)
    for rank in (0, 1):
        assert_same(whole[rank]["weights"], parts[rank]["weights"])
        assert_close(whole[rank]["weights"], theirs[rank]["weights"])
        for found in (whole[rank], parts[rank]):
            assert found["steps"] == theirs[rank]["steps"] == 16
            assert Path(found["best"]).name == Path(theirs[rank]["best"]).name
            assert found["score"] == whole[0]["score"]
            assert found["tested"] == whole[rank]["tested"]
            assert [Path(p).name for p in found["kept"]] == [Path(p).name for p in theirs[rank]["kept"]]
        assert whole[rank]["tested"] == pytest.approx(theirs[rank]["tested"], rel=1e-4)
    names = {path.name for path in (tmp_path / "whole" / "kept").iterdir()}
    assert names == {path.name for path in (tmp_path / "ddp" / "kept").iterdir()}
    last = torch.load(tmp_path / "parts" / "kept" / "last.ckpt")
    assert_same(dict(last["state_dict"]), whole[0]["weights"])


@pytest.mark.parametrize("setting", ["stage-3", "nvme"])
def test_ranks_may_load_a_checkpoint_at_different_times(setting: str, tmp_path: Path) -> None:
    for saved, loaded in two(contracts.load_late, tmp_path, SETTINGS[setting]):
        assert saved == loaded


def test_a_ddp_checkpoint_goes_on_here_and_ours_there(tmp_path: Path) -> None:
    ends = []
    for first, second in ((NVME, "ddp"), ("ddp", NVME), ("ddp", "ddp")):
        folder = tmp_path / str(len(ends))
        two(contracts.checkpoints, folder, first, 2, None)
        ends.append(two(contracts.checkpoints, folder, second, 4, "last")[0])
    for end in ends[:2]:
        assert end["steps"] == 16
        assert_close(end["weights"], ends[2]["weights"])


def test_early_stopping_stops_all_ranks_together(tmp_path: Path) -> None:
    """EarlyStopping has the ranks decide together, whoever's metric it was that got worse."""
    ours = two(contracts.stop_early, tmp_path, NVME)
    assert ours == two(contracts.stop_early, tmp_path, "ddp")
    assert ours[0] == ours[1]
    assert ours[0][0] < 6


# ---------------------------------------------------------------------- data


@EVERY_SETTING
def test_streams_of_different_lengths_in_validation_and_prediction(setting: str, tmp_path: Path) -> None:
    ranks = two(contracts.uneven_streams, tmp_path, SETTINGS[setting])
    model = net(contracts.Summing)
    model.load_state_dict(ranks[0]["weights"])
    total = rows = 0.0
    for rank, found in enumerate(ranks):
        count = 18 if rank else 6
        with torch.no_grad():
            batches = list(models.stream(count, rank))
            expected = [float(model.loss(batch)) for batch in batches]
            assert torch.equal(found["predicted"], torch.cat([model(b) for b in found["rows"].split(4)]))
        assert found["inside"] == found["alone"] == expected
        own = sum(loss * len(batch) for loss, batch in zip(expected, batches, strict=True))
        assert found["metrics"]["own_loss"] == pytest.approx(own / count, rel=1e-5)
        total, rows = total + own, rows + count
    for found in ranks:
        assert found["metrics"]["val_loss"] == pytest.approx(total / rows, rel=1e-5)


def test_prediction_of_a_remainder(tmp_path: Path) -> None:
    first, second = two(contracts.predict_a_remainder, tmp_path, NVME)
    assert (len(first), len(second)) == (3, 2)
    rows = torch.randn(5, 130, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for rank, found in enumerate((first, second)):
            assert all(torch.equal(found[i], net()(rows[rank + 2 * i][None].clone())) for i in range(len(found)))


# ---------------------------------------------------------------------- the other package


def test_both_packages_train_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    old = two(contracts.in_package, tmp_path, "pytorch_lightning", "zinf")
    new = two(contracts.in_package, tmp_path, "lightning.pytorch", "zinf")
    ddp = two(contracts.in_package, tmp_path, "pytorch_lightning", "ddp")
    assert [where for _, where in old] == ["lightning_zinf.pl"] * 2
    assert [where for _, where in new] == ["lightning_zinf.lightning"] * 2
    assert_same(old[0][0], old[1][0])
    assert_same(old[0][0], new[0][0])
    assert_close(old[0][0], ddp[0][0])
