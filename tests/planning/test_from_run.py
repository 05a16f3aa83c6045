"""``zinf plan --from-run``: activations as an earlier run has measured them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning_cases import Net, loader, trainer, zinf

from lightning_zinf.cli import main
from lightning_zinf.engine.partition import engine_of

BATCH = 4


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a model of two blocks; returns the folder of its plan."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ZINF_NVME_PATH", str(tmp_path))
    torch.manual_seed(1)
    module, logger = Net(), CSVLogger(tmp_path, name="run")
    trainer(tmp_path, zinf("nvme"), logger=logger).fit(module, loader())
    found = engine_of(module)
    assert found is not None
    assert found.plan.model.profiled
    return Path(logger.log_dir)


def config(folder: Path, **strategy: Any) -> str:
    """Write a LightningCLI configuration of that model."""
    path = folder / "config.yaml"
    told = {
        "model": {"class_path": "lightning_cases.Net"},
        "trainer": {
            "precision": "32-true",
            "strategy": {"class_path": "lightning_zinf.lightning.ZinfStrategy", "init_args": strategy},
        },
    }
    path.write_text(json.dumps(told))  # which is YAML too
    return str(path)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def activations(plan: Any) -> int:
    return sum(i["nbytes"] for i in plan["items"] if i["what"] == "activations")


@pytest.mark.parametrize("named", ["folder", "file"])
def test_measured_activations_count(ran: Path, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ran if named == "folder" else ran / "zinf_plan.json")
    kept = activations(json.loads((ran / "zinf_plan.json").read_text()))
    assert kept
    without = told(capsys, config(tmp_path))
    assert not without["activations_counted"]
    plan = told(capsys, config(tmp_path), "--from-run", path)
    assert plan["activations_counted"]
    assert plan["options"]["batch"] == BATCH
    assert activations(plan) == kept
    assert any("has measured" in note for note in plan["notes"])
    assert activations(told(capsys, config(tmp_path), "--from-run", path, "--batch", str(3 * BATCH))) == 3 * kept


def test_other_units_share_the_sum(ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = activations(json.loads((ran / "zinf_plan.json").read_text()))
    plan = told(capsys, config(tmp_path, units=["Tanh", "Linear"]), "--from-run", str(ran))
    assert abs(activations(plan) - kept) <= plan["model"]["units"]  # each is rounded


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recompute"], r"measured with recompute=False, and recompute=True is asked for"),
        (["--offload-activations", "nvme"], r"measured with offload_activations='none'"),
    ],
)
def test_other_options_are_refused(
    ran: Path, arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", config(tmp_path), "--from-run", str(ran), *arguments]) != 0
    assert said in capsys.readouterr().err


def test_another_model_is_refused(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--layers", "2", "--hidden", "64", "--heads", "2", "--vocab", "128", "--seq", "16"]
    assert main(["plan", *small, "--from-run", str(ran)]) != 0
    assert "another model keeps for backward" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json", "is no zinf_plan.json"),
        ("{}", "is no zinf_plan.json of this version"),
        (
            json.dumps({"activations_measured": None, "options": {}, "model": {"parameters": 1}}),
            "did not get to measure",
        ),
    ],
)
def test_files_without_measurements_are_refused(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "zinf_plan.json"
    path.write_text(content)
    assert main(["plan", config(tmp_path), "--from-run", str(path)]) != 0
    assert said in capsys.readouterr().err
    assert main(["plan", config(tmp_path), "--from-run", str(tmp_path / "none.json")]) != 0
