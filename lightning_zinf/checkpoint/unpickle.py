"""Reading files that DeepSpeed wrote with torch.save, without running what is in them and without deepspeed.

Note [Restricted unpickling]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~
A pickle names functions and classes, and calls them as it is read. torch's unpickler for ``weights_only=True`` calls
only those of a list. What DeepSpeed's files need beside it (an enumeration, loss scalers, addresses of fragments) is
replaced by classes that keep what they are given and do nothing. A file that names anything else is refused before any
of it is read. Tensors are mapped, not read: what is in memory is the page cache's.
"""

from __future__ import annotations

import os
import pickle
from typing import Any

import torch

from lightning_zinf.checkpoint.manifest import CheckpointError

REPLACED = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes of DeepSpeed in the place of which there are inert ones."""


class Inert:
    """Keeps what it is made of.

    Args:
        arguments: Anything.
    """

    def __new__(cls, *arguments: Any) -> Inert:
        """Keep the arguments."""
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    arguments: tuple[Any, ...]

    def __setstate__(self, state: Any) -> None:
        """Keep the state."""
        self.state = state


def _replacement(path: str) -> type[Inert]:
    module, _, name = path.rpartition(".")
    return type(name, (Inert,), {"__module__": module, "__qualname__": name, "__init__": lambda self, *given: None})


_REPLACEMENTS = [_replacement(path) for path in REPLACED]


def restricted_load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what is in a file of DeepSpeed; tensors are mapped.

    Args:
        path: A local file.

    Raises:
        CheckpointError: If it names anything that DeepSpeed's files do not need, or is damaged.
    """
    where = os.fspath(path)
    with torch.serialization.safe_globals(_REPLACEMENTS):  # type: ignore[arg-type]
        try:
            others = torch.serialization.get_unsafe_globals_in_checkpoint(where)
            if others:
                raise CheckpointError(
                    f"{where} names {', '.join(sorted(others))}, which tensors and DeepSpeed's own state do not need: "
                    "it is refused, since reading a pickle runs what it names. If it is something of yours, save the "
                    "checkpoint again without it (hyper-parameters, callbacks and client_state are where such things "
                    "come from)"
                )
            loaded = torch.load(where, map_location="cpu", mmap=True, weights_only=True)
        except FileNotFoundError:
            raise CheckpointError(f"{where} is missing: the checkpoint is not complete") from None
        except pickle.UnpicklingError as error:
            reason = next((line for line in str(error).splitlines() if "Unsupported" in line), str(error))
            raise CheckpointError(f"{where} is refused: {reason.strip()}") from None
        except (RuntimeError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{where} is damaged, or no file of torch.save: {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{where} has a {type(loaded).__name__}, not what DeepSpeed saves")
    return loaded
