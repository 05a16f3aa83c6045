"""A plan as a file beside a run's logs."""

from __future__ import annotations

import json

import fsspec

from lightning_zinf.memory.planner import Plan

FILE = "zinf_plan.json"


def save_plan(plan: Plan, folder: str) -> None:
    """Write a plan to ``zinf_plan.json`` in a folder, which is made if it is missing, or at a URL that fsspec opens."""
    files, path = fsspec.core.url_to_fs(folder)
    files.makedirs(path, exist_ok=True)
    with files.open(f"{path}/{FILE}", "w") as file:
        json.dump(plan.told(), file, indent=1)
