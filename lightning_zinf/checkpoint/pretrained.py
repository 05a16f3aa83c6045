"""Pretrained weights in the layout of Hugging Face, tensor by tensor into a model that is never whole in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_zinf.checkpoint.files import Reader
from lightning_zinf.checkpoint.folder import Folder
from lightning_zinf.checkpoint.manifest import CheckpointError, FileInfo

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class IncompatibleKeys(NamedTuple):
    """What did not match, as ``load_state_dict`` returns it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    rename: Callable[[str], str | None] | None = None,
    strict: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> IncompatibleKeys:
    """Load safetensors weights into a model, one tensor at a time.

    Call it in ``configure_model`` after building the model there: its parameters may be on disk already, and are
    brought and taken back one by one. Parameters on the meta device are made as they are loaded. It works on any other
    module as well. With several ranks every rank calls it, and reads the files for itself.

    Args:
        model: The module whose names the file has.
        path: A ``.safetensors`` file, or a folder with ``model.safetensors`` or ``model.safetensors.index.json``.
        rename: Turns a name in the file into one of the model's, or None to leave the tensor out.
        strict: Raise for names that do not match. Tied weights need to be there under one of their names only.
        storage_options: Options for a remote file system.

    Returns:
        ``(missing_keys, unexpected_keys)``.

    Raises:
        CheckpointError: If there are no such files, or they are damaged.
        RuntimeError: For names and shapes that do not match, before anything is changed.
    """
    folder, files = _files(path, storage_options)
    readers = {file: _open(folder, file) for file in files}
    try:
        places: dict[str, tuple[Reader, str]] = {}
        for reader in readers.values():
            for name in reader.tensors:
                target = rename(name) if rename is not None else name
                if target is not None:
                    places[target] = (reader, name)
        keys = _check(model, places, strict)
        for target, (reader, name) in places.items():
            if target not in keys.unexpected_keys:
                _put(model, target, reader.read(name).view(reader.shape(name)))
    finally:
        for reader in readers.values():
            reader.close()
    return keys


def _files(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None) -> tuple[Folder, list[str]]:
    text = os.fspath(path).rstrip("/")
    if text.endswith(".safetensors"):
        parent, _, name = text.rpartition("/")
        return Folder(parent or ".", storage_options), [name]
    folder = Folder(text, storage_options)
    if folder.exists(_INDEX):
        try:
            found = sorted(set(json.loads(folder.read(_INDEX))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder.url}/{_INDEX} is damaged: {type(error).__name__}: {error}") from None
        if any(not isinstance(name, str) or "/" in name for name in found):
            raise CheckpointError(f"{folder.url}/{_INDEX} is damaged: it names files {found}")
        return folder, found
    if folder.exists(_SINGLE):
        return folder, [_SINGLE]
    raise CheckpointError(f"{folder.url} has neither {_SINGLE} nor {_INDEX}: give a folder of safetensors, or a file")


def _open(folder: Folder, name: str) -> Reader:
    if not folder.exists(name):
        raise CheckpointError(f"{folder.url}/{name} is missing")
    return Reader(folder, FileInfo(name, int(folder.fs.size(folder.at(name))), ()))


def _check(model: nn.Module, places: Mapping[str, tuple[Reader, str]], strict: bool) -> IncompatibleKeys:
    expected: dict[str, Any] = model.state_dict(keep_vars=True)
    loaded = {id(expected[n]) for n in places if n in expected}
    missing = [n for n, v in expected.items() if n not in places and id(v) not in loaded]
    unexpected = [n for n in places if n not in expected]
    lines = []
    if strict and missing:
        lines.append(f"Missing key(s) in state_dict: {', '.join(map(repr, missing))}. ")
    if strict and unexpected:
        lines.append(f"Unexpected key(s) in state_dict: {', '.join(map(repr, unexpected))}. ")
    for target, (reader, name) in places.items():
        if target in expected and tuple(expected[target].shape) != reader.shape(name):
            lines.append(
                f"size mismatch for {target}: the file has shape {reader.shape(name)}, the model "
                f"{tuple(expected[target].shape)}."
            )
    if lines:
        raise RuntimeError(f"Error(s) in loading state_dict for {type(model).__name__}:\n\t" + "\n\t".join(lines))
    return IncompatibleKeys(missing, unexpected)


def _put(model: nn.Module, name: str, value: torch.Tensor) -> None:
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(parent)
    current = getattr(module, last)
    with torch.no_grad():
        if not current.is_meta:
            current.copy_(value)
        elif isinstance(current, nn.Parameter):
            new = nn.Parameter(value.to(current.dtype), current.requires_grad)
            for owner in model.modules():  # tied ones stay tied
                for own, param in list(owner._parameters.items()):
                    if param is current:
                        owner.register_parameter(own, new)
        else:
            module._buffers[last] = value.to(current.dtype)
