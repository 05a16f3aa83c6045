"""Parts of Lightning that save and load by themselves: the learning rate finder and SLURM's requeueing."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.tuner import Tuner
from lightning_cases import Net, assert_same, loader, net, trainer
from sharded_cases import fit, strategy

import lightning_zinf
from lightning_zinf.checkpoint.source import Checkpoint


class Tuned(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def found(folder: Path, how: Any, **options: Any) -> tuple[Any, Any, Any]:
    model = net(Tuned)
    used = trainer(folder, how, max_epochs=2, **options)
    finder = Tuner(used).lr_find(model, loader(8), num_training=16, early_stop_threshold=None)
    assert finder is not None
    return model, used, finder


@pytest.mark.parametrize("place", ["none", "nvme"])
def test_lr_find(place: str, tmp_path: Path) -> None:
    """It finds what it finds with the plain Trainer, puts everything back, and training is as if it had not run."""
    model, used, ours = found(tmp_path, strategy(place))
    plain, _, theirs = found(tmp_path, "auto")
    assert ours.results["lr"] == pytest.approx(theirs.results["lr"])
    assert ours.results["loss"] == pytest.approx(theirs.results["loss"], rel=1e-3)
    assert ours.suggestion() == theirs.suggestion()
    assert model.hparams.lr == plain.hparams.lr == ours.suggestion()
    assert not list(tmp_path.glob(".lr_find*"))  # neither a file nor a folder
    assert_same(lightning_zinf.full_state_dict(model), dict(net(Tuned).state_dict()))
    assert used.global_step == 0
    used.fit(model, loader(8))
    fresh = net(Tuned, lr=ours.suggestion())
    trainer(tmp_path, strategy(place), max_epochs=2).fit(fresh, loader(8))
    assert_same(lightning_zinf.full_state_dict(model), lightning_zinf.full_state_dict(fresh))


SLURM = """
import os, signal, sys
sys.path[:0] = sys.argv[3].split(os.pathsep)
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning_cases import loader, net, trainer
from sharded_cases import Model, strategy
import lightning_zinf

class Signalled(Model):
    def on_train_batch_start(self, batch, batch_idx):
        if sys.argv[2] == "signal" and self.trainer.global_step == 10:
            os.kill(os.getpid(), signal.SIGUSR1)  # is handled when the step is done
    def on_train_batch_end(self, *_):
        if sys.argv[2] == "signal" and self.trainer.global_step == 11:
            torch.save(lightning_zinf.full_state_dict(self), sys.argv[1] + "/then.pt")

model = net(Signalled)
used = trainer(sys.argv[1], strategy("nvme"), max_epochs=2, plugins=[SLURMEnvironment(auto_requeue=True)])
used.fit(model, loader(8))
torch.save((lightning_zinf.full_state_dict(model), used.global_step), sys.argv[1] + f"/{sys.argv[2]}.pt")
"""


def slurm(folder: Path, how: str, programs: Path) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).parent
    paths = os.pathsep.join(map(str, (tests.parent, tests, tests.parent / "lightning")))
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    job.update(SLURM_LOCALID="0", SLURM_NODEID="0", SLURM_NODELIST="localhost", SLURM_NNODES="1")
    base = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    path = f"{programs}{os.pathsep}{base['PATH']}"
    return subprocess.run(
        [sys.executable, "-c", SLURM, str(folder), how, paths],
        env={**base, **job, "PATH": path, "OMP_NUM_THREADS": "1", "MASTER_PORT": "29731"},
        check=True,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_slurm_requeues_and_goes_on(tmp_path: Path) -> None:
    """The signal saves a checkpoint and asks SLURM to start again; the next job goes on from it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    scontrol = programs / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    slurm(tmp_path, "signal", programs)
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    path = tmp_path / "hpc_ckpt_1.ckpt"
    with Checkpoint(path) as source:
        assert source.trainer()["global_step"] == 11
        assert_same(
            {name: source.tensor(name) for name in source.names()},
            torch.load(tmp_path / "then.pt", weights_only=True),
        )
    slurm(tmp_path, "again", programs)
    state, steps = torch.load(tmp_path / "again.pt", weights_only=True)
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    resumed, used = fit(tmp_path, "none", 2, path=path)  # as when its name is given
    assert steps == used.global_step > 11
    assert_same(state, lightning_zinf.full_state_dict(resumed))
