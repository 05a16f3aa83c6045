"""The plan of a run: printed, kept, and obeyed; what does not fit is refused before anything is moved."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning_cases import assert_same, loader, net, trainer, weights, zinf
from plan_cases import Deep, engine, free

from lightning_zinf import MemoryConfig
from lightning_zinf.engine.partition import options_of
from lightning_zinf.memory.planner import Plan, make_plan

MIB = 2**20


class Deeper(Deep):
    depth = 24


def plan_of(module: Any) -> Plan:
    return engine(module).plan


def test_the_plan_is_printed_and_kept_beside_the_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, logger = net(), CSVLogger(tmp_path, name="run")
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, "nvme", logger=logger).fit(module, loader())
    (printed,) = (m for m in caplog.messages if m.startswith("zinf: stage 3"))
    assert "slots for gathered weights" in printed
    assert "all, for a node" in printed
    kept = json.loads((Path(logger.log_dir) / "zinf_plan.json").read_text())
    assert kept == json.loads(json.dumps(plan_of(module).told()))
    assert kept["placement"] == {"params": "nvme", "optimizer": "nvme"}
    assert kept["fits"]
    assert kept["model"]["parameters"] == sum(p.numel() for p in module.parameters())


def test_without_a_logger_nothing_is_written(tmp_path: Path) -> None:
    trainer(tmp_path, "device").fit(net(), loader())
    trainer(tmp_path, "device", fast_dev_run=2).fit(net(), loader())
    assert not list(tmp_path.rglob("zinf_plan.json"))


@pytest.mark.parametrize("place", ["device", "host"])
def test_what_does_not_fit_is_refused_with_the_table_before_anything_moves(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = net(Deeper)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    present = sum(p.nbytes for p in module.parameters())
    free(monkeypatch, 3 * present - 1)
    # 16 bytes a parameter are needed; 4 are there and go, and just less than 12 are free: that fits up to padding.
    with pytest.raises(
        ValueError, match=r"the model does not fit: a step needs .* MiB of host memory, and .* MiB are free"
    ) as caught:
        trainer(tmp_path, zinf(place)).fit(module, loader())
    text = str(caught.value)
    assert "exp_avg_sq" in text
    assert "too little" in text
    assert "what would make it fit:" in text
    assert "offload_params='nvme', offload_optimizer='nvme'" in text
    assert_same(before, dict(module.named_parameters()))
    monkeypatch.undo()
    trainer(tmp_path, zinf(place)).fit(module, loader())


def test_evaluation_needs_no_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = net()
    free(monkeypatch, sum(p.nbytes for p in module.parameters()))
    trainer(tmp_path, "device").validate(module, loader(), verbose=False)


def least_budget(module: Any) -> int:
    """The smallest ``memory.host_bytes`` that the planner does not refuse for a module that has been partitioned."""
    found = engine(module)
    low, high = 1, 2**30
    while low < high:
        middle = (low + high) // 2
        options = options_of(found.config)
        options = type(options)(**{**vars(options), "host_bytes": middle})
        plan = make_plan(found.plan.model, found.plan.machine, options)
        low, high = (low, middle) if plan.problem is None else (middle + 1, high)
    return low


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("offload", ["auto", "nvme"])
def test_the_planned_minimum_trains_and_one_byte_less_is_refused(
    offload: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = net()
    trainer(tmp_path, "nvme", precision=precision).fit(reference, loader())
    least = least_budget(reference)

    def run(budget: int) -> Any:
        options = {"offload_params": offload, "offload_optimizer": offload, "memory": MemoryConfig(host_bytes=budget)}
        module = net()
        trainer(tmp_path, zinf("other", **options), precision=precision).fit(module, loader())
        return module

    assert_same(weights(run(least)), weights(reference))
    with pytest.raises(ValueError, match=r"memory\.host_bytes"):
        run(least - 1)


CAPPED = """
import json, resource, sys
import torch
import torch.nn as nn
import lightning.pytorch as pl
from pathlib import Path
import lightning_zinf
from lightning_zinf.engine.partition import engine_of

torch.set_num_threads(1)
cap, folder = int(sys.argv[1]), sys.argv[2]

class Net(pl.LightningModule):
    def configure_model(self):
        if not hasattr(self, "blocks"):
            torch.manual_seed(0)
            self.blocks = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(24)])
    def training_step(self, batch, index):
        return self.blocks(batch).pow(2).mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(6, 1024), batch_size=2)

warm = nn.Linear(64, 64)(torch.ones(2, 64)).sum().backward()  # thread stacks and the like, before they are counted
for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmData:"):
        used = int(line.split()[1]) * 1024
limit = used + cap
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
module = Net()
trainer = pl.Trainer(
    accelerator="cpu", devices=1, strategy="zinf", precision="bf16-mixed", max_steps=3, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
)
try:
    trainer.fit(module)
except ValueError as error:
    print(json.dumps({"refused": str(error)}))
else:
    engine = engine_of(module)
    print(json.dumps({"placement": [engine.placement.params, engine.placement.optimizer],
                      "steps": trainer.global_step, "needed": engine.plan.tiers[0].needed}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("cap", [40, 90, 140, 200, 300, 500, 900])
def test_memory_caps_from_outside_are_obeyed(cap: int, tmp_path: Path) -> None:
    """25 million parameters under RLIMIT_DATA: what is planned trains, what cannot be planned is refused by name.

    Their states take 400 MB at 16 bytes a parameter, gradients alone 50 MB.
    """
    done = subprocess.run(
        [sys.executable, "-c", CAPPED, str(cap * MIB), str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    if "refused" in told:
        assert cap < 200
        assert "what would make it fit" in told["refused"] or "activations come on top" in told["refused"]
    else:
        assert told["steps"] == 3
        assert told["needed"] <= cap * MIB
        assert (told["placement"] == ["device", "device"]) == (cap > 700)
