"""Predicted step times beside measured ones, over sizes, batches, tiers and budgets.

    python benchmarks/predicted.py                    # about ten minutes; for a quiet machine
    python benchmarks/predicted.py --only 3 --steps 5 # the first three configurations

The machine's links are measured as ``zinf bench`` does, at the start; the rate of compute once as there (a block of
width 512) and once for a block of each configuration's own shape. Each configuration then trains a few steps of a GPT.
Predictions know nothing of those steps. Times are medians; a shared machine makes them noisy, which the spread shows.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "gpt"))
from model import GPT

from lightning_zinf import MemoryConfig, OverlapConfig, ZinfStrategy
from lightning_zinf.memory.machine import free_host_bytes
from lightning_zinf.memory.planner import Machine, PlanOptions, Rates, Shape, make_plan, model_of
from lightning_zinf.planning.measure import compute_rate, measure_machine

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A configuration."""

    layers: int
    hidden: int
    seq: int
    batch: int
    params: str
    optimizer: str
    budget: int | None = None
    clip: bool = False
    precision: str = "bf16-mixed"

    def __str__(self) -> str:
        budget = f" {self.budget // MIB} MiB" if self.budget else ""
        clip = " clip" if self.clip else ""
        tiers = f"{self.params}/{self.optimizer}{budget}{clip}"
        return f"{self.layers}x{self.hidden} seq {self.seq} batch {self.batch} {tiers} {self.precision}"


CASES = [
    Case(8, 512, 32, 2, "none", "none"),
    Case(8, 512, 32, 2, "none", "nvme"),
    Case(8, 512, 32, 2, "nvme", "nvme"),
    Case(8, 512, 32, 2, "nvme", "nvme", clip=True),
    Case(8, 512, 128, 4, "none", "none"),
    Case(8, 512, 128, 4, "nvme", "nvme"),
    Case(8, 512, 32, 2, "nvme", "nvme", precision="32-true"),
    Case(8, 512, 32, 2, "none", "none", precision="32-true"),
    Case(8, 512, 32, 2, "auto", "auto", budget=160 * MIB),
    Case(8, 512, 32, 2, "auto", "auto", budget=240 * MIB),
    Case(16, 512, 32, 2, "nvme", "nvme"),
    Case(12, 768, 128, 4, "none", "none"),
    Case(12, 768, 128, 4, "nvme", "nvme"),
    Case(12, 768, 128, 4, "none", "nvme", clip=True),
    Case(12, 768, 64, 2, "auto", "auto", budget=500 * MIB),
    Case(16, 1024, 64, 2, "nvme", "nvme"),
]


class Module(pl.LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.model: GPT | None = None
        self.ends: list[float] = []

    def configure_model(self) -> None:
        if self.model is None:
            torch.manual_seed(0)
            self.model = GPT(256, self.case.seq, self.case.hidden, self.case.layers, self.case.hidden // 64)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        assert self.model is not None
        return F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def measure(case: Case, steps: int, folder: str) -> list[float]:
    """Return the seconds of each step but the first two, which watch and record."""
    strategy = ZinfStrategy(
        offload_params=case.params,  # type: ignore[arg-type]
        offload_optimizer=case.optimizer,  # type: ignore[arg-type]
        nvme_path=folder,
        memory=MemoryConfig(host_bytes=case.budget),
        overlap=OverlapConfig(replan=False),  # what is predicted is the plan that a run begins with
    )
    data = torch.randint(256, ((steps + 3) * case.batch, case.seq + 1), generator=torch.Generator().manual_seed(0))
    module = Module(case)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, precision=case.precision,  # type: ignore[arg-type]
        max_steps=steps + 3, logger=False, gradient_clip_val=1.0 if case.clip else None, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=case.batch))  # type: ignore[arg-type]
    return [b - a for a, b in zip(module.ends[2:], module.ends[3:], strict=False)]


def predict(case: Case, rates: dict[str, float], flops: float) -> dict[str, Any]:
    """Return the planner's step time and what binds."""
    shape = Shape(case.layers, case.hidden, case.hidden // 64, 256, case.seq)
    known = {k: v for k, v in rates.items() if k in Rates.__dataclass_fields__ and k != "gather"}
    machine = Machine("here", 0, free_host_bytes(), 2**50, Rates(**{**known, "flops": flops}), aliased=True)
    options = PlanOptions(
        case.params,  # type: ignore[arg-type]
        case.optimizer,  # type: ignore[arg-type]
        batch=case.batch,
        host_bytes=case.budget,
        clip=case.clip,
    )
    plan = make_plan(model_of(shape, case.precision), machine, options)  # type: ignore[arg-type]
    assert plan.prediction is not None
    assert plan.problem is None, plan.problem
    return {"seconds": plan.prediction.seconds, "binding": plan.prediction.binding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, default=len(CASES), help="take the first so many configurations")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nvme-path", default=".", help="folder on a disk")
    parser.add_argument("--json", default="", help="write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rates = measure_machine(args.nvme_path)
    print(", ".join(f"{name} {rate / 1e9:.3g} G/s" for name, rate in rates.items()))
    print(f"{'configuration':<62} measured  spread  predicted   error  own shape   error  bound by", flush=True)
    errors: list[tuple[float, float]] = []
    results = []
    for case in CASES[: args.only]:
        low = torch.float32 if case.precision == "32-true" else torch.bfloat16
        general = rates["flops_fp32" if low == torch.float32 else "flops_bf16"]
        own = compute_rate(low, 1.0, case.hidden, case.batch, case.seq)
        first, second = predict(case, rates, general), predict(case, rates, own)
        with tempfile.TemporaryDirectory(dir=args.nvme_path) as folder:
            times = measure(case, args.steps, folder)
        gc.collect()
        middle = statistics.median(times)
        low_time, high = statistics.quantiles(times, n=4)[::2]
        errors.append((first["seconds"] / middle - 1, second["seconds"] / middle - 1))
        print(
            f"{case!s:<62} {middle:>7.3f} s {(high - low_time) / middle:>6.0%} {first['seconds']:>8.3f} s "
            f"{errors[-1][0]:>+6.0%} {second['seconds']:>8.3f} s {errors[-1][1]:>+6.0%}  {second['binding']}",
            flush=True,
        )
        results.append({**asdict(replace(case)), "times": times, "general": first, "own": second})
    for name, column in zip(("predicted", "own shape"), zip(*errors, strict=True), strict=True):
        print(f"median |error| of {name}: {statistics.median(map(abs, column)):.0%}")
    if args.json:
        Path(args.json).write_text(json.dumps({"rates": rates, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
