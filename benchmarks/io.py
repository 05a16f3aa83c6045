"""The I/O engine against fio: same files, block size, depth and O_DIRECT; sequential read, write, and both at once.

Note. Every contender runs once in every round, in an order that rotates, so that a slow moment of a shared machine, or
a drive that allows bursts after a rest, favours nobody. A ratio is the median over rounds of our bandwidth over that of
the better fio engine in the same round. The files are written once beforehand: reading space that was only allocated
would not touch the drive. Bandwidth of "both" is the sum of the two directions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _fio import fill, run_fio

from lightning_zinf.ops.io import File, IOEngine, Ticket
from lightning_zinf.ops.memory import host_empty

REQUEST = 64 << 20  # bytes: about a unit's plane
IN_FLIGHT = 3  # requests ahead, as a prefetching engine has
Runner = Callable[[str, tuple[str, ...], dict[str, Path], argparse.Namespace], float]
CASES = {"read": ("read",), "write": ("write",), "both": ("read", "write")}


def stream(engine: IOEngine, operation: str, path: Path, args: argparse.Namespace, rates: list[float]) -> None:
    """Append the bytes per second of going over a file, again and again."""
    buffers = [host_empty(REQUEST, huge_pages=args.huge_pages) for _ in range(IN_FLIGHT)]
    for buffer in buffers:
        buffer.fill_(1)
    start = engine.read if operation == "read" else engine.write
    with File.open(path, writable=operation == "write", direct=args.direct) as file:
        places = file.size // REQUEST
        tickets: list[Ticket] = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < args.seconds:
            if len(tickets) >= IN_FLIGHT:
                tickets[-IN_FLIGHT].wait()
            index = len(tickets)
            tickets.append(start(file, index % places * REQUEST, buffers[index % IN_FLIGHT]))
        done = sum(ticket.wait() for ticket in tickets)
        rates.append(done / (time.perf_counter() - begin))


def run_ours(backend: str, operations: tuple[str, ...], paths: dict[str, Path], args: argparse.Namespace) -> float:
    rates: list[float] = []
    with IOEngine(args.threads, args.depth, args.block_bytes, backend) as engine:  # type: ignore[arg-type]
        workers = [
            threading.Thread(target=stream, args=(engine, name, paths[name], args, rates)) for name in operations
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if len(rates) != len(operations):
        raise SystemExit(f"benchmarks/io.py: {backend} {operations} failed, see above")
    return sum(rates)


def contenders(args: argparse.Namespace) -> dict[str, tuple[str, Runner]]:
    found: dict[str, tuple[str, Runner]] = {
        "fio psync": ("psync", run_fio),
        "fio io_uring": ("io_uring", run_fio),
        "zinf threads": ("threads", run_ours),
    }
    try:
        IOEngine(backend="io_uring").close()
        found["zinf io_uring"] = ("io_uring", run_ours)
    except ValueError as error:
        print(f"zinf io_uring left out: {error}", file=sys.stderr)
        del found["fio io_uring"]
    return found


def measure(paths: dict[str, Path], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    runners = contenders(args)
    result: dict[str, dict[str, float]] = {}
    for case, operations in CASES.items():
        rates: dict[str, list[float]] = {name: [] for name in runners}
        for turn in range(args.rounds):
            names = list(runners)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                backend, runner = runners[name]
                rates[name].append(runner(backend, operations, paths, args))
                print(f"{case} {turn + 1}/{args.rounds} {name}: {rates[name][-1] / 1e9:.2f} GB/s", file=sys.stderr)
        best = [max(of_round) for of_round in zip(*(rates[n] for n in runners if n.startswith("fio")), strict=True)]
        row = {f"{name} GB/s": statistics.median(values) / 1e9 for name, values in rates.items()}
        for name in runners:
            if name.startswith("zinf"):
                row[f"{name} / fio"] = statistics.median(a / b for a, b in zip(rates[name], best, strict=True))
        result[case] = row
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="where to put the two files (default: here)")
    parser.add_argument("--size", type=int, default=1024, help="MiB of each file (default: 1024)")
    parser.add_argument("--seconds", type=int, default=5, help="per case and contender (default: 5)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block-bytes", type=int, default=1 << 20)
    parser.add_argument("--depth", type=int, default=64, help="blocks in flight with io_uring")
    parser.add_argument("--threads", type=int, default=8, help="blocks in flight with threads or psync")
    parser.add_argument(
        "--huge-pages", action=argparse.BooleanOptionalAction, default=True, help="buffers in huge pages, on both sides"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    args.size = max(args.size << 20, REQUEST) // REQUEST * REQUEST
    return args


def main() -> None:
    args = parse()
    if shutil.which("fio") is None:
        raise SystemExit("benchmarks/io.py needs fio (https://github.com/axboe/fio), for instance: apt install fio")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="zinf-io-") as folder:
        paths = {name: Path(folder) / name for name in ("read", "write")}
        data = torch.randint(-(2**62), 2**62, (REQUEST // 8,))
        for path in paths.values():
            fill(path, args.size, data)
        with File.open(paths["read"]) as file:
            args.direct = file.direct
        if not args.direct:
            print(f"no direct I/O in {args.folder}: both sides go through the page cache", file=sys.stderr)
        result = measure(paths, args)
    names = ("size", "seconds", "rounds", "block_bytes", "depth", "threads", "direct", "huge_pages")
    setting = {name: getattr(args, name) for name in names}
    if args.json:
        rounded = {case: {name: round(value, 4) for name, value in row.items()} for case, row in result.items()}
        print(json.dumps({**setting, "torch": torch.__version__, **rounded}))
        return
    print(", ".join(f"{name} {value}" for name, value in setting.items()))
    print(f"{'':24}" + "".join(f"{case:>10}" for case in result))
    for name in next(iter(result.values())):
        print(f"{name:24}" + "".join(f"{row[name]:10.2f}" for row in result.values()))


if __name__ == "__main__":
    main()
