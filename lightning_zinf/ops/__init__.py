"""The compiled core: optimizer kernels, host memory and asynchronous file I/O."""

from lightning_zinf.ops.checksum import crc32, crc32_combine
from lightning_zinf.ops.copying import copy_all
from lightning_zinf.ops.io import File, IOEngine, Ticket
from lightning_zinf.ops.kernels import (
    AVAILABLE,
    AdamHyper,
    Segment,
    adam_update,
    isa,
    join_master,
    num_threads,
    set_num_threads,
    split_master,
    squared_norm,
    squared_norms,
)
from lightning_zinf.ops.memory import host_empty

__all__ = [
    "AVAILABLE",
    "AdamHyper",
    "File",
    "IOEngine",
    "Segment",
    "Ticket",
    "adam_update",
    "copy_all",
    "crc32",
    "crc32_combine",
    "host_empty",
    "isa",
    "join_master",
    "num_threads",
    "set_num_threads",
    "split_master",
    "squared_norm",
    "squared_norms",
]
