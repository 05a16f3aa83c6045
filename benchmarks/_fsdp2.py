"""A case of step.py for torch's FSDP2 with its offload to host memory, on one device."""

from __future__ import annotations

import argparse
import json
import os

from _process import device_peak, gpt, peak_rss, train

CASES = ["fsdp2 cpu offload"]


def child(args: argparse.Namespace) -> None:
    """Train for some steps and print what was measured as JSON."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F  # noqa: N812
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(args.threads)
    backend = "gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl"
    port = int(os.environ.get("MASTER_PORT", "29519"))
    dist.init_process_group(backend, store=dist.TCPStore("127.0.0.1", port, 1, is_master=True), rank=0, world_size=1)
    baseline = peak_rss(reset=True)
    model = gpt(args)
    low = torch.bfloat16 if args.precision == "bf16-mixed" else torch.float32
    options = {
        "mesh": init_device_mesh(args.device, (1,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=args.device != "cpu"),
    }
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, **options)  # type: ignore[arg-type,call-overload]
    fully_shard(model, **options)  # type: ignore[arg-type,call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch: torch.Tensor) -> None:
        loss = F.cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        if args.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()

    report = train(args, step)
    report.update(peak=peak_rss() - baseline, device_peak=device_peak(args))
    print(json.dumps(report), flush=True)
    dist.destroy_process_group()
