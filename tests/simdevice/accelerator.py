"""The simulated device for Lightning: ``Trainer(accelerator="sim")``."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry


class SimAccelerator(Accelerator):
    """One simulated device."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("sim", index) for index in range(int(devices))]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "sim"


def register_accelerator() -> None:
    if "sim" not in AcceleratorRegistry.available_accelerators():
        AcceleratorRegistry.register("sim", SimAccelerator, description="simulated")
