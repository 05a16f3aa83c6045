"""What DeepSpeed's TiledLinear costs in time, beside the same layer untiled: run by an interpreter that has deepspeed.

    PYTHON_WITH_DEEPSPEED benchmarks/_deepspeed_tiling.py --hidden 1024 --tokens 256 --threads 1 --factors 8 64

It is called by tiling.py with --deepspeed. The layer is trained in plain torch, in bfloat16 autocast with AdamW and all
in memory, since the tiles alone are what is compared; under ZeRO-3 its gathers come on top. Prints JSON: for each
factor the ratio of each round to the untiled layer's step of that round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("DS_LOG_LEVEL", "error")


def main() -> None:
    """Time the layers in turn."""
    import torch
    from deepspeed.runtime.zero.tiling import TiledLinear
    from torch import nn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--factors", type=int, nargs="+", default=[8, 64])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = torch.randn(args.tokens, args.hidden, generator=torch.Generator().manual_seed(0))

    def step_seconds(factor: int) -> float:
        torch.manual_seed(0)
        shape = (args.hidden, 4 * args.hidden)
        layer = nn.Linear(*shape, bias=False)
        if factor > 1:
            layer = TiledLinear(*shape, bias=False, in_splits=1, out_splits=factor, init_linear=layer)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4)
        times = []
        for _ in range(args.steps):
            start = time.perf_counter()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = layer(data).float().square().mean()
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    ratios: dict[int, list[float]] = {factor: [] for factor in args.factors}
    for _ in range(args.rounds):
        untiled = step_seconds(1)
        for factor in args.factors:
            ratios[factor].append(step_seconds(factor) / untiled)
    print(json.dumps(ratios), flush=True)


if __name__ == "__main__":
    main()
