"""To torch.distributed.checkpoint and FSDP2, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsdp2
import pytest
import torch
from lightning_cases import assert_same
from pool import close_all, pool
from sharded_cases import everything, fit

from lightning_zinf.checkpoint.source import Checkpoint
from lightning_zinf.cli import main


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("saved")
    model, used = fit(folder, "nvme", 1)
    used.save_checkpoint(folder / "zinf.ckpt")
    assert main(["convert", str(folder / "zinf.ckpt"), str(folder / "dcp.ckpt"), "--to", "dcp"]) == 0
    yield folder, everything(model, used)
    close_all()


def test_round_trip(saved: Any, tmp_path: Path) -> None:
    folder, state = saved
    assert main(["convert", str(folder / "dcp.ckpt"), str(tmp_path / "b.ckpt"), "--from", "dcp", "--trust-pickle"]) == 0
    assert_same(everything(*fit(tmp_path, "nvme", 1, path=tmp_path / "b.ckpt")), state)
    assert main(["verify", str(tmp_path / "b.ckpt")]) == 0
    whole = everything(*fit(tmp_path, "none", 2, path=folder / "zinf.ckpt"))
    assert_same(everything(*fit(tmp_path, "nvme", 2, path=tmp_path / "b.ckpt")), whole)


def test_through_fsdp2(saved: Any, tmp_path: Path) -> None:
    """FSDP2 on two ranks loads it, saves what it has, and that comes back."""
    folder, state = saved
    weights = {k: v for k, v in state.items() if not k.startswith("optimizer")}
    for found in pool(2).run(fsdp2.load_and_save, folder / "dcp.ckpt", tmp_path / "fsdp2.ckpt"):
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], value) for name, value in weights.items())
    arguments = [str(tmp_path / "fsdp2.ckpt"), str(tmp_path / "back.ckpt"), "--from", "dcp", "--trust-pickle"]
    assert main(["convert", *arguments]) == 0
    with Checkpoint(tmp_path / "back.ckpt") as source:
        assert all(torch.equal(source.tensor(name), value) for name, value in weights.items())
    model, used = fit(tmp_path, "nvme", 1, path=tmp_path / "back.ckpt")
    assert_same(everything(model, used), state)


def test_refusals(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = saved
    assert main(["convert", str(folder / "dcp.ckpt"), str(tmp_path / "b.ckpt"), "--from", "dcp"]) == 2
    assert "say --trust-pickle" in capsys.readouterr().err
    assert main(["convert", str(folder / "zinf.ckpt"), str(folder), "--to", "dcp"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["convert", str(tmp_path), str(tmp_path / "c"), "--from", "dcp", "--trust-pickle"]) == 1
    assert "has no .metadata" in capsys.readouterr().err
