"""The planner: from numbers of a model and a machine to where everything lives and how long a step takes.

Pure arithmetic on plain data: no torch, no torch.distributed, no files. ``make_plan`` is the way in.
"""

from lightning_zinf.memory.planner.decide import Decision, decide
from lightning_zinf.memory.planner.kept import Kept
from lightning_zinf.memory.planner.machine import Machine, Rates
from lightning_zinf.memory.planner.model import BufferSpec, ModelSpec, UnitSpec
from lightning_zinf.memory.planner.options import PlanOptions
from lightning_zinf.memory.planner.plan import Plan, complete, make_plan
from lightning_zinf.memory.planner.residency import Sizes
from lightning_zinf.memory.planner.transformer import Shape, model_of

__all__ = [
    "BufferSpec",
    "Decision",
    "Kept",
    "Machine",
    "ModelSpec",
    "Plan",
    "PlanOptions",
    "Rates",
    "Shape",
    "Sizes",
    "UnitSpec",
    "complete",
    "decide",
    "make_plan",
    "model_of",
]
