"""A case of step.py for torchao's optimizer in host memory (pip install torchao); it needs a CUDA device.

Weights and gradients stay on the device, in float32 under autocast; gradients are copied to host memory as they are
complete, where AdamW updates copies of the weights. So it has no place for clipping by norm, and leaves it out.

Not run yet: no GPU was at hand.
"""

from __future__ import annotations

import argparse
import json

from _process import device_peak, gpt, peak_rss, train

CASES = ["torchao cpu offload"]


def child(args: argparse.Namespace) -> None:
    """Train for some steps and print what was measured as JSON."""
    import torch
    import torch.nn.functional as F  # noqa: N812
    from torchao.optim import CPUOffloadOptimizer  # type: ignore[import-not-found,unused-ignore]

    if args.device != "cuda":
        raise SystemExit("torchao's CPUOffloadOptimizer needs a CUDA device: --device cuda")
    torch.set_num_threads(args.threads)
    baseline = peak_rss(reset=True)
    model = gpt(args).cuda()
    optimizer = CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-4, fused=True)
    low = torch.autocast("cuda", torch.bfloat16, enabled=args.precision == "bf16-mixed")

    def step(batch: torch.Tensor) -> None:
        with low:
            logits = model(batch[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    report = train(args, step)
    report.update(peak=peak_rss() - baseline, device_peak=device_peak(args))
    print(json.dumps(report), flush=True)
