"""Machines from YAML files, with units that people write."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_zinf.memory.planner import Machine, Rates

_PREFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40, "pi": 2**50}
_SIZES = ("hbm_per_gpu", "dram_per_node", "nvme_per_node")
_RATES = {
    "tflops_per_gpu": "flops",
    "adam_per_node": "adam",
    "h2d_per_gpu": "host_to_device",
    "h2d_per_node": "host_to_device",
    "d2h_per_gpu": "device_to_host",
    "d2h_per_node": "device_to_host",
    "gather_per_gpu": "gather",
    "network_per_node": "gather",
    "nvme_read_per_node": "nvme_read",
    "nvme_write_per_node": "nvme_write",
    "nvme_mixed_per_node": "nvme_mixed",
}
"""Keys of a cluster's file, and the rate that each is."""
_COUNTS = ("nodes", "gpus_per_node")
_KEYS = ("name", *_COUNTS, *_SIZES, "usable", *_RATES)


class ClusterError(ValueError):
    """A description of a machine that cannot be used."""


def amount(text: object, what: str) -> float:
    """Read an amount such as ``32GB``, ``1.5TiB``, ``28GB/s`` or a plain number.

    Raises:
        ClusterError: If it is none.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return float(text)
    match = re.fullmatch(r"([0-9.eE+]+)\s*([kmgtp]i?)?b?(/s)?", str(text).strip(), re.IGNORECASE)
    try:
        assert match is not None
        unit = (match[2] or "").lower()
        return float(match[1]) * (_BINARY[unit] if unit in _BINARY else _PREFIX[unit])
    except (AssertionError, ValueError):
        raise ClusterError(f"{what}: {text!r} is no amount: write 32GB, 1.5TiB or 28GB/s") from None


def machine_of(data: Mapping[str, Any], where: str) -> Machine:
    """Return the machine that a mapping describes.

    Args:
        data: ``nodes``, ``gpus_per_node``, ``hbm_per_gpu``, ``dram_per_node``, ``nvme_per_node``, ``usable`` (the share
            of each of them that training may take, 1 by default) and rates; what is given for a node is shared by its
            GPUs. ``network_per_node`` and ``gather_per_gpu`` together take the lower of the two for one GPU.
        where: Where it was found, for messages.

    Raises:
        ClusterError: If a key is unknown or missing, or a value cannot be.
    """
    unknown = [k for k in data if k not in _KEYS]
    if unknown:
        raise ClusterError(f"{where}: unknown key {unknown[0]!r}; there are {', '.join(_KEYS)}")
    missing = [k for k in ("gpus_per_node", "hbm_per_gpu", "dram_per_node") if k not in data]
    if missing:
        raise ClusterError(f"{where}: {missing[0]} is missing")
    counts = {}
    for key in _COUNTS:
        value = data.get(key, 1)
        if not isinstance(value, int) or value < 1:
            raise ClusterError(f"{where}: {key} must be a positive whole number, got {value!r}")
        counts[key] = value
    usable = data.get("usable", 1.0)
    if not isinstance(usable, (int, float)) or not 0 < usable <= 1:
        raise ClusterError(f"{where}: usable must be above 0 and at most 1, got {usable!r}")
    hbm, dram, nvme = (int(usable * amount(data.get(k, 0), f"{where}: {k}")) for k in _SIZES)
    rates: dict[str, float] = {}
    for key, rate in _RATES.items():
        if data.get(key) is None or (key == "network_per_node" and counts["nodes"] == 1):
            continue
        value = amount(data[key], f"{where}: {key}") * (1e12 if key == "tflops_per_gpu" else 1)
        value /= counts["gpus_per_node"] if key.endswith("_per_node") and key != "network_per_node" else 1
        if key == "network_per_node":
            # A node receives a gathered buffer's part of the other nodes once; each GPU then has all of it.
            value *= counts["nodes"] / (counts["nodes"] - 1)
        rates[rate] = min(value, rates.get(rate, value))
    try:
        return Machine(
            str(data.get("name", where)),
            hbm,
            dram,
            nvme,
            Rates(**rates),
            ranks_per_node=counts["gpus_per_node"],
            nodes=counts["nodes"],
        )
    except ValueError as error:
        raise ClusterError(f"{where}: {error}") from None


def load_cluster(path: str) -> Machine:
    """Read a machine from a YAML file; see :func:`machine_of`.

    Raises:
        ClusterError: If it is no such file.
        OSError: If it cannot be read.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ClusterError(f"{path}: this is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ClusterError(f"{path}: a cluster is a mapping of {', '.join(_KEYS)}")
    return machine_of(data, path)
