"""Building a model that does not fit into memory.

Note [Paged construction]
~~~~~~~~~~~~~~~~~~~~~~~~~
While a model is being built, every parameter is seen as it is registered with its module, before ``reset_parameters``
runs; memory from ``torch.empty`` that nobody touched yet costs nothing. What has been registered stays an ordinary
parameter as long as the total is below the budget. Above it, the oldest ones go to a page each (``pages.py``): to
NVMe, or in stage 3 to the ranks, each of which keeps a slice (``shared_pages.py``). Whatever touches one later (an
``apply(init)`` at the end, a weight that is tied or copied) brings it back like any released parameter. So the peak
is the budget plus the largest module, and with several ranks their slices; and the model's own init code draws the
values that it always drew. A single weight that is too large for memory is made in a mapped file (``mapped.py``),
unless the ranks build the model together.

The final partition reads page by page into the units' flat buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch.nn.modules.module import register_module_parameter_registration_hook

from lightning_zinf.comm.group import Ranks
from lightning_zinf.config import PartitionConfig
from lightning_zinf.engine.mapped import LargeTensors
from lightning_zinf.engine.pages import SMALLEST_PAGE, ConstructionPager
from lightning_zinf.engine.shared_pages import SHARED_BUDGET, SharedPager
from lightning_zinf.memory.heap import large_blocks_apart
from lightning_zinf.memory.machine import free_host_bytes
from lightning_zinf.memory.placement import COMFORT

DEFAULT_BUDGET = 256 * 2**20
"""Most bytes of parameters that stay ordinary while a model is built, unless told otherwise."""


def construction_budget(config: PartitionConfig, ranks: int = 1) -> int | None:
    """Return how many bytes of parameters may stay in memory while a model is built, or None for all of them.

    Args:
        config: How the model will be partitioned.
        ranks: Number of processes on this host that build it at the same time.
    """
    if config.offload_params == "nvme":
        asked = config.memory.host_bytes
        return (
            min(DEFAULT_BUDGET, free_host_bytes() // (8 * ranks)) if asked is None else max(asked // 2, SMALLEST_PAGE)
        )
    if config.offload_params == "auto" or (ranks > 1 and config.stage == 3):
        return int(COMFORT * free_host_bytes()) // ranks
    return None


def shared_budget(config: PartitionConfig) -> int:
    """Return how many bytes of whole parameters a rank keeps while the ranks build a model together.

    It depends on nothing that differs from rank to rank.
    """
    asked = config.memory.host_bytes
    return SHARED_BUDGET if asked is None else max(SMALLEST_PAGE, min(SHARED_BUDGET, asked // 2))


def whole_limit(config: PartitionConfig, ranks: int = 1) -> int:
    """Return the most bytes of a single tensor that may be in memory while a model is built.

    Args:
        config: How the model will be partitioned.
        ranks: Number of processes on this host that build it at the same time.
    """
    asked = config.memory.host_bytes
    return free_host_bytes() // (4 * ranks) if asked is None else max(asked // 2, SMALLEST_PAGE)


def _pager_of(config: PartitionConfig, local_ranks: int, together: Ranks | None) -> ConstructionPager | None:
    budget = construction_budget(config, local_ranks)
    if budget is None:
        return None
    alone = ConstructionPager(config.nvme_paths, budget, config.io)
    alone.large = LargeTensors(config.nvme_paths, whole_limit(config, local_ranks))
    if together is None or together.shard_size == 1 or config.stage < 3:
        return alone
    memory = 0 if config.offload_params == "nvme" else budget
    return SharedPager(config.nvme_paths, shared_budget(config), config.io, together, memory, apart=alone)


@contextmanager
def paged_construction(
    config: PartitionConfig, ranks: int = 1, together: Ranks | None = None
) -> Iterator[ConstructionPager | None]:
    """Build modules inside; parameters beyond the budget go to files in ``config.nvme_paths``, or to all ranks.

    Nothing is written there, and nothing cut, before the budget is exceeded.

    Args:
        config: How the model will be partitioned.
        ranks: Number of processes on this host that build it at the same time.
        together: The ranks that build it together, all of which open this context; None if each builds its own.

    Yields:
        The pager, or None if all parameters stay in memory.
    """
    pager = _pager_of(config, ranks, together)
    if pager is None:
        yield None
        return
    handle = register_module_parameter_registration_hook(pager.seen)
    try:
        with large_blocks_apart(), pager.large or nullcontext():
            yield pager
    except BaseException as error:
        handle.remove()
        pager.abandon(error)
        raise
    handle.remove()
    pager.finish()
