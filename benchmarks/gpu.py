"""What needs a GPU and is measured in steps: tokens a second, the GPU's idle share and bytes over each link, beside
others; and the largest model that trains on the machine.

    python benchmarks/gpu.py steps --seconds 240
    python benchmarks/gpu.py largest --seconds 300

Every case is a process of its own (those of step.py) with a limit, and its line is printed as soon as it is there: what
is stopped loses one case. Cases come in the order of what is to be known first, and those for which no time is left are
named. Steps are the median of a few; the idle share (no kernel running) and what is copied to and from the host are
those of one more step, under torch.profiler; bytes from and to disks are those that the process moved, for zinf those
that it counts. "host" is the peak of resident memory above what the imports take.

Weights are cheap to draw (one pattern repeated), since steps take as long with any. Model sizes are those of a GPT with
a vocabulary of 32,768 and 1,024 tokens of context.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VOCABULARY, CONTEXT = 32768, 1024


@dataclass(frozen=True)
class Size:
    """A GPT.

    Attributes:
        layers: Blocks.
        hidden: Width.
        batch: Samples of a step.
        recompute: Whether zinf computes blocks again in backward.
    """

    layers: int
    hidden: int
    batch: int
    recompute: bool = False

    @property
    def parameters(self) -> int:
        """About how many."""
        return 12 * self.layers * self.hidden**2 + VOCABULARY * self.hidden

    def __str__(self) -> str:
        return f"{self.parameters / 1e9:.1f}B"


SMALL, MEDIUM, LARGE = Size(24, 1024, 8), Size(24, 2048, 8), Size(32, 2560, 8)
HUGE = Size(32, 4096, 4, recompute=True)
STEPS: list[tuple[Size, str]] = [
    (MEDIUM, "plain"),
    (MEDIUM, "zinf cpu offload"),
    (MEDIUM, "fsdp2 cpu offload"),
    (MEDIUM, "zinf ram"),
    (MEDIUM, "zinf all on nvme"),
    (MEDIUM, "torchao cpu offload"),
    (MEDIUM, "deepspeed cpu offload"),
    (MEDIUM, "deepspeed nvme tuned"),
    (SMALL, "plain"),
    (SMALL, "zinf ram"),
    (HUGE, "zinf auto"),
    (LARGE, "zinf cpu offload"),
    (LARGE, "fsdp2 cpu offload"),
    (LARGE, "torchao cpu offload"),
    (SMALL, "zinf cpu offload"),
    (SMALL, "zinf all on nvme"),
]
LADDER = [HUGE, Size(48, 4096, 2, recompute=True), Size(40, 5120, 2, recompute=True), Size(64, 5120, 1, recompute=True)]
LEAST_SECONDS = {"steps": 25, "largest": 60}
"""With less left no case is begun."""
HOST_SHARE = 0.85
"""Of the free host memory, what zinf may take in the search for the largest model."""


def available(case: str) -> bool:
    """Whether what a case needs is installed."""
    other = case.split()[0]
    return other not in ("torchao", "deepspeed") or importlib.util.find_spec(other) is not None


def run(size: Size, case: str, options: Sequence[str], seconds: float, folder: str) -> dict[str, float] | str:
    """Run a case for at most so many seconds; return what it measured, or what went wrong."""
    command = [sys.executable, str(Path(__file__).with_name("step.py")), "--child", case, "--nvme-path", folder]
    command += ["--device", "cuda", "--precision", "bf16-mixed", "--vocab", str(VOCABULARY), "--seq", str(CONTEXT)]
    command += ["--layers", str(size.layers), "--hidden", str(size.hidden), "--batch", str(size.batch)]
    command += ["--quick-init", "--profile", *["--recompute"] * size.recompute, *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    if done.returncode:
        lines = [text for text in done.stderr.splitlines() if text.strip()] or ["(nothing on stderr)"]
        raised = [text for text in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", text)]
        return f"exit status {done.returncode}: {(raised or lines)[-1][:400]}"
    warned = [text for text in done.stderr.splitlines() if text.startswith(("the profiler failed", "zinf:"))]
    warned += [text for text in done.stderr.splitlines() if "UserWarning" in text and "accelerator" in text]
    for text in warned:
        print(f"{'':>7}{text[:200]}", flush=True)
    report: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


def line(size: Size, case: str, found: dict[str, float] | str, plain: dict[Size, float]) -> str:
    """Return a line of the table."""
    if isinstance(found, str):
        return f"{size!s:>6} {case:<22} failed: {found}"
    step = found["step"]
    if case == "plain":
        plain[size] = step
    moved = [found.get(name, 0.0) / 1e6 for name in ("h2d_bytes", "d2h_bytes", "nvme_read_bytes", "nvme_write_bytes")]
    ratio = f"{step / plain[size]:.2f}" if size in plain else ""
    return (
        f"{size!s:>6} {case:<22}{step:>8.3f}{size.batch * CONTEXT / step:>10.0f}{ratio:>8}"
        f"{100 * found.get('gpu_idle', float('nan')):>7.0f}"
        + "".join(f"{m:>8.0f}" for m in moved)
        + f"{found.get('update_seconds', 0.0):>9.3f}{found['device_peak'] / 2**30:>9.1f}{found['peak'] / 2**30:>8.1f}"
    )


HEADER = (
    f"{'':>6} {'case':<22}{'step s':>8}{'tokens/s':>10}{'x plain':>8}{'idle %':>7}{'h2d MB':>8}{'d2h MB':>8}"
    f"{'read MB':>8}{'write':>8}{'update s':>9}{'GPU GiB':>9}{'host':>8}"
)


def steps(seconds: float, folder: str) -> None:
    """Time steps of models that others train too."""
    end, plain = time.monotonic() + seconds, dict[Size, float]()
    print(HEADER, flush=True)
    for size, case in STEPS:
        left = end - time.monotonic()
        if not available(case):
            print(f"{size!s:>6} {case:<22} is not installed", flush=True)
        elif left < LEAST_SECONDS["steps"]:
            print(f"{size!s:>6} {case:<22} no time left", flush=True)
        else:
            found = run(size, case, ["--steps", "4", "--warmup", "2"], min(left, 150), folder)
            print(line(size, case, found, plain), flush=True)


def largest(seconds: float, folder: str) -> None:
    """Train larger and larger models for a few steps, until one does not fit or time is over."""
    end, most = time.monotonic() + seconds, None
    fields = dict(text.split(":") for text in Path("/proc/meminfo").read_text().splitlines())
    host = int(HOST_SHARE * 1024 * int(fields["MemAvailable"].split()[0]))
    print(HEADER, flush=True)
    for size in LADDER:
        left = end - time.monotonic()
        if left < LEAST_SECONDS["largest"]:
            print(f"{size!s:>6} no time left", flush=True)
            break
        options = ["--steps", "1", "--warmup", "1", "--clip", "0", "--host-bytes", str(host)]
        found = run(size, "zinf auto", options, left, folder)
        print(line(size, "zinf auto", found, {}), flush=True)
        if isinstance(found, str):
            break
        most = size
    print(f"largest model that was trained: {most or 'none'}", flush=True)


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["steps", "largest"])
    parser.add_argument("--seconds", type=float, default=240.0, help="end after so long")
    parser.add_argument("--nvme-path", default=".", help="a folder on the disk to offload to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.nvme_path) as folder:
        (steps if args.part == "steps" else largest)(args.seconds, folder)


if __name__ == "__main__":
    main()
