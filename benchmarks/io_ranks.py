"""Several ranks on one drive: what one process moves, against what several move together.

Note. Each process has files and an I/O engine of its own, as a rank has, and keeps some requests of a tile's size under
way. In every round one process runs alone, then all of them as they are, then all of them with the queue depth and the
threads divided among them, in an order that rotates; a ratio is the median over rounds of the sum over processes,
against the one process of the same round. All processes start and stop together: those that have nothing to do wait on
a pipe. The files are written once beforehand: reading space that was only allocated would not touch the drive.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lightning_zinf import IOConfig
from lightning_zinf.ops import File, IOEngine, Ticket, host_empty

CASES = {"read": ("read",), "write": ("write",), "both": ("read", "write")}


def stream(engine: IOEngine, operation: str, path: Path, buffers: list[torch.Tensor], stop: float) -> float:
    """Go over a file until ``stop`` on the monotonic clock; return the bytes moved."""
    start = engine.read if operation == "read" else engine.write
    moved, number, request, in_flight = 0.0, 0, buffers[0].nbytes, len(buffers)
    with File.open(path, writable=operation == "write") as file:
        places = file.size // request
        tickets: list[Ticket] = []
        while time.monotonic() < stop:
            if len(tickets) >= in_flight:
                moved += tickets.pop(0).wait()
            tickets.append(start(file, number % places * request, buffers[number % in_flight]))
            number += 1
        # What is under way at the end counts in proportion to the time it had left.
        ends = [(t.nbytes, t.elapsed) for t in tickets]
        for ticket, (nbytes, before) in zip(tickets, ends, strict=True):
            ticket.wait()
            moved += nbytes * min(1.0, before / ticket.elapsed)
    return moved


def serve(folder: str, number: int, args: argparse.Namespace, pipe: multiprocessing.connection.Connection) -> None:
    """Run what comes through the pipe: a case, the number of processes to divide by, and when to begin."""
    torch.set_num_threads(1)
    paths = {name: Path(folder) / f"{name}{number}" for name in ("read", "write")}
    data = torch.randint(-(2**62), 2**62, (args.request // 8,))
    for path in paths.values():
        with IOEngine(backend="threads") as engine, File(path, args.size, unlink=False) as file:
            for offset in range(0, args.size, args.request):
                engine.write(file, offset, data).wait()
            file.fsync()
    buffers = {name: [host_empty(args.request).fill_(1) for _ in range(args.in_flight)] for name in paths}
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        case, divide, begin = order
        threads, depth = max(1, args.threads // divide), max(1, args.depth // divide)
        with IOEngine(threads, depth, args.block_bytes, args.backend) as engine:
            while time.monotonic() < begin:
                time.sleep(0.001)
            names, stop = CASES[case], begin + args.seconds
            with ThreadPoolExecutor(len(names)) as pool:
                moved = list(pool.map(lambda n: stream(engine, n, paths[n], buffers[n], stop), names))  # noqa: B023
        pipe.send(sum(moved) / args.seconds)


def ask(pipes: list[Any], case: str, divide: int, args: argparse.Namespace) -> float:
    """Have some processes run a case at the same time; return the sum of their bytes per second."""
    for pipe in pipes:
        pipe.send((case, divide, time.monotonic() + 0.3))
    return float(sum(pipe.recv() for pipe in pipes))


def measure(pipes: list[Any], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    settings = {"1 process": (1, 1), f"{len(pipes)} processes": (len(pipes), 1)}
    settings[f"{len(pipes)} processes, depth divided"] = (len(pipes), len(pipes))
    result: dict[str, dict[str, float]] = {}
    for case in CASES:
        rates: dict[str, list[float]] = {name: [] for name in settings}
        for turn in range(args.rounds):
            names = list(settings)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                count, divide = settings[name]
                rates[name].append(ask(pipes[:count], case, divide, args))
                print(f"{case} {turn + 1}/{args.rounds} {name}: {rates[name][-1] / 1e9:.2f} GB/s", file=sys.stderr)
        row = {f"{name} GB/s": statistics.median(values) / 1e9 for name, values in rates.items()}
        for name in list(settings)[1:]:
            ratios = [a / b for a, b in zip(rates[name], rates["1 process"], strict=True)]
            row[f"{name} / 1"] = statistics.median(ratios)
            row[f"{name} / 1, least"] = min(ratios)
        result[case] = row
    return result


def parse() -> argparse.Namespace:
    defaults = IOConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="where to put the files (default: here)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--size", type=int, default=768, help="MiB of each file, two for each process (default: 768)")
    parser.add_argument("--seconds", type=float, default=2.0, help="per case and setting (default: 2)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--request", type=int, default=10, help="MiB of a request (default: 10, a tile of state)")
    parser.add_argument("--in-flight", type=int, default=4, help="requests of a process and direction under way")
    parser.add_argument("--block-bytes", type=int, default=defaults.block_bytes)
    parser.add_argument("--depth", type=int, default=defaults.queue_depth, help="blocks in flight with io_uring")
    parser.add_argument("--threads", type=int, default=defaults.threads, help="blocks in flight with threads")
    parser.add_argument("--backend", choices=("auto", "threads", "io_uring"), default=defaults.backend)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    args.request <<= 20
    args.size = max(args.size << 20, args.request) // args.request * args.request
    return args


def main() -> None:
    args = parse()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="zinf-io-") as folder:
        pipes, processes = [], []
        for number in range(args.processes):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=serve, args=(folder, number, args, theirs), daemon=True))
            processes[-1].start()
            pipes.append(ours)
        for pipe in pipes:
            assert pipe.recv() == "ready"
        result = measure(pipes, args)
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join()
        with IOEngine(args.threads, args.depth, args.block_bytes, args.backend) as engine:
            backend = engine.backend
    names = ("processes", "size", "seconds", "rounds", "request", "in_flight", "block_bytes", "depth", "threads")
    setting = {**{name: getattr(args, name) for name in names}, "backend": backend}
    if args.json:
        rounded = {case: {name: round(value, 4) for name, value in row.items()} for case, row in result.items()}
        print(json.dumps({**setting, "torch": torch.__version__, **rounded}))
        return
    print(", ".join(f"{name} {value}" for name, value in setting.items()))
    width = max(len(name) for name in next(iter(result.values()))) + 2
    print(" " * width + "".join(f"{case:>10}" for case in result))
    for name in next(iter(result.values())):
        print(f"{name:{width}}" + "".join(f"{row[name]:10.2f}" for row in result.values()))


if __name__ == "__main__":
    main()
