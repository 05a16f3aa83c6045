"""Activations: peak memory and step time with and without activation checkpointing and offloading, in one run.

    python benchmarks/activations.py                        # 24 x 256, 8 x 256 tokens: 19M parameters
    python benchmarks/activations.py --batch 4 --steps 2    # smaller and quicker

Weights and optimizer state stay in memory in every case: what differs is activations. Each case is a process of its
own, and the cases take turns (--rounds), so that a change of the machine's speed hits all. "peak" is the growth of the
process's peak resident size from before the model is built. Checked is that the losses of all cases have the same bits
and that what recomputed blocks bring to disk in a step is one input a block: layers x batch x seq x hidden x 4 bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "examples" / "gpt")]
from _process import peak_rss, run_case  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "checkpoint": {"activation_checkpointing": True},
    "checkpoint + nvme": {"activation_checkpointing": True, "offload_activations": "nvme"},
    "nvme": {"offload_activations": "nvme"},
}


def child(args: argparse.Namespace) -> None:
    """Train for some steps and print what was measured as JSON."""
    import lightning.pytorch as pl
    import torch
    import torch.nn.functional as F  # noqa: N812
    from lightning.pytorch.callbacks import Callback
    from model import GPT

    from lightning_zinf import MemoryConfig, ZinfStrategy

    torch.set_num_threads(args.threads)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = GPT(args.vocab, args.seq, args.hidden, args.layers, max(1, args.hidden // 64))
            self.losses: list[float] = []

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss = F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    class Clock(Callback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.counts: list[dict[str, float]] = []

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.times.append(time.perf_counter())
            self.counts.append(trainer.strategy.engine.counters.snapshot())

    steps = args.steps + args.warmup + 1
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(args.vocab, (steps * args.batch, args.seq + 1), generator=generator)
    loader = torch.utils.data.DataLoader(data, batch_size=args.batch)  # type: ignore[arg-type,var-annotated]
    strategy = ZinfStrategy(
        offload_params="none",
        offload_optimizer="none",
        nvme_path=args.nvme_path,
        memory=MemoryConfig(activation_bytes=args.staging),
        **CASES[args.child],
    )
    baseline, clock = peak_rss(reset=True), Clock()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, precision=args.precision, max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[clock],
    )  # fmt: skip
    module = Module()
    trainer.fit(module, loader)
    times = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)][args.warmup :]
    report: dict[str, Any] = {"step": statistics.median(times), "peak": peak_rss() - baseline, "losses": module.losses}
    first, last = clock.counts[args.warmup], clock.counts[-1]
    for name in ("activation_write_bytes", "activation_read_bytes", "activation_reused_bytes"):
        report[name] = (last[name] - first[name]) / len(times)
    for name in ("stall_read_seconds", "stall_write_seconds"):
        report[name] = (last[name] - first[name]) / len(times)
    report["overcommits"] = last["overcommits"]
    print(json.dumps(report))


def run(args: argparse.Namespace, case: str) -> dict[str, Any]:
    """Run a case in a process of its own."""
    with tempfile.TemporaryDirectory(dir=args.nvme_path or ".") as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", case, "--nvme-path", folder]
        return run_case(case, command)


def check(args: argparse.Namespace, reports: dict[str, list[dict[str, Any]]]) -> None:
    """Say so and stop if bits or bytes are not what they have to be."""
    inputs = args.layers * args.batch * args.seq * args.hidden * 4
    for case, found in reports.items():
        for report in found:
            if report["losses"] != reports["none"][0]["losses"]:
                sys.exit(f"{case}: losses {report['losses']} are not those of none, {reports['none'][0]['losses']}")
            if case == "checkpoint + nvme" and report["activation_write_bytes"] != inputs:
                sys.exit(f"{case}: {report['activation_write_bytes']:.0f} bytes a step were written, not {inputs}")
    print(
        f"losses: the same bits in all cases; checkpoint + nvme writes {inputs / 1e6:.1f} MB a step, "
        "which is what the formula says"
    )


def main() -> None:
    """Run the cases in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=256)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--staging", type=int, default=8 * 2**20, help="memory.activation_bytes")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nvme-path", default="", help="folder on a disk; default: a temporary one here")
    parser.add_argument("--json", default="", help="write the results to this file")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    reports: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(args.rounds):
        for case in CASES:
            reports[case].append(run(args, case))
    print(f"{'':<20}{'step s':>8}{'ratio':>7}{'peak MB':>9}{'ratio':>7}{'away MB':>9}{'read MB':>9}{'stalled s':>11}")
    for case, found in reports.items():
        step = statistics.median(r["step"] for r in found)
        slower = statistics.median(r["step"] / p["step"] for r, p in zip(found, reports["none"], strict=True))
        peak = statistics.median(r["peak"] for r in found)
        larger = statistics.median(r["peak"] / p["peak"] for r, p in zip(found, reports["none"], strict=True))
        away, read = found[0]["activation_write_bytes"], found[0]["activation_read_bytes"]
        stalled = statistics.median(r["stall_read_seconds"] + r["stall_write_seconds"] for r in found)
        print(
            f"{case:<20}{step:>8.2f}{slower:>7.2f}{peak / 1e6:>9.0f}{larger:>7.2f}{away / 1e6:>9.1f}{read / 1e6:>9.1f}"
            f"{stalled:>11.3f}"
        )
    check(args, reports)
    if args.json:
        Path(args.json).write_text(json.dumps({"args": vars(args), "reports": reports}, indent=1) + "\n")


if __name__ == "__main__":
    main()
