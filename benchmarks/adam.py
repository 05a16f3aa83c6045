"""The fused Adam against torch's fused AdamW and against copying as many bytes, in one process, interleaved.

Note. Every contender runs once in every round, so that a slow moment of a shared machine hits all of them, and ratios
are medians of the ratios within a round. Copy bandwidth counts bytes read plus bytes written; it is the better of
torch's copy_ and of memcpy on as many threads. A float32 update reads four planes and writes three: 28 bytes a
parameter; with split weights and a bf16 gradient, 26.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from lightning_zinf.ops import kernels

PLAIN_BYTES, SPLIT_BYTES = 28, 26
HYPER = kernels.AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=10)


def copiers(numel: int, threads: int) -> dict[str, Callable[[], object]]:
    """Contenders that read and write PLAIN_BYTES * numel bytes in all."""
    size = PLAIN_BYTES * numel // 2
    source, target = (torch.ones(size, dtype=torch.uint8) for _ in range(2))
    pool = ThreadPoolExecutor(threads)
    piece = -(-size // (4 * threads))

    def memcpy_piece(first: int) -> None:
        ctypes.memmove(target.data_ptr() + first, source.data_ptr() + first, min(piece, size - first))

    def memcpy() -> None:
        list(pool.map(memcpy_piece, range(0, size, piece)))

    return {"copy_": lambda: target.copy_(source), "memcpy": memcpy}


def updaters(numel: int) -> dict[str, Callable[[], object]]:
    """One Adam step of each implementation on tensors of numel elements."""
    grad = torch.randn(numel)
    weight, exp_avg, exp_avg_sq = torch.randn(numel), torch.zeros(numel), torch.zeros(numel)
    half, residual, half_grad = weight.bfloat16(), torch.zeros(numel, dtype=torch.int16), grad.bfloat16()
    parameter = torch.nn.Parameter(torch.randn(numel))
    parameter.grad = grad
    fused = torch.optim.AdamW([parameter], lr=HYPER.lr, fused=True)
    plain_segments = [kernels.Segment(0, grad, 0)]
    split_segments = [kernels.Segment(0, half_grad, 0)]
    return {
        "zinf": lambda: kernels.adam_update(weight, None, exp_avg, exp_avg_sq, plain_segments, [HYPER]),
        "zinf split": lambda: kernels.adam_update(half, residual, exp_avg, exp_avg_sq, split_segments, [HYPER]),
        "torch fused": fused.step,
        "norm": lambda: kernels.squared_norm([grad]),
    }


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def overhead(segments: int, elements: int, rounds: int = 200) -> float:
    """Median microseconds of one call that updates many tiny segments."""
    planes = [torch.zeros(segments * elements) for _ in range(3)]
    grads = torch.ones(segments, elements).unbind()
    table = [kernels.Segment(i * elements, grad, 0) for i, grad in enumerate(grads)]
    call = lambda: kernels.adam_update(planes[0], None, planes[1], planes[2], table, [HYPER])  # noqa: E731
    return 1e6 * statistics.median(seconds(call) for _ in range(rounds))


def measure(numel: int, threads: int, rounds: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    kernels.set_num_threads(threads)
    contenders = {**copiers(numel, threads), **updaters(numel)}
    for call in contenders.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(seconds(call))
    copy = [min(pair) for pair in zip(times["copy_"], times["memcpy"], strict=True)]

    def ratio(numerator: list[float], denominator: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))

    result = {f"{name} ms": 1e3 * statistics.median(values) for name, values in times.items()}
    result["copy GB/s"] = PLAIN_BYTES * numel / statistics.median(copy) / 1e9
    result["zinf GB/s"] = PLAIN_BYTES * numel / statistics.median(times["zinf"]) / 1e9
    result["zinf split GB/s"] = SPLIT_BYTES * numel / statistics.median(times["zinf split"]) / 1e9
    result["norm GB/s"] = 4 * numel / statistics.median(times["norm"]) / 1e9
    result["zinf bandwidth / copy"] = ratio(copy, times["zinf"])
    result["zinf split bandwidth / copy"] = ratio(copy, times["zinf split"]) * SPLIT_BYTES / PLAIN_BYTES
    result["zinf speed / torch fused"] = ratio(times["torch fused"], times["zinf"])
    result["zinf split speed / torch fused"] = ratio(times["torch fused"], times["zinf split"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=32 << 20, help="parameters (default: 32 Mi)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=kernels.num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    result = measure(args.numel, args.threads, args.rounds)
    result["call with 1 segment of 64, us"] = overhead(1, 64)
    result["call with 5000 segments of 64, us"] = overhead(5000, 64)
    setting = {"numel": args.numel, "threads": args.threads, "rounds": args.rounds, "isa": kernels.isa()}
    if args.json:
        print(json.dumps({**setting, "torch": torch.__version__, **{k: round(v, 4) for k, v in result.items()}}))
        return
    print(", ".join(f"{name} {value}" for name, value in setting.items()))
    for name, value in result.items():
        print(f"{name:36} {value:10.2f}")


if __name__ == "__main__":
    main()
