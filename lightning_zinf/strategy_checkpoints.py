"""The strategy's checkpoints: one whole file, or shards in a folder."""

from __future__ import annotations

import functools
import os
import pickle
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_zinf import __version__, _compat
from lightning_zinf.checkpoint.folder import Folder, is_local, local_path
from lightning_zinf.checkpoint.full import full_state_dict, load_full_state_dict
from lightning_zinf.checkpoint.load import load_optimizer, load_weights
from lightning_zinf.checkpoint.manifest import MANIFEST
from lightning_zinf.checkpoint.save import placeholders, save
from lightning_zinf.checkpoint.source import Averages, Checkpoint, ShardedStateDict, is_sharded
from lightning_zinf.config import CheckpointConfig
from lightning_zinf.optim.binding import binding_of
from lightning_zinf.optim.state_dict import optimizer_rest
from lightning_zinf.strategy_plan import PlanPart


class CheckpointsPart(PlanPart):
    """How the strategy saves and loads."""

    state_dict_type: str
    checkpoint: CheckpointConfig

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Load into the partitioned module."""
        return True

    @property
    def saves_shards(self) -> bool:
        """Whether checkpoints are sharded."""
        engine = self._engine
        if engine is None or self.state_dict_type == "full":
            return False
        return self.state_dict_type == "sharded" or not self._alone or engine.context.has_nvme

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state dict for a checkpoint.

        It is whole on rank 0 and empty elsewhere; for sharded checkpoints it has tensors on the meta device in the
        place of weights, whose names may be removed to leave them out.
        """
        engine = self._engine
        if engine is None:
            return super().lightning_module_state_dict()
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.status == "interrupted":
            # A callback saves on an exception. If other ranks had none, it is here that all learn of it.
            self._meet("saving a checkpoint after an exception")
        if self.saves_shards and not self._returns_weights:
            return placeholders(engine)
        return full_state_dict(engine, keep=self.is_global_zero)

    @property
    def _returns_weights(self) -> bool:
        """Whether a launcher is about to take the weights to the process that started this one."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        return self._start_method != "popen" and not self._alone and bool(trainer.state.finished)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return an optimizer's state for a checkpoint; for sharded ones without the tensors that are in shards."""
        inner = _compat.unwrapped(optimizer)
        if not self.saves_shards or _compat.is_mock(self.package, inner):
            return super().optimizer_state(optimizer)
        return optimizer_rest(binding_of(inner))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save what Lightning gathered, with the shards of all ranks.

        During ``fit`` a sharded checkpoint is being written while training goes on; see ``wait_for_checkpoints``.
        """
        if not self.saves_shards:
            self.wait_for_checkpoints()
            aside = self._put_shards_aside(filepath)
            try:
                super().save_checkpoint(checkpoint, filepath, storage_options)
            except BaseException:
                if aside is not None:
                    aside.rename(local_path(filepath))
                raise
            if aside is not None:
                shutil.rmtree(aside)
            return
        self.refuse_plugin()
        if storage_options is not None and not isinstance(storage_options, Mapping):
            raise TypeError(
                "storage_options of a sharded checkpoint are options of its file system, a dict for fsspec, got "
                f"{storage_options!r}"
            )
        path = self.broadcast(os.fspath(filepath))  # names may have a metric that differs between ranks
        optimizers = [_compat.unwrapped(o) for o in self.optimizers] if "optimizer_states" in checkpoint else []
        versions = {"lightning-zinf": __version__, "torch": str(torch.__version__)}
        save(
            self.engine,
            checkpoint,
            path,
            optimizers,
            versions,
            storage_options,
            background=self._saves_in_background(path),
            copy_bytes=self.checkpoint.copy_bytes,
        )

    def _saves_in_background(self, path: str) -> bool:
        """Whether nobody needs the checkpoint to be complete when its saving returns."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if not self.checkpoint.async_save or trainer.state.fn != "fit" or trainer.state.status != "running":
            return False
        return not (os.path.basename(path).startswith("hpc_ckpt_") or _compat.needs_whole_checkpoints(trainer))

    def wait_for_checkpoints(self) -> None:
        """Wait until the checkpoint that is being saved, if there is one, is complete.

        With several ranks, all of them must call this.

        Raises:
            OSError: On all ranks, if it cannot be saved; what was there before stays.
        """
        engine = self._engine
        if engine is not None and engine.saving is not None:
            engine.saving.wait()

    def _end_saving(self) -> None:
        """A run ends, well or badly."""
        engine = self._engine
        if engine is None or engine.saving is None:
            return
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.status != "interrupted":
            engine.saving.wait()
        else:
            try:
                engine.saving.wait()
            except OSError as error:  # the exception that ended the run is the one to be raised
                rank_zero_warn(str(error))

    def refuse_plugin(self) -> None:
        """Refuse a CheckpointIO plugin where checkpoints do not go through it.

        Raises:
            ValueError: With what to do instead.
        """
        plugin = self._checkpoint_io
        if self.saves_shards and plugin is not None:
            kind = type(plugin)
            if kind is not _compat.part(self.package, "plugins").TorchCheckpointIO:
                raise ValueError(
                    f"{kind.__name__} would not be used: sharded checkpoints are written by the ranks themselves. Pass "
                    "state_dict_type='full' to ZinfStrategy for whole files through the plugin, or leave the plugin out"
                )

    def _put_shards_aside(self, path: Any) -> Path | None:
        """Rename a sharded checkpoint that has the name of a whole one.

        Raises:
            IsADirectoryError: If there is any other folder of that name, which is not ours to remove.
        """
        if not self.is_global_zero or not is_local(path) or not local_path(path).is_dir():
            return None
        here = local_path(path)
        if not (here / MANIFEST).exists():
            raise IsADirectoryError(f"{here} is a folder that is no checkpoint: give the checkpoint another name")
        return here.rename(here.with_name(f"{here.name}.replaced-{uuid.uuid4().hex[:8]}"))

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint, once the one that is being saved is complete: there is always one that loads."""
        engine = self._engine
        saving = None if engine is None else engine.saving
        if saving is None or not saving.defer(functools.partial(self._remove, filepath)):
            self._remove(filepath)

    def _remove(self, filepath: Any) -> None:
        """Remove a checkpoint; of a sharded one the manifest goes first, so that no half of it looks whole."""
        if self.is_global_zero and is_sharded(filepath):
            folder = Folder(filepath)
            folder.remove([MANIFEST])
            folder.fs.rm(folder.path, recursive=True)
        else:
            super().remove_checkpoint(filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint of this or another strategy."""
        self.wait_for_checkpoints()
        try:
            if is_sharded(checkpoint_path):
                return self._open_sharded(checkpoint_path, weights_only)
            return super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        except pickle.UnpicklingError as error:
            # The Trainer does not pass its weights_only argument on to strategies that load after setup.
            raise pickle.UnpicklingError(
                f"{error}\nIf you trust {checkpoint_path}, set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 in the environment; "
                "Trainer.fit(..., weights_only=False) does not reach the strategy"
            ) from error

    def _open_sharded(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        source = Checkpoint(path)
        checkpoint = source.trainer(weights_only)
        checkpoint["state_dict"] = ShardedStateDict(source, Averages.of(checkpoint))
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights unit by unit."""
        state = checkpoint["state_dict"]
        if self._engine is not None and isinstance(state, ShardedStateDict):
            load_weights(self._engine, state, strict)
        elif self._engine is None:
            super().load_model_state_dict(checkpoint, strict=strict)
        else:
            load_full_state_dict(self._engine, checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' states to where they live."""
        assert self.lightning_module is not None
        _compat.restore_finetuning(self.package, self.lightning_module.trainer)
        for number, (optimizer, state) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            if isinstance(checkpoint["state_dict"], ShardedStateDict):
                load_optimizer(binding_of(optimizer), checkpoint["state_dict"].source, number, state)
            else:
                optimizer.load_state_dict(state)
