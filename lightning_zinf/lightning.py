"""Our classes for users of ``lightning.pytorch``."""

from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy

from lightning_zinf.callbacks.ema import ZinfEMABody
from lightning_zinf.callbacks.monitor import ZinfMonitorBody
from lightning_zinf.callbacks.timeline import ZinfTimelineBody
from lightning_zinf.precision import ZinfPrecisionBody
from lightning_zinf.strategy import ZinfStrategyBody

__all__ = ["ZinfEMA", "ZinfMonitor", "ZinfPrecision", "ZinfStrategy", "ZinfTimeline"]


class ZinfPrecision(ZinfPrecisionBody, Precision):
    """Precision plugin of the zinf strategy for ``lightning.pytorch``."""

    _package = "lightning.pytorch"


class ZinfStrategy(ZinfStrategyBody, DDPStrategy):  # noqa: D101
    __doc__ = ZinfStrategyBody.__doc__
    package = "lightning.pytorch"

    @classmethod
    def precision_class(cls) -> Any:
        """Return the precision plugin for the same Lightning package."""
        return ZinfPrecision


class ZinfMonitor(ZinfMonitorBody, Callback):  # noqa: D101
    __doc__ = ZinfMonitorBody.__doc__


class ZinfEMA(ZinfEMABody, Callback):  # noqa: D101
    __doc__ = ZinfEMABody.__doc__


class ZinfTimeline(ZinfTimelineBody, Callback):  # noqa: D101
    __doc__ = ZinfTimelineBody.__doc__
