"""``zinf bench``: measure this machine's links, and keep the figures for ``zinf plan``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from lightning_zinf.config import nvme_paths

_UNITS = {"flops_bf16": ("TFlop/s", 1e12), "flops_fp32": ("TFlop/s", 1e12)}
_TEXTS = {
    "adam": "optimizer kernel",
    "host_copy": "copy in host memory",
    "flops_bf16": "transformer block, bfloat16",
    "flops_fp32": "transformer block, float32",
    "host_to_device": "host to accelerator",
    "device_to_host": "accelerator to host",
    "gather": "all-gather of two processes",
    "nvme_read": "disk, reading",
    "nvme_write": "disk, writing",
    "nvme_mixed": "disk, both at once",
}
_EXAMPLE = "  $ zinf bench --nvme-path /mnt/nvme\n  optimizer kernel               54.7 GB/s\n  ..."


def add_bench(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "bench",
        help="measure this machine's links, for zinf plan",
        description="Measure this machine's links in less than a minute, and keep the figures for zinf plan.",
        epilog=f"example:\n{_EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = command.add_argument
    text = "folder on the disk to measure, by default $ZINF_NVME_PATH, else ./zinf_nvme; once for each of several disks"
    option("--nvme-path", action="append", help=text)
    option("--seconds", type=float, default=1.5, help="time for each figure (1.5)")
    option("--no-save", action="store_true", help="do not keep the figures")
    option("--json", action="store_true", help="print JSON on stdout")


def bench(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the command."""
    from lightning_zinf.planning.cache import joined, save
    from lightning_zinf.planning.measure import measure_machine

    if not given.seconds > 0:
        raise ValueError(f"--seconds must be positive, got {given.seconds}")
    folders = nvme_paths(given.nvme_path, "")
    new = [folder for folder in folders if not os.path.isdir(folder)]
    start = time.perf_counter()
    try:
        rates = measure_machine(folders, seconds=given.seconds, say=_say)
    finally:
        for folder in new:
            if os.path.isdir(folder) and not os.listdir(folder):
                os.rmdir(folder)
    seconds = time.perf_counter() - start
    lines = [f"{_TEXTS[name]:<30} {_shown(name, rate)}" for name, rate in rates.items()]
    told: dict[str, Any] = {"rates": rates, "seconds": seconds, "folder": joined(folders), "file": None}
    if not given.no_save:
        told["file"] = str(save(rates, folders))
        lines.append(f"kept in {told['file']}")
    return told, "\n".join([*lines, f"took {seconds:.0f} s"])


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"measuring: {text}", file=sys.stderr)


def _shown(name: str, rate: float) -> str:
    unit, size = _UNITS.get(name, ("GB/s", 1e9))
    return f"{rate / size:8.2f} {unit}"
