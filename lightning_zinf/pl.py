"""Our classes for users of ``pytorch_lightning``."""

from typing import Any

from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.precision import Precision
from pytorch_lightning.strategies import DDPStrategy

from lightning_zinf.callbacks.ema import ZinfEMABody
from lightning_zinf.callbacks.monitor import ZinfMonitorBody
from lightning_zinf.callbacks.timeline import ZinfTimelineBody
from lightning_zinf.precision import ZinfPrecisionBody
from lightning_zinf.strategy import ZinfStrategyBody

__all__ = ["ZinfEMA", "ZinfMonitor", "ZinfPrecision", "ZinfStrategy", "ZinfTimeline"]


class ZinfPrecision(ZinfPrecisionBody, Precision):  # type: ignore[misc]
    """Precision plugin of the zinf strategy for ``pytorch_lightning``."""

    _package = "pytorch_lightning"


class ZinfStrategy(ZinfStrategyBody, DDPStrategy):  # type: ignore[misc]  # noqa: D101
    __doc__ = ZinfStrategyBody.__doc__
    package = "pytorch_lightning"

    @classmethod
    def precision_class(cls) -> Any:
        """Return the precision plugin for the same Lightning package."""
        return ZinfPrecision


class ZinfMonitor(ZinfMonitorBody, Callback):  # type: ignore[misc]  # noqa: D101
    __doc__ = ZinfMonitorBody.__doc__


class ZinfEMA(ZinfEMABody, Callback):  # type: ignore[misc]  # noqa: D101
    __doc__ = ZinfEMABody.__doc__


class ZinfTimeline(ZinfTimelineBody, Callback):  # type: ignore[misc]  # noqa: D101
    __doc__ = ZinfTimelineBody.__doc__
