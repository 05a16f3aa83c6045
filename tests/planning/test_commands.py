"""``zinf plan`` and ``zinf bench``: what they print, write and refuse."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lightning_zinf import cli_bench
from lightning_zinf.cli import main
from lightning_zinf.memory.planner import Machine, PlanOptions, Rates, Shape, make_plan, model_of
from lightning_zinf.memory.planner.suggest import nearest_changes
from lightning_zinf.planning import cache, measure
from lightning_zinf.planning.plot import batches, draw

ROOT = Path(__file__).parents[2]
DGX2 = str(ROOT / "configs" / "clusters" / "dgx2.yaml")
SMALL = ["--layers", "2", "--hidden", "64", "--heads", "2", "--vocab", "128", "--seq", "16"]
RATES = {"adam": 5e10, "flops_bf16": 1e11, "flops_fp32": 5e10, "nvme_read": 2e9, "nvme_write": 2e9, "nvme_mixed": 2e9}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ZINF_NVME_PATH", str(tmp_path))


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_small_model_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = told(capsys, *SMALL)
    assert plan["fits"]
    assert plan["step"] is None
    assert any("run `zinf bench`" in note for note in plan["notes"])
    cache.save(RATES, tmp_path)
    plan = told(capsys, *SMALL, "--offload-params", "nvme", "--offload-optimizer", "nvme")
    assert plan["placement"] == {"params": "nvme", "optimizer": "nvme"}
    assert plan["step"]["seconds"] >= plan["step"]["bound_seconds"] > 0
    assert plan["traffic"]["nvme_write"] / plan["model"]["parameters"] == pytest.approx(12, rel=0.15)
    assert {r["tier"] for r in plan["residency"]} == {"nvme"}


def test_measurements_of_another_disk_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.save(RATES, "/proc")
    plan = told(capsys, *SMALL)
    assert any("which is another one" in note for note in plan["notes"])
    assert "nvme_read" not in plan["machine"]["rates"]
    assert plan["machine"]["rates"]["adam"] == RATES["adam"]


def test_ranks_of_one_machine_share_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.save({**RATES, "gather": 1e9}, tmp_path)
    one, two = told(capsys, *SMALL), told(capsys, *SMALL, "--devices", "2")
    assert two["world_size"] == 2
    assert two["machine"]["rates"]["adam"] == one["machine"]["rates"]["adam"] / 2
    assert two["machine"]["rates"]["gather"] == 1e9
    assert "gather" not in one["machine"]["rates"]


def test_a_configuration_of_lightning(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "gpt_nvme.yaml")
    assert main(["plan", config]) == 2
    assert "the model has no class_path" in capsys.readouterr().err
    plan = told(capsys, config, "--model-class", f"{ROOT}/examples/gpt/module.py:GPTModule", "--seq", "128")
    assert plan["model"]["parameters"] == 6_375_936
    assert plan["placement"] == {"params": "nvme", "optimizer": "nvme"}
    assert (plan["options"]["batch"], plan["options"]["clip"]) == (8, True)
    assert not plan["activations_counted"]


def test_a_trillion_parameters_without_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "model_type": "gpt2", "n_layer": 128, "n_embd": 25600, "n_head": 256, "n_positions": 1024, "vocab_size": 50257
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path / "config.json"), "--cluster", DGX2, "--recompute"]) == 0
    out = capsys.readouterr().out
    assert "1,007,988,403,200 parameters" in out
    assert "It does not fit." in out
    assert "TiB too little" in out
    assert "What would make it fit:" in out
    plan = told(capsys, str(tmp_path), "--cluster", DGX2, "--recompute")
    assert not plan["fits"]
    assert [t["tier"] for t in plan["tiers"]] == ["device", "host", "nvme"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--layers", "2"], "or --layers, --hidden and --heads"),
        (["c.json", *SMALL], "give either a configuration or --layers"),
        ([*SMALL, "--heads", "7"], "hidden must be a multiple of heads"),
        ([*SMALL, "--batch", "-1"], "batch must be a positive whole number"),
        ([*SMALL, "--stage", "2", "--offload-params", "nvme"], "needs stage=3"),
    ],
)
def test_wrong_usage(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_a_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "no-such-file.json"]) == 1
    assert "no-such-file.json" in capsys.readouterr().err


def test_a_plot_without_matplotlib_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plan", *SMALL, "--plot", "x.png"]) == 2
    assert "pip install 'lightning-zinf[plot]'" in capsys.readouterr().err


def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    machine = Machine("m", 2**30, 2**34, 2**40, Rates(flops=1e12, nvme_read=1e9, nvme_write=1e9))
    plan = make_plan(model_of(Shape(2, 64, 2, 128, 16), "bf16-mixed"), machine, PlanOptions("nvme", "nvme"))
    draw(plan, str(tmp_path / "x.png"), batches(plan, 4))
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_bench_measures_and_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the measuring itself replaced: it has a test of its own."""
    asked: list[Any] = []

    def measured(folder: Any, *, seconds: float, say: Any) -> dict[str, float]:
        asked.append((folder, seconds))
        return RATES

    monkeypatch.setattr(measure, "measure_machine", measured)
    assert main(["bench", "--nvme-path", str(tmp_path), "--seconds", "0.5"]) == 0
    out = capsys.readouterr().out
    assert asked == [((str(tmp_path),), 0.5)]
    assert "optimizer kernel" in out
    assert "50.00 GB/s" in out
    assert cache.load().rates == RATES
    assert main(["bench", "--no-save", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] is None
    assert main(["bench", "--seconds", "0"]) == 2
    assert set(cli_bench._TEXTS) >= set(RATES)


# ---------------------------------------------------------------------- what would fit


def test_changes_make_it_fit_and_the_smallest_come_first() -> None:
    """A batch too large, on one machine: fewer samples, recomputation, or more nodes do not come all at once."""
    model = model_of(Shape(8, 1024, 8, vocab=0, seq=1024), "bf16-mixed")
    machine = Machine("m", 2 * 10**9, 10**11, 10**12, Rates())
    options = PlanOptions("nvme", "nvme", batch=16)
    assert not make_plan(model, machine, options).fits
    changes = nearest_changes(model, machine, options)
    assert all(change.plan.fits for change in changes)
    assert changes[0].what == "activation_checkpointing=True"
    assert any(change.what.startswith("a batch of ") for change in changes)


def test_offloading_is_suggested_where_it_helps() -> None:
    model = model_of(Shape(8, 1024, 8, vocab=0, seq=64), "bf16-mixed")
    machine = Machine("m", 0, 6 * 10**8, 10**12, Rates(), aliased=True)
    plan = make_plan(model, machine, PlanOptions("none", "none"))
    assert not plan.fits
    changes = [c.what for c in nearest_changes(model, machine, plan.options)]
    assert "offload_params='nvme', offload_optimizer='nvme'" in changes


def test_the_least_number_of_nodes_is_found() -> None:
    model = model_of(Shape(8, 1024, 8, vocab=0, seq=64), "bf16-mixed")
    machine = Machine("m", 8 * 10**8, 10**8, 2 * 10**8, Rates())
    options = PlanOptions("nvme", "nvme")
    assert not make_plan(model, machine, options).fits
    found = next(c for c in nearest_changes(model, machine, options) if "nodes" in c.what)
    nodes = found.plan.machine.nodes
    assert found.plan.fits
    assert not make_plan(model, machine.with_nodes(nodes - 1), options).fits


def test_nothing_helps_where_nothing_can() -> None:
    model = model_of(Shape(1, 4096, 8, vocab=0, seq=64), "bf16-mixed")
    machine = Machine("m", 10**6, 10**12, 10**12, Rates())
    assert nearest_changes(model, machine, PlanOptions()) == []


def test_transformers_is_asked_for_what_is_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    if importlib.util.find_spec("transformers") is None:
        assert main(["plan", str(tmp_path)]) == 2
        assert "install transformers" in capsys.readouterr().err
    fake = types.ModuleType("transformers")
    fake.__spec__ = importlib.util.spec_from_loader("transformers", None)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    assert main(["plan", str(tmp_path)]) == 2
    assert "transformers cannot build a 'mamba'" in capsys.readouterr().err
