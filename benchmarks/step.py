"""Step time and peak memory beside the plain Trainer: one GPT, every tier, in one run.

    python benchmarks/step.py                       # 26M parameters: 8 x 512, 2 x 32 tokens
    python benchmarks/step.py --layers 12 --hidden 768 --seq 128 --batch 4 --precision bf16-mixed

Each case is a process of its own, and the cases take turns (--rounds), so that a change of the machine's speed hits
all. DeepSpeed's cases are trained by an interpreter of its own (--deepspeed). Printed are medians over rounds, and
ratios to the plain Trainer of the same round. "floor" is max(compute, bytes over bandwidth): compute is the step of the
RAM tier, bytes are the counted NVMe bytes of a step, and the bandwidth is what fio has in the same round, reading and
writing at once; without fio there is no such column. Transfers take cores and memory from the computation, more so
where the machine and the drive are virtual: the case "beside fio" is the RAM tier while fio reads and writes as many
bytes a second as the NVMe case before it did, or as many as it gets to.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _deepspeed
import _fsdp2
import _torchao
from _fio import Disk
from _gpu_profile import StepOnGpu
from _process import device_peak, disk_bytes, gpt, peak_rss, run_case, tokens

_ALL_NVME = {"offload_params": "nvme", "offload_optimizer": "nvme"}
CASES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "zinf ram": {"offload_params": "none", "offload_optimizer": "none"},
    "zinf cpu offload": {"offload_params": "cpu", "offload_optimizer": "cpu"},
    "zinf state on nvme": {"offload_params": "none", "offload_optimizer": "nvme"},
    "zinf all on nvme": _ALL_NVME,
    "  update in forward": {**_ALL_NVME, "overlap": {"update": "forward"}},
    "  update at once": {**_ALL_NVME, "overlap": {"update": "step"}},
    "  no prefetch": {**_ALL_NVME, "overlap": {"update": "forward", "prefetch": False}},
    "zinf auto": {},
    "zinf ram beside fio": {"offload_params": "none", "offload_optimizer": "none"},
}
_OTHERS = (_deepspeed, _fsdp2, _torchao)
_BUDGET = re.compile(r"zinf auto (\d+) MiB")
BEFORE = ["plain", "zinf ram", "zinf state on nvme", "zinf all on nvme"]


def child(args: argparse.Namespace) -> None:
    """Train for some steps and print what was measured as JSON."""
    import lightning.pytorch as pl
    import torch
    import torch.nn.functional as F  # noqa: N812
    from lightning.pytorch.callbacks import Callback

    torch.set_num_threads(args.threads)
    budget = _BUDGET.fullmatch(args.child)
    case: dict[str, Any] | None = {} if budget else CASES[args.child]
    host_bytes = int(budget[1]) * 2**20 if budget else args.host_bytes

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model: torch.nn.Module | None = None

        def configure_model(self) -> None:
            if self.model is None:
                self.model = gpt(args)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            assert self.model is not None
            return F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    class Clock(Callback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.counts: list[dict[str, float]] = []
            self.watch: StepOnGpu | None = None
            self.gpu: dict[str, float] = {}

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if args.device == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            engine = getattr(trainer.strategy, "engine", None)
            self.counts.append(engine.counters.snapshot() if engine is not None else {})
            if args.beside:
                moved = zip(("nvme_read_bytes", "nvme_write_bytes"), disk_bytes(args.beside), strict=True)
                self.counts[-1].update(moved)
            if args.profile and len(self.times) > args.steps + args.warmup:  # the last one, which is not timed
                self.watch = StepOnGpu()

        def on_train_batch_end(self, *_: Any) -> None:
            if self.watch is not None:
                self.gpu, self.watch = self.watch.report(), None

    baseline = peak_rss(reset=True)
    loader = torch.utils.data.DataLoader(tokens(args), batch_size=args.batch)  # type: ignore[arg-type,var-annotated]
    strategy: Any = "auto"
    if case is not None:
        from lightning_zinf import MemoryConfig, OverlapConfig, ZinfStrategy

        memory = MemoryConfig(host_bytes=host_bytes or None)
        options = {**case, "overlap": OverlapConfig(**case.get("overlap", {}))}
        options.update(activation_checkpointing=args.recompute)
        strategy = ZinfStrategy(nvme_path=args.nvme_path, memory=memory, **options)
    clock = Clock()
    trainer = pl.Trainer(
        accelerator=args.device,
        devices=1,
        strategy=strategy,
        precision=args.precision,
        max_steps=args.steps + args.warmup + 1,
        logger=False,
        gradient_clip_val=args.clip or None,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    trainer.fit(Module(), loader)
    times = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)][args.warmup :]
    report = {"step": statistics.median(times), "peak": peak_rss() - baseline, "device_peak": device_peak(args)}
    report |= clock.gpu
    if case is not None:
        first, last = clock.counts[args.warmup], clock.counts[-1]
        for name in (
            "nvme_read_bytes",
            "nvme_write_bytes",
            "stall_read_seconds",
            "stall_write_seconds",
            "update_seconds",
        ):
            report[name] = (last[name] - first[name]) / len(times)
        report["refills"], report["faults"] = last["refills"], last["faults"]
    print(json.dumps(report))


def main() -> None:
    """Run the cases in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--seq", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--host-bytes", type=int, default=0, help="memory.host_bytes of the nvme cases; 0 = default")
    parser.add_argument("--nvme-path", default="")
    parser.add_argument(
        "--cases", nargs="+", default=BEFORE, choices=[*CASES, *(name for module in _OTHERS for name in module.CASES)]
    )
    parser.add_argument("--budgets", nargs="+", type=int, default=[], help="MiB: also zinf auto with these host_bytes")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--deepspeed", default="", help="an interpreter that has DeepSpeed, for its cases")
    parser.add_argument("--json", default="", help="write the results to this file")
    parser.add_argument("--recompute", action="store_true", help="zinf computes blocks again in backward")
    parser.add_argument("--quick-init", action="store_true", help="weights that cost little time to draw")
    parser.add_argument("--profile", action="store_true", help="on CUDA, one more step that tells what the GPU does")
    parser.add_argument("--beside", default="", help=argparse.SUPPRESS)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kinds = {name: module.child for module in _OTHERS for name in module.CASES}
        kinds.get(args.child, child)(args)
        return
    args.cases += [f"zinf auto {budget} MiB" for budget in args.budgets]
    if not args.deepspeed and set(args.cases) & set(_deepspeed.CASES):
        parser.error("DeepSpeed's cases need --deepspeed PYTHON: an interpreter that has it (pip install deepspeed)")
    results: dict[str, list[dict[str, float]]] = {name: [] for name in args.cases}
    rates: list[float] = []
    bytes_per_second = 0.0
    with tempfile.TemporaryDirectory(dir=args.nvme_path or ".") as folder:
        disk = Disk(Path(folder)) if shutil.which("fio") else None
        for turn in range(args.rounds):
            if disk is not None:
                rates.append(disk.measure())
            for name in args.cases:
                print(f"\r\033[Kround {turn + 1} of {args.rounds}: {name}", end="", file=sys.stderr, flush=True)
                python = args.deepspeed if name in _deepspeed.CASES else sys.executable
                command = [python, __file__, *sys.argv[1:], "--child", name, "--nvme-path", folder]
                if name == "zinf ram beside fio":
                    if disk is None or not bytes_per_second:
                        parser.error(f"{name!r} needs fio, and an NVMe case before it in --cases")
                    with disk.busy(bytes_per_second / 2) as process:
                        results[name].append(run_case(name, [*command, "--beside", str(process)]))
                    continue
                results[name].append(done := run_case(name, command))
                if moved := done.get("nvme_read_bytes", 0.0) + done.get("nvme_write_bytes", 0.0):
                    bytes_per_second = moved / done["step"]
    print("\r\033[K", end="", file=sys.stderr)
    show(args, results, rates)


def show(args: argparse.Namespace, results: dict[str, list[dict[str, float]]], rates: list[float]) -> None:
    """Print the table, and write it as JSON if asked."""

    def median(name: str, key: str) -> float:
        return statistics.median(r.get(key, 0.0) for r in results[name])

    base = results.get("plain")
    print(f"GPT {args.layers} x {args.hidden}, {args.batch} x {args.seq} tokens, {args.precision}, clip {args.clip}")
    if rates:
        print(
            f"fio reads and writes {statistics.median(rates) / 1e9:.2f} GB/s at once ({min(rates) / 1e9:.2f} at least)"
        )
    print(
        f"{'case':<20}{'step s':>9}{'x plain':>9}{'peak MiB':>10}{'x plain':>9}{'read MB':>9}{'write MB':>9}"
        f"{'stall s':>9}{'update s':>9}{'x floor':>9}" + f"{'on GPU':>9}" * (args.device != "cpu")
    )
    for name, runs in results.items():
        ratio = (
            statistics.median(r["step"] / b["step"] for r, b in zip(runs, base, strict=True)) if base else float("nan")
        )
        peak = (
            statistics.median(r["peak"] / b["peak"] for r, b in zip(runs, base, strict=True)) if base else float("nan")
        )
        moved = median(name, "nvme_read_bytes") + median(name, "nvme_write_bytes")
        floor = float("nan")
        if rates and moved and "zinf ram" in results and "fio" not in name:
            floor = statistics.median(
                r["step"] / max(ram["step"], moved / rate)
                for r, ram, rate in zip(runs, results["zinf ram"], rates, strict=True)
            )
        print(
            f"{name:<20}{median(name, 'step'):>9.3f}{ratio:>9.2f}{median(name, 'peak') / 2**20:>10.0f}{peak:>9.2f}"
            f"{median(name, 'nvme_read_bytes') / 1e6:>9.0f}{median(name, 'nvme_write_bytes') / 1e6:>9.0f}"
            f"{median(name, 'stall_read_seconds') + median(name, 'stall_write_seconds'):>9.3f}"
            f"{median(name, 'update_seconds'):>9.3f}{floor:>9.2f}"
            + f"{median(name, 'device_peak') / 2**20:>9.0f}"
            * (args.device != "cpu")
        )
    if args.json:
        Path(args.json).write_text(json.dumps({"args": vars(args), "disk": rates, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
