"""What torch offers of an accelerator with memory of its own, whichever it is: its module, memory and streams.

CUDA's module is ``torch.cuda``, another's ``torch.<type>``: what has streams has them by the same names. Devices
without (MPS) copy before they go on, which is right and slower.
"""

from __future__ import annotations

from typing import Any

import torch

_NEEDED = ("Stream", "Event", "stream", "current_stream", "synchronize", "mem_get_info", "memory_allocated")


def module_of(device: torch.device) -> Any | None:
    """Return torch's module of a device that has streams, such as ``torch.cuda``; None for a CPU and for others."""
    if device.type == "cpu":
        return None
    module = getattr(torch, device.type, None)
    return module if module is not None and all(hasattr(module, name) for name in _NEEDED) else None
