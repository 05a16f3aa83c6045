"""The disk's own speed, by fio (https://github.com/axboe/fio)."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch


def fill(path: Path, nbytes: int, data: torch.Tensor) -> None:
    """Write a file with copies of ``data``, past the page cache."""
    from lightning_zinf.ops.io import File, IOEngine  # not here, where DeepSpeed's interpreter imports this

    with IOEngine(backend="threads") as engine, File(path, nbytes, unlink=False) as file:
        for offset in range(0, nbytes, data.nbytes):
            engine.write(file, offset, data).wait()
        file.fsync()


def command_of(
    backend: str, operations: Sequence[str], paths: Mapping[str, Path], args: argparse.Namespace, *more: str
) -> list[str]:
    """Return the command that goes over files with fio, all operations at once."""
    jobs, depth = (args.threads, 1) if backend == "psync" else (1, args.depth)
    share = args.size // jobs // args.block_bytes * args.block_bytes
    command = [
        *("fio", "--output-format=json", f"--ioengine={backend}", f"--bs={args.block_bytes}", f"--iodepth={depth}"),
        *(f"--direct={int(args.direct)}", "--time_based", f"--runtime={args.seconds}", f"--numjobs={jobs}"),
        *(f"--size={share}", f"--offset_increment={share}", "--thread", "--group_reporting=1", "--invalidate=0"),
        *("--scramble_buffers=0", "--fallocate=none", "--allow_file_create=0"),  # no work but the transfers
        *more,
    ]
    for name in operations:
        command += [f"--name={name}", f"--rw={name}", f"--filename={paths[name]}", "--new_group"]
    return command


def environment(args: argparse.Namespace) -> dict[str, str]:
    """Return an environment in which fio has its buffers in huge pages, if ours are in such.

    Fewer and longer segments are up to twice the bandwidth on virtual drives.
    """
    return {**os.environ, "GLIBC_TUNABLES": f"glibc.malloc.hugetlb={int(args.huge_pages)}"}


def run_fio(backend: str, operations: Sequence[str], paths: Mapping[str, Path], args: argparse.Namespace) -> float:
    """Return the bytes per second of going over files with fio, all operations at once; exits if it fails."""
    command = command_of(backend, operations, paths, args)
    done = subprocess.run(command, capture_output=True, text=True, env=environment(args))
    if done.returncode != 0:
        raise SystemExit(f"fio failed: {done.stderr.strip() or done.stdout.strip()[-500:]}")
    groups = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    return float(sum(group[name]["bw_bytes"] for group in groups for name in operations))


class Disk:
    """What a disk reads and writes at once, in bytes per second, each time anew.

    Args:
        folder: A folder on it, for two files.
    """

    def __init__(self, folder: Path) -> None:
        self._args = argparse.Namespace(
            block_bytes=2**20, depth=64, direct=True, seconds=2, size=2**29, huge_pages=True
        )
        self._paths = {name: folder / f"disk-{name}" for name in ("read", "write")}
        data = torch.randint(-(2**62), 2**62, (2**23,))
        for path in self._paths.values():
            fill(path, self._args.size, data)

    def measure(self) -> float:
        """Return the sum of both directions."""
        return run_fio("io_uring", ("read", "write"), self._paths, self._args)

    @contextmanager
    def busy(self, rate: float) -> Iterator[int]:
        """Read and write meanwhile, at most ``rate`` bytes per second in each direction; yields fio's process."""
        options = argparse.Namespace(**{**vars(self._args), "seconds": 3600})
        command = command_of("io_uring", ("read", "write"), self._paths, options, f"--rate={int(rate)}")
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment(options)) as process:
            try:
                yield process.pid
            finally:
                process.terminate()
