"""Manifests with parameters in parts: what does not make one whole is refused."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_zinf.checkpoint.manifest import Buffer, CheckpointError, FileInfo, Manifest, Param
from lightning_zinf.layout import Part
from lightning_zinf.tiling.grid import Grid

SHAPE = (6, 8)


def manifest() -> dict[str, Any]:
    """Return one with a weight in 2 x 2 blocks, and a bias beside the first of them."""
    parts = Grid.splits(*SHAPE, 2, 2).parts()
    buffers = []
    for number, part in enumerate(parts):
        params = [Param(("w", "tied"), SHAPE, 0, "F32", part)]
        params += [Param(("b",), (6,), 64, "F32")] if number == 0 else []
        buffers.append(Buffer(f"w[{number}]#0", 128, {"weight": "F32"}, tuple(params)))
    infos = tuple(FileInfo(name, 1, (0,)) for name in ("shard", "module", "trainer"))
    made = Manifest(("shard",), "module", "trainer", tuple(buffers), ("w", "b", "tied"), (("w", "b"),), {}, infos)
    raw: dict[str, Any] = json.loads(made.to_json())
    return raw


def read(raw: dict[str, Any]) -> Manifest:
    return Manifest.from_json(json.dumps(raw), "manifest.json")


def test_round_trip() -> None:
    raw = manifest()
    assert raw["version"] == 2
    assert "part" not in raw["buffers"][0]["params"][1]
    found = read(raw)
    assert json.loads(found.to_json()) == raw
    assert [len(stored.places) for stored in found.stored()] == [4, 1]
    assert found.locations()["tied"] == found.locations()["w"]
    flat = torch.arange(48)
    pieces = [(b.name, first, n) for b, first, n in found.locations()["w"].runs(0, 48)]
    assert pieces[:2] == [("w[0]#0", 0, 4), ("w[1]#0", 0, 4)]
    assert sum(n for _, _, n in pieces) == flat.numel()


def test_without_parts_older_readers_read_it() -> None:
    raw = manifest()
    raw["buffers"] = raw["buffers"][:1]
    raw["buffers"][0]["params"] = raw["buffers"][0]["params"][1:]
    raw["names"], raw["optimizers"] = ["b"], []
    assert json.loads(read(raw).to_json())["version"] == 1


def first_part(raw: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = raw["buffers"][0]["params"][0]["part"]
    return part


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a part is missing": (lambda raw: raw["buffers"].pop(1), "do not make up its 48 elements"),
    "a part is there twice": (lambda raw: raw["buffers"].append(copy.deepcopy(raw["buffers"][1])), "do not make up"),
    "two parts overlap": (lambda raw: first_part(raw).update(first=1), "overlap"),
    "it leaves the parameter": (lambda raw: first_part(raw).update(first=40), "do not make up"),
    "it is whole as well": (lambda raw: raw["buffers"][0]["params"][0].update(part=None), "do not make up"),
    "shapes differ": (lambda raw: raw["buffers"][1]["params"][0].update(shape=[8, 6]), "do not make up"),
    "planes differ": (lambda raw: raw["buffers"][1]["planes"].update(ema="F32"), "different planes"),
    "runs overlap": (lambda raw: first_part(raw).update(stride=2), "is no part of a parameter"),
    "no run": (lambda raw: first_part(raw).update(count=0), "is no part of a parameter"),
    "a number is no number": (lambda raw: first_part(raw).update(length="4"), "is not a whole number"),
    "too many runs": (
        lambda raw: first_part(raw).update(count=10**12, length=1, stride=1),
        "does not lie within|pieces",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_refused(name: str) -> None:
    change, message = BROKEN[name]
    raw = manifest()
    change(raw)
    with pytest.raises(CheckpointError, match=message):
        read(raw)


def test_anything_may_be_changed() -> None:
    """Whatever is changed is refused, or every element is still in one place."""
    chance = random.Random(0)
    refused = 0
    for _ in range(600):
        raw = manifest()
        part = chance.choice(raw["buffers"])["params"][0]["part"]
        part[chance.choice(list(part))] = chance.choice([0, 1, 2, 3, 4, 8, 24, 28, 47, 48, 10**15, -1, None, "x", True])
        try:
            found = read(raw).locations()["w"]
        except CheckpointError:
            refused += 1
            continue
        seen = [p.elements.locate(e) is not None for e in range(48) for _, p in found.places]
        assert sum(seen) == 48
        assert all(any(seen[e * 4 : e * 4 + 4]) for e in range(48))
    assert refused > 200


def test_an_empty_parameter_is_whole() -> None:
    assert Part.whole(0).numel == 0
    assert list(Part.whole(0).runs(0, 0)) == []
