"""What benchmarks/checkpoint.py runs where DeepSpeed is installed, which need not be the environment of lightning-zinf.

    python benchmarks/checkpoint_deepspeed.py save HIDDEN LAYERS FOLDER     # saves once for each line on stdin
    python benchmarks/checkpoint_deepspeed.py consolidate FOLDER OUT        # zero_to_fp32, with its peak of memory

ZeRO-3 with one process on the CPU accelerator and torch's AdamW, so that nothing has to be compiled.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path


def prepare() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29755")


def say(*words: object) -> None:
    """Answer on the stdout that this process began with; DeepSpeed writes to the other."""
    os.write(ANSWERS, (" ".join(map(str, words)) + "\n").encode())


def save(hidden: int, layers: int, folder: Path) -> None:
    import deepspeed
    import torch
    from torch import nn

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(hidden, hidden, bias=False) for _ in range(layers)])
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.backward(engine(torch.randn(2, hidden)).square().mean())
    engine.step()
    say("ready", deepspeed.__version__)
    for _ in sys.stdin:
        start = time.perf_counter()
        engine.save_checkpoint(str(folder), tag="bench")
        os.sync()
        say(time.perf_counter() - start)
    os._exit(0)  # DeepSpeed's own end may wait for other processes


def consolidate(folder: Path, out: Path) -> None:
    import torch
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    def anonymous() -> int:
        return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

    torch.zeros(1)
    before, peak = anonymous(), [0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    convert_zero_checkpoint_to_fp32_state_dict(str(folder), str(out))
    os.sync()
    say(time.perf_counter() - start, peak[0] - before)


if __name__ == "__main__":
    prepare()
    ANSWERS = os.dup(1)
    os.dup2(2, 1)
    if sys.argv[1] == "save":
        save(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    else:
        consolidate(Path(sys.argv[2]), Path(sys.argv[3]))
