"""``module.double()`` and the like, of a module whose weights come and go."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_cases import PLACES, Net, assert_same, loader, net, trainer, weights
from torch import Tensor

import lightning_zinf

CONVERSIONS = {
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "to": lambda m: m.to("cpu", torch.bfloat16),
    "inner": lambda m: m.blocks[1].double(),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_refused_before_anything_is_changed(precision: Any, tmp_path: Path) -> None:
    module = net()
    used = trainer(tmp_path, "nvme", precision=precision)
    used.fit(module, loader())
    before, dtype = weights(module), module.dtype
    for name, convert in CONVERSIONS.items():
        inside = "'0.weight" if name == "inner" else "'blocks.0.0.weight"
        wanted = {"half": "float16", "to": "bfloat16"}.get(name, "float64")
        with pytest.raises(ValueError, match=rf"{inside}' cannot become torch.{wanted}: .*copy.deepcopy\(module\)"):
            convert(module)
        assert module.scale.dtype == torch.float32
        assert module.dtype == dtype
    assert_same(weights(module), before)
    assert module.float() is module
    assert module.to("cpu") is module
    used.test(module, loader(2), verbose=False)
    assert_same(weights(module), before)
    converted = copy.deepcopy(module).double()
    assert {p.dtype for p in converted.parameters()} == {torch.float64}
    whole = net()
    whole.load_state_dict(lightning_zinf.full_state_dict(module))
    assert whole.half()(torch.ones(1, 130, dtype=torch.float16)).dtype == torch.float16


class Converting(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        if batch_idx == 1:
            self.blocks.half()
        return super().training_step(batch, batch_idx)


def test_refused_within_a_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parameter '0.0.weight' cannot become torch.float16"):
        trainer(tmp_path, "nvme").fit(net(Converting), loader())


@pytest.mark.parametrize("place", ["device"])
def test_what_is_in_place_is_ordinary(place: str, tmp_path: Path) -> None:
    assert place in PLACES
    module = net()
    trainer(tmp_path, place).fit(module, loader())
    before = weights(module)
    assert module.double()(torch.ones(1, 130, dtype=torch.float64)).dtype == torch.float64
    assert_same({k: v.float() for k, v in module.state_dict().items()}, before)
