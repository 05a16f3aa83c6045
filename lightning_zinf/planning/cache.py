"""Where the measured speeds of this machine are kept, and when they are no longer good.

One JSON file for each host in ``$XDG_CACHE_HOME/zinf`` (``~/.cache/zinf``): many hosts may share a home directory.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
MOST_DAYS = 90
"""Older measurements are stale: disks fill up and drivers change."""


@dataclass(frozen=True)
class Measured:
    """What was measured of this machine.

    Attributes:
        rates: Figures by name, in bytes or operations a second.
        folder: The folder on the disk that was measured, or several with ``os.pathsep`` between them.
        when: Seconds since 1970.
        host: The machine.
        processor: What computes.
        version: Of this package.
    """

    rates: dict[str, float]
    folder: str
    when: float
    host: str
    processor: str
    version: str


class StaleError(Exception):
    """There are no measurements that are still good; the text says why and what to do."""


def cache_file() -> Path:
    """Return this host's file."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    host = re.sub(r"[^A-Za-z0-9.-]", "_", platform.node()) or "localhost"
    return Path(base) / "zinf" / f"bench-{host}.json"


def processor() -> str:
    """Return a name of what computes here."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    return f"{platform.machine()}, {os.cpu_count()} processors"


def joined(folders: str | Path | Sequence[str]) -> str:
    """Return the real paths of folders as one text."""
    several = [folders] if isinstance(folders, (str, Path)) else folders
    return os.pathsep.join(os.path.realpath(folder) for folder in several)


def save(rates: Mapping[str, float], folders: str | Path | Sequence[str]) -> Path:
    """Keep measurements of a machine and the folders on its disks; return the file."""
    from lightning_zinf import __version__

    file = cache_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "format": FORMAT,
        "rates": dict(rates),
        "folder": joined(folders),
        "when": time.time(),
        "host": platform.node(),
        "processor": processor(),
        "version": __version__,
    }
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(file)
    return file


def load() -> Measured:
    """Return what was measured of this machine.

    Raises:
        StaleError: If nothing was, or if it is no longer good, with the reason.
    """
    from lightning_zinf import __version__

    file = cache_file()
    try:
        data: Any = json.loads(file.read_text())
    except FileNotFoundError:
        raise StaleError("this machine has not been measured: run `zinf bench`") from None
    except (OSError, ValueError) as error:
        raise StaleError(f"the measurements in {file} cannot be read ({error}): run `zinf bench`") from None
    try:
        if data["format"] != FORMAT:
            raise StaleError(f"the measurements in {file} have another format: run `zinf bench` again")
        found = Measured(
            {str(k): float(v) for k, v in data["rates"].items()},
            str(data["folder"]),
            float(data["when"]),
            str(data["host"]),
            str(data["processor"]),
            str(data["version"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise StaleError(f"the measurements in {file} are not complete: run `zinf bench` again") from None
    days = (time.time() - found.when) / 86400
    changes = [
        (found.host != platform.node(), f"are of {found.host}, and this is {platform.node()}"),
        (found.processor != processor(), f"are of {found.processor}, and this is {processor()}"),
        (found.version != __version__, f"are of version {found.version}, and this is {__version__}"),
        (days > MOST_DAYS, f"are {days:.0f} days old"),
        (days < -1, "are from the future"),
        (any(not v > 0 for v in found.rates.values()), "have a rate that is not positive"),
    ]
    for changed, text in changes:
        if changed:
            raise StaleError(f"the measurements in {file} {text}: run `zinf bench` again")
    return found
