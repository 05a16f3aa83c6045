"""However the ranks are started, they train alike, and the process that the user sees has what came of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import contracts
import pytest
import torch
from lightning_cases import assert_close, assert_same
from pool import pool

FOLDER = Path(__file__).parent
PATHS = [FOLDER, FOLDER.parent / "lightning", FOLDER.parent]
LAUNCHED_BY_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run_script(strategy: str, folder: Path, *launcher: str) -> dict[str, Any]:
    """Run script.py as a user does, and return what it saved."""
    folder.mkdir()
    # None of what makes Lightning believe that somebody else has started the ranks.
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE")
    environment = {k: v for k, v in os.environ.items() if k not in (*ours, "MASTER_ADDR", "MASTER_PORT")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, PATHS)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(FOLDER / "script.py"), strategy, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert not list(folder.glob("zinf_nvme/*")), "files stay behind"
    found: dict[str, Any] = torch.load(folder / "found.pt")
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What ranks come to that the tests started themselves, with our strategy and with DDP."""
    found = {}
    for strategy in ("zinf", "ddp"):
        folder = tmp_path_factory.mktemp(strategy)
        pool(2).run(contracts.as_script, folder, strategy)
        found[strategy] = torch.load(folder / "found.pt")
    assert found["zinf"]["steps"] == found["ddp"]["steps"] == 4
    for part in ("first", "second"):
        assert_close(found["zinf"][part], found["ddp"][part])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "launcher"),
    [
        ("zinf", []),
        ("zinf_spawn", []),
        ("zinf_notebook", []),
        ("zinf_stage_3_offload_nvme", []),
        ("zinf_stage_2", []),
        ("zinf", LAUNCHED_BY_TORCHRUN),
    ],
    ids=["popen", "spawn", "fork", "popen-nvme", "popen-stage-2", "torchrun"],
)
def test_script(strategy: str, launcher: list[str], expected: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    found = run_script(strategy, tmp_path / "run", *launcher)
    for part in ("first", "second"):
        assert_same(found[part], expected["zinf"][part])
    # Lightning brings weights and metrics to the process that spawned or forked the ranks, and no loops.
    assert found["steps"] == (0 if strategy in ("zinf_spawn", "zinf_notebook") else 4)
    assert found["metrics"] == expected["zinf"]["metrics"]
    assert found["test"] == expected["zinf"]["test"]
