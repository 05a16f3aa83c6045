"""Several ranks on one machine: step time, host time and memory beside DDP and FSDP2 (CPU, gloo, a thread each).

    python benchmarks/ranks.py step                 # 15M parameters: 8 x 384, 2 x 64 tokens a rank
    python benchmarks/ranks.py host --profile 10    # 64 blocks of Linear(32, 32): what happens around the arithmetic
    python benchmarks/ranks.py memory               # what a rank keeps and moves, with 1, 2 and 4 ranks
    python benchmarks/ranks.py                      # all three, for `make bench`

The processes of every case stay for the whole run and take turns (--rounds), so that a change of the machine's speed
hits all. Printed are medians over rounds of a round's median step on rank 0, and ratios to a case of the same round.
The engine is driven without Lightning, so that what is measured is the engine. torch's cases use the fused AdamW.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _ranks_cases import Case, Crew, CrewError, Shape

DDP = Case("DDP", "ddp")
FSDP2 = Case("FSDP2", "fsdp2")
STAGES = [Case(f"zinf stage {stage}", "zinf", stage) for stage in (1, 2, 3)]
ALONE = [
    Case("torch, 1 rank", "plain", world=0),
    Case("zinf, 1 rank", "zinf", world=0),
    Case("zinf all on nvme, 1 rank", "zinf", offload="nvme", world=0),
]
Rounds = dict[str, list[dict[str, Any]]]


def header() -> None:
    """Print what the numbers were taken with."""
    here = Path(__file__).resolve().parent
    git = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True)
    commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() or "unknown"
    changed = " with changes" if git(["git", "status", "--porcelain", "-uno"]).stdout.strip() else ""
    info = Path("/proc/cpuinfo").read_text()
    name = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    isa = "AVX-512" if "avx512f" in info else "AVX2" if "avx2" in info else "no AVX2"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    print(f"$ python benchmarks/ranks.py {' '.join(sys.argv[1:])}")
    print(
        f"commit {commit}{changed}; {name} ({cores} cores, {isa}), {memory:.0f} GiB; "
        f"Python {platform.python_version()}, torch {torch.__version__}\n"
    )


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def crews(cases: list[Case], shape: Shape, folder: str) -> Iterator[dict[str, Crew]]:
    """Start the processes of every case and have them build the model; a case of torch's that cannot is left out."""
    running: dict[str, Crew] = {}
    try:
        for number, case in enumerate(cases):
            progress(f"starting {case.name}")
            place = Path(folder, str(number))
            place.mkdir(exist_ok=True)
            crew = Crew(case, str(place))
            running[case.name] = crew
            try:
                crew.call("build", shape)
                crew.call("steps", 1)  # FSDP2 finds out here what the backend cannot do
            except CrewError as error:
                del running[case.name]
                if case.kind != "fsdp2":
                    raise
                progress("")
                print(f"FSDP2 does not run here: {str(error).strip().splitlines()[-1]}\n")
        yield running
    finally:
        progress("")
        for crew in running.values():
            crew.close()


def take_turns(running: dict[str, Crew], args: argparse.Namespace) -> Rounds:
    """Run ``args.steps`` steps of each case in turn, ``args.rounds`` times; return what rank 0 says of each."""
    results: Rounds = {name: [] for name in running}
    for crew in running.values():
        crew.call("steps", args.warmup)
    for turn in range(args.rounds):
        for name, crew in running.items():
            progress(f"round {turn + 1} of {args.rounds}: {name}")
            results[name].append(crew.call("steps", args.steps)[0])
    progress("")
    for rounds in results.values():
        for result in rounds:
            result["step"] = statistics.median(result["times"])
    return results


def median(rounds: list[dict[str, Any]]) -> float:
    return statistics.median(r["step"] for r in rounds)


def ratio(rounds: list[dict[str, Any]], base: list[dict[str, Any]]) -> float:
    return statistics.median(r["step"] / b["step"] for r, b in zip(rounds, base, strict=True))


def difference(rounds: list[dict[str, Any]], base: list[dict[str, Any]]) -> float:
    """Return the greatest difference between the losses of the same step; NaN if there is one."""
    pairs = [p for r, b in zip(rounds, base, strict=True) for p in zip(r["losses"], b["losses"], strict=True)]
    return float((torch.tensor([a for a, _ in pairs]) - torch.tensor([b for _, b in pairs])).abs().max())


# ---------------------------------------------------------------------- step


def step(args: argparse.Namespace) -> Rounds:
    """Compare the step times of a GPT."""
    shape = Shape("gpt", args.layers, args.hidden, args.batch, args.seq, args.vocab)
    cases = [DDP, *STAGES, FSDP2]
    with tempfile.TemporaryDirectory(dir=args.nvme_path) as folder, crews(cases, shape, folder) as running:
        results = take_turns(running, args)
    print(
        f"GPT {args.layers} x {args.hidden}, {args.batch} x {args.seq} tokens a rank, 2 ranks, 32-true; "
        f"{args.rounds} rounds of {args.steps} steps"
    )
    print(f"{'case':<16}{'step s':>9}{'x DDP':>8}{'from':>8}{'to':>7}{'last loss':>12}{'off DDP':>10}")
    base, worst = results["DDP"], 0.0
    for name, rounds in results.items():
        ratios = [r["step"] / b["step"] for r, b in zip(rounds, base, strict=True)]
        off = difference(rounds, base)
        worst = off if not off <= worst else worst
        print(
            f"{name:<16}{median(rounds):>9.4f}{ratio(rounds, base):>8.2f}{min(ratios):>8.2f}{max(ratios):>7.2f}"
            f"{rounds[-1]['losses'][-1]:>12.6f}{off:>10.1e}"
        )
    first = base[0]["losses"][0]
    print(f"\nlosses of rank 0 fell from {first:.4f} and differ by {worst:.1e} at most (allowed: {args.tolerance:g})")
    if not worst <= args.tolerance:
        sys.exit("the cases do not do the same work")
    return results


# ---------------------------------------------------------------------- host


def host(args: argparse.Namespace) -> Rounds:
    """Compare what happens on the host around blocks that cost next to nothing."""
    shape = Shape("tiny", args.layers, args.hidden, args.batch)
    cases = [DDP, STAGES[2], FSDP2, *ALONE]
    profiles = {}
    with tempfile.TemporaryDirectory(dir=args.nvme_path) as folder, crews(cases, shape, folder) as running:
        results = take_turns(running, args)
        for name in (STAGES[2].name, FSDP2.name):
            if args.profile and name in running:
                profiles[name] = running[name].call("profile", args.steps, args.profile)[0]
    print(
        f"{args.layers} x Linear({args.hidden}, {args.hidden}), batch {args.batch}; "
        f"{args.rounds} rounds of {args.steps} steps"
    )
    print("base: DDP, or torch with 1 rank; over: (step - step of base) / blocks; rounds, faults: of zinf, a step")
    print(f"{'case':<26}{'step ms':>9}{'x base':>8}{'over us':>9}{'rounds':>9}{'faults':>9}{'off base':>10}")
    overs: dict[str, list[float]] = {}
    for case in cases:
        if case.name not in results:
            continue
        rounds, base = results[case.name], results[DDP.name if case.world else ALONE[0].name]
        over = [1e6 * (r["step"] - b["step"]) / args.layers for r, b in zip(rounds, base, strict=True)]
        overs[case.name] = over
        moved = rounds[-1]["moved"]
        print(
            f"{case.name:<26}{1e3 * median(rounds):>9.2f}{ratio(rounds, base):>8.2f}{statistics.median(over):>9.1f}"
            f"{moved.get('rounds', 0):>9.1f}{moved.get('faults', 0):>9.1f}{difference(rounds, base):>10.1e}"
        )
    if FSDP2.name in results:
        ours, theirs = results[STAGES[2].name], results[FSDP2.name]
        pairs = zip(overs[STAGES[2].name], overs[FSDP2.name], strict=True)
        over_ratio = statistics.median(a / b for a, b in pairs)
        print(f"\nzinf stage 3 / FSDP2: over {over_ratio:.2f}, step {ratio(ours, theirs):.2f}")
    for name, text in profiles.items():
        print(f"\n{name}, rank 0, under cProfile (which makes Python look slower than it is):\n{text}")
    return results


# ---------------------------------------------------------------------- memory


def formula(case: Case, size: int) -> tuple[float, float]:
    """Return what a rank keeps and moves in a step, by ZeRO's formulas, for ``size`` bytes of weights in float32."""
    parts = case.world
    stage = {"ddp": 0, "fsdp2": 3}.get(case.kind, case.stage)
    weights, gradients, state = (1 / parts if stage >= s else 1.0 for s in (3, 2, 1))
    kept = size * (weights + gradients + 2 * state)
    return kept, (3 if stage == 3 else 2) * size * (parts - 1) / parts


def memory(args: argparse.Namespace) -> Rounds:
    """Show what the fullest rank keeps, its peak, and what it moves."""
    shape = Shape("gpt", args.layers, args.hidden, args.batch, args.seq, args.vocab)
    results: Rounds = {}
    size = 0
    for world in args.worlds:
        for kind in [DDP, *STAGES, FSDP2]:
            case = Case(kind.name, kind.kind, kind.stage, world=world)
            with tempfile.TemporaryDirectory(dir=args.nvme_path) as folder, crews([case], shape, folder) as running:
                for name, crew in running.items():
                    crew.call("steps", args.warmup)
                    results[f"{world} {name}"] = crew.call("memory", args.steps)
            if kind is DDP:
                size = results[f"{world} {kind.name}"][0]["weights"]
            if f"{world} {kind.name}" in results:
                show_memory(case, results[f"{world} {kind.name}"], size, first=not results or len(results) == 1)
    print(
        "\nslots: the budget for gathered weights, which comes on top of what is kept. building, training: peaks of\n"
        "resident memory, above the process's size before the model. sent: (N - 1) / N of the bytes of the buffers\n"
        "that zinf gathered and reduced in a step, which is what goes over the wire; torch counts none"
    )
    return results


def show_memory(case: Case, ranks: list[dict[str, Any]], size: int, *, first: bool) -> None:
    if first:
        print(f"P = {size / 2**20:.1f} MiB of weights, 32-true; all in MiB")
        print(
            f"{'N':<3}{'case':<14}{'weights':>8}{'grads':>8}{'state':>8}{'kept':>8}{'formula':>9}{'slots':>8}"
            f"{'building':>10}{'training':>10}{'gathered':>10}{'reused':>8}{'reduced':>9}{'sent':>8}{'formula':>9}"
        )

    def most(key: str) -> float:
        return max(r[key] for r in ranks) / 2**20

    kept, sent = (f"{x / 2**20:.1f}" for x in formula(case, size))
    total = max(r["weights"] + r["gradients"] + r["state"] for r in ranks) / 2**20
    row = f"{case.world:<3}{case.name:<14}{most('weights'):>8.1f}{most('gradients'):>8.1f}{most('state'):>8.1f}"
    row += f"{total:>8.1f}{kept:>9}{most('slots'):>8.1f}{most('building'):>10.1f}{most('training'):>10.1f}"
    moved = ranks[0]["moved"]
    if moved:
        names = ("all_gather_bytes", "reused_bytes", "reduce_scatter_bytes")
        gathered, reused, reduced = (moved[name] / 2**20 for name in names)
        fraction = (case.world - 1) / case.world
        row += f"{gathered:>10.1f}{reused:>8.1f}{reduced:>9.1f}{(gathered + reduced) * fraction:>8.1f}"
    else:
        row += f"{'-':>10}{'-':>8}{'-':>9}{'-':>8}"
    print(f"{row}{sent:>9}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    for name, (steps, warmup, rounds) in {"step": (8, 3, 5), "host": (20, 10, 5), "memory": (3, 2, 1)}.items():
        sub = commands.add_parser(name)
        tiny = name == "host"
        sub.add_argument("--layers", type=int, default=64 if tiny else 8)
        sub.add_argument("--hidden", type=int, default=32 if tiny else 384)
        sub.add_argument("--batch", type=int, default=2, help="of a rank")
        sub.add_argument("--steps", type=int, default=steps, help="of a turn")
        sub.add_argument("--warmup", type=int, default=warmup, help="steps before the first turn")
        sub.add_argument("--nvme-path", default=".", help="folder for a temporary folder of NVMe files")
        sub.add_argument("--json", default="", help="write the results to this file")
        if not tiny:
            sub.add_argument("--seq", type=int, default=64)
            sub.add_argument("--vocab", type=int, default=1024)
        if name != "memory":
            sub.add_argument("--rounds", type=int, default=rounds)
    commands.choices["step"].add_argument("--tolerance", type=float, default=1e-4, help="allowed difference of losses")
    commands.choices["host"].add_argument("--profile", type=int, default=0, help="print so many functions of rank 0")
    commands.choices["memory"].add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    header()
    for name, run in {"step": step, "host": host, "memory": memory}.items():
        if args.command in (None, name):
            chosen = args if args.command else parser.parse_args([name])
            results = run(chosen)
            if chosen.json:
                Path(chosen.json).write_text(json.dumps({"args": vars(chosen), "results": results}, indent=1) + "\n")
            print()


if __name__ == "__main__":
    main()
