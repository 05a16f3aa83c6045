"""A case of step.py for DeepSpeed's ZeRO-3: run by an interpreter that has deepspeed, with step.py's options.

Needs libaio and a compiler (DeepSpeed builds its extensions on first use). What DeepSpeed cannot do without help here:

- on a CPU its accelerator must be asked for (DS_ACCELERATOR), and its size of a node is taken from LOCAL_SIZE;
- with weights on NVMe its reuse of gathered weights has to be off, since a swap buffer is held until its weight is
  released, and ``max_in_cpu`` has to be 0: the default keeps up to a billion weights in memory.

"default" leaves everything else as DeepSpeed has it; "tuned" cuts the optimizer's state into pieces of 4M elements, and
reads and writes them in a pipeline.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from _process import device_peak, gpt, peak_rss, train

CASES = {
    "deepspeed ram": ("none", "none", False),
    "deepspeed cpu offload": ("cpu", "cpu", True),
    "deepspeed state on nvme": ("cpu", "nvme", True),
    "deepspeed nvme": ("nvme", "nvme", False),
    "deepspeed nvme tuned": ("nvme", "nvme", True),
}
_PIECE = 4_000_000
_BUCKET = 20_000_000


def config(args: argparse.Namespace, params: str, optimizer: str, tuned: bool, largest: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a case."""
    zero: dict[str, Any] = {"stage": 3, "overlap_comm": True, "contiguous_gradients": True}
    zero.update(stage3_param_persistence_threshold=0)
    if tuned:
        zero.update(sub_group_size=_PIECE, reduce_bucket_size=_BUCKET, stage3_prefetch_bucket_size=_BUCKET)
    if optimizer != "none":
        zero["offload_optimizer"] = {"device": optimizer, "nvme_path": args.nvme_path, "pin_memory": True}
        if tuned:
            zero["offload_optimizer"].update(pipeline_read=True, pipeline_write=True, buffer_count=12)
    if params != "none":
        zero["offload_param"] = {"device": params, "pin_memory": True}
        if params == "nvme":
            zero["stage3_max_reuse_distance"] = 0
            zero["offload_param"].update(nvme_path=args.nvme_path, buffer_size=largest, max_in_cpu=0)
    return {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_clipping": args.clip,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01}},
        "bf16": {"enabled": args.precision == "bf16-mixed"},
        "zero_optimization": zero,
        "aio": {"block_size": 2**20, "queue_depth": 8, "single_submit": False, "overlap_events": True},
    }


def child(args: argparse.Namespace) -> None:
    """Train for some steps and print what was measured as JSON."""
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ["DS_ACCELERATOR"] = args.device
    ours = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({**ours, "MASTER_PORT": os.environ.get("MASTER_PORT", "29517")})
    import deepspeed
    import torch
    import torch.nn.functional as F  # noqa: N812

    torch.set_num_threads(args.threads)
    deepspeed.init_distributed(dist_backend="gloo" if args.device == "cpu" else "nccl", verbose=False)
    baseline = peak_rss(reset=True)
    model = gpt(args)
    largest = max(p.numel() for p in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config(args, *CASES[args.child], largest)
    )

    def step(batch: torch.Tensor) -> None:
        loss = F.cross_entropy(engine(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())
        engine.backward(loss)
        engine.step()

    report = train(args, step)
    report.update(peak=peak_rss() - baseline, device_peak=device_peak(args))
    print(json.dumps(report), flush=True)
    os._exit(0)  # the destructors of its I/O handles do not end
