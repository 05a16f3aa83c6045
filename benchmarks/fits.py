"""It fits: train a model whose states are several times larger than the memory that the process may use.

    python benchmarks/fits.py                 # 402M parameters, 6 GiB of states, under a cap of 1.5 GiB
    python benchmarks/fits.py --layers 8      # smaller and quicker

"States" are the paper's 16 bytes a parameter: bfloat16 weights and gradients, float32 master, two moments. A child
process trains with its data segment capped by RLIMIT_DATA (private writable memory: heap, anonymous maps, thread
stacks), counted from what the process has after its imports, once with everything on NVMe and once with the plain
Trainer.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def data_bytes() -> int:
    """Return the size of this process's data segment, what RLIMIT_DATA is held against."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmData in /proc/self/status")


def child(args: argparse.Namespace) -> None:
    """Train a few steps under the cap and print what was measured as JSON."""
    import lightning.pytorch as pl
    import torch
    import torch.nn.functional as F  # noqa: N812

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "gpt"))
    from model import GPT

    from lightning_zinf import ZinfStrategy

    torch.set_num_threads(args.threads)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model: GPT | None = None
            self.losses: list[float] = []

        def configure_model(self) -> None:
            if self.model is None:
                torch.manual_seed(0)
                self.model = GPT(args.vocab, args.seq, args.hidden, args.layers, args.hidden // 64)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            assert self.model is not None
            loss = F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            self.losses.append(loss.item())
            print(f"step {index}: loss {loss.item():.4f}", file=sys.stderr, flush=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    strategy: Any = "auto"
    if args.child == "zinf":
        strategy = ZinfStrategy(offload_params="nvme", offload_optimizer="nvme", nvme_path=args.nvme_path)
    data = torch.randint(args.vocab, (args.steps, args.seq + 1), generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(data, batch_size=1)  # type: ignore[arg-type,var-annotated]
    module = Module()
    start, base = time.perf_counter(), data_bytes()
    limit = base + args.cap
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, precision="bf16-mixed", max_steps=args.steps, logger=False,
        gradient_clip_val=args.clip or None, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    count = sum(p.numel() for p in module.parameters())
    print(json.dumps({"parameters": count, "losses": module.losses, "seconds": time.perf_counter() - start}))


def main() -> None:
    """Run both cases and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=256)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--ratio", type=float, default=4.0, help="states over cap")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nvme-path", default="", help="folder on a disk; default: a temporary one here")
    parser.add_argument("--json", default="", help="write the results to this file")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--cap", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    count = 12 * args.layers * args.hidden**2 + args.vocab * args.hidden
    states = 16 * count
    cap = int(states / args.ratio)
    print(f"about {count / 1e6:.0f}M parameters, {states / 2**30:.2f} GiB of states, cap {cap / 2**30:.2f} GiB")
    report: dict[str, Any] = {"args": vars(args), "cap": cap}
    for case in ("zinf", "plain"):
        with tempfile.TemporaryDirectory(dir=args.nvme_path or ".") as folder:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", case, "--cap", str(cap)]
            run = subprocess.run([*command, "--nvme-path", folder], capture_output=True, text=True)
        if run.returncode == 0:
            result = json.loads(run.stdout.strip().splitlines()[-1])
            report[case] = result
            ratio = 16 * result["parameters"] / cap
            print(f"{case}: trained {args.steps} steps, states are {ratio:.2f} x the cap, losses {result['losses']}")
        else:
            lines = [x for x in run.stderr.strip().splitlines() if "rror" in x] or run.stderr.strip().splitlines()
            report[case] = {"returncode": run.returncode, "error": lines[-1] if lines else ""}
            print(f"{case}: failed with exit status {run.returncode}: {report[case]['error'][:200]}")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
