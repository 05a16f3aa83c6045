"""ZeRO-Infinity for PyTorch Lightning: ``Trainer(strategy="zinf")``.

Importing this package imports neither torch nor Lightning. The strategy and the callbacks exist once for
``lightning.pytorch`` and once for ``pytorch_lightning``, which do not accept each other's objects; ``ZinfStrategy``,
``ZinfMonitor``, ``ZinfTimeline`` and ``ZinfEMA`` are those of the package that is in use.
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import lightning_zinf_boot

if TYPE_CHECKING:
    from lightning_zinf.access import full_state_dict as full_state_dict
    from lightning_zinf.access import gathered as gathered
    from lightning_zinf.checkpoint.pretrained import load_pretrained as load_pretrained
    from lightning_zinf.config import CheckpointConfig as CheckpointConfig
    from lightning_zinf.config import IOConfig as IOConfig
    from lightning_zinf.config import MemoryConfig as MemoryConfig
    from lightning_zinf.config import OverlapConfig as OverlapConfig
    from lightning_zinf.config import TilingConfig as TilingConfig
    from lightning_zinf.lightning import ZinfEMA as ZinfEMA
    from lightning_zinf.lightning import ZinfMonitor as ZinfMonitor
    from lightning_zinf.lightning import ZinfStrategy as ZinfStrategy
    from lightning_zinf.lightning import ZinfTimeline as ZinfTimeline
    from lightning_zinf.tiling.loss import tiled_linear_cross_entropy as tiled_linear_cross_entropy
    from lightning_zinf.tiling.modules import TiledEmbedding as TiledEmbedding
    from lightning_zinf.tiling.modules import TiledLinear as TiledLinear
    from lightning_zinf.tiling.modules import TiledMLP as TiledMLP

__version__ = "0.1.0"

__all__ = [
    "CheckpointConfig",
    "IOConfig",
    "MemoryConfig",
    "OverlapConfig",
    "TiledEmbedding",
    "TiledLinear",
    "TiledMLP",
    "TilingConfig",
    "ZinfEMA",
    "ZinfMonitor",
    "ZinfStrategy",
    "ZinfTimeline",
    "__version__",
    "full_state_dict",
    "gathered",
    "load_pretrained",
    "tiled_linear_cross_entropy",
]

_FACES = ("ZinfEMA", "ZinfMonitor", "ZinfStrategy", "ZinfTimeline")
_HOMES = {"lightning.pytorch": "lightning_zinf.lightning", "pytorch_lightning": "lightning_zinf.pl"}
_MODULE_OF = {
    "IOConfig": "lightning_zinf.config",
    "CheckpointConfig": "lightning_zinf.config",
    "MemoryConfig": "lightning_zinf.config",
    "OverlapConfig": "lightning_zinf.config",
    "TiledEmbedding": "lightning_zinf.tiling.modules",
    "TiledLinear": "lightning_zinf.tiling.modules",
    "TiledMLP": "lightning_zinf.tiling.modules",
    "TilingConfig": "lightning_zinf.config",
    "full_state_dict": "lightning_zinf.access",
    "gathered": "lightning_zinf.access",
    "load_pretrained": "lightning_zinf.checkpoint.pretrained",
    "tiled_linear_cross_entropy": "lightning_zinf.tiling.loss",
}


def _home() -> str:
    """Return the module that has the classes for the Lightning package in use."""
    for package, home in _HOMES.items():
        if package in sys.modules:
            return home
    return _HOMES["lightning.pytorch" if importlib.util.find_spec("lightning") else "pytorch_lightning"]


def __getattr__(name: str) -> Any:
    if name in _FACES:  # not kept: which package is in use may change
        return getattr(importlib.import_module(_home()), name)
    if name in _MODULE_OF:
        value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


lightning_zinf_boot.autoload()
