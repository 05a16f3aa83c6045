"""What the ranks of a test do with a Trainer and a model that is built in ``configure_model``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning_cases import Net, block, loader, net, trainer
from torch import Tensor

import lightning_zinf
from lightning_zinf.engine import shared_pages

BLOCKS = 12


class Configured(Net):
    """Adds to its blocks where Lightning says so, and counts what was cut meanwhile."""

    cut = 0

    def configure_model(self) -> None:
        if len(self.blocks) > 2:
            return
        self.before()
        self.blocks.extend(block() for _ in range(BLOCKS))
        self.cut = sum(pager.pages for pager in shared_pages.pagers_with_pages())

    def before(self) -> None:
        """What a test does first."""


class Early(Net):
    """The same model, built in the constructor."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.blocks.extend(block() for _ in range(BLOCKS))


class Alone(Configured):
    """Rank 0 looks at what was cut and waits, where others only wait."""

    def configure_optimizers(self) -> Any:
        if self.global_rank == 0:
            self.norm = float(self.blocks[3][0].weight.detach().norm())
        self.trainer.strategy.barrier("optimizers")
        return super().configure_optimizers()


class Downloads(Configured):
    """Rank 0 builds something first, as if to download it."""

    def before(self) -> None:
        if self.global_rank == 0:
            state = torch.get_rng_state()
            torch.nn.Sequential(*[block() for _ in range(BLOCKS)])
            torch.set_rng_state(state)
        self.trainer.strategy.barrier("download")


class Breaks(Configured):
    """Rank 1 fails while it builds."""

    broken = True

    def configure_model(self) -> None:
        super().configure_model()
        if self.broken and self.global_rank == 1:
            raise RuntimeError("broken on purpose")


def fit(
    rank: int, size: int, folder: Path, kind: type[Net], strategy: dict[str, Any], options: dict[str, Any]
) -> tuple[dict[str, Tensor], int]:
    """Validate and fit; return the weights, and how many parameters were cut while the model was built."""
    memory = lightning_zinf.MemoryConfig(host_bytes=600_000 if strategy.get("offload_params") == "nvme" else None)
    chosen = lightning_zinf.ZinfStrategy(**{"memory": memory, **strategy})
    model = net(kind)
    running = trainer(folder, chosen, devices=size, **options)
    running.validate(model, loader(2), verbose=False)
    running.fit(model, loader(4), loader(2))
    again = trainer(folder, lightning_zinf.ZinfStrategy(**{"memory": memory, **strategy}), devices=size, **options)
    again.fit(model, loader(4))
    return lightning_zinf.full_state_dict(model), getattr(model, "cut", 0)


def break_and_fit(rank: int, size: int, folder: Path) -> tuple[str, int, int]:
    """Return what was said, the steps of a second Trainer on the same module, and what was cut."""
    model = net(Breaks)
    said = ""
    try:
        trainer(folder, "zinf", devices=size).fit(model, loader(4))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    model.broken = False
    model = net(Configured)
    running = trainer(folder, "zinf", devices=size)
    running.fit(model, loader(4))
    return said, running.global_step, model.cut
