"""A parameter in tiles: the user's one object, whose values lie in many.

Note [A parameter in tiles]
~~~~~~~~~~~~~~~~~~~~~~~~~~~
The engine gathers a parameter as a whole. One that is too large for that is cut into tiles: parameters of our own that
nobody else sees, each in a unit of its own, so that at most a few are gathered at once. The user's object stays where
it is, with its shape, name, hooks of its module, place in the optimizer and in the state dict, but for good in the
class of released parameters. What is done with it is one of these:

- an operator that works tile by tile (``F.linear``, ``F.embedding``, ``F.conv*d``, ``torch.addmm``) does so;
- any other use in a step gets a whole copy that is connected to the tiles, which costs memory but no exactness;
- code outside of steps gets the whole master, and what it changes there is taken back before the next step;
- ``copy_`` (which ``load_state_dict`` uses) goes tile by tile.

Gradients arrive in the tiles; ``p.grad`` says that there is one and raises for its values.

The modules that own such a parameter run their forward outside of compiled graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_zinf import parameters as paging
from lightning_zinf.engine.guard import plainly
from lightning_zinf.ops import crc32
from lightning_zinf.tiling.dispatch import in_tiles_class
from lightning_zinf.tiling.grid import Grid


class Tile(nn.Module):
    """What a unit of the engine serves: one tile, and whatever is computed with it.

    Args:
        weight: The tile.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(tile, *args)``."""
        return function(self.weight, *args)


class TiledParameter:
    """The owner of a parameter in tiles.

    Args:
        name: Its fully qualified name.
        param: The user's parameter, with its values.
        grid: Where its matrix of the first against the other dimensions is cut.
        modules: The modules that have it.
        device: Where compute runs.
    """

    def __init__(
        self, name: str, param: nn.Parameter, grid: Grid, modules: Sequence[nn.Module], device: torch.device
    ) -> None:
        self.name = name
        self.param = param
        self.grid = grid
        self.device = device
        self.view_dtype = param.dtype
        self.shape = tuple(param.shape)
        self.parts = grid.parts()
        self.tiles = []
        for part, shape in zip(self.parts, grid.shapes(self.shape[1:]), strict=True):
            tile = nn.Parameter(paging.stand_in(shape, param.dtype, torch.device("cpu")), param.requires_grad)
            paging.mark_tile(tile, paging.Origin(param, self.shape, part))
            self.tiles.append(tile)
        self.modules = [Tile(tile) for tile in self.tiles]
        self.opened: list[int] | None = None
        self._opened_version = 0
        self._class = paging.original_class(param)
        self._computing: Callable[[], bool] = bool
        self._users = list(modules)
        self._taken = 0

    # ------------------------------------------------------------------ into tiles, and back

    def take(self, index: int) -> Tensor:
        """Return the values of a tile that is being put where it will live; after the last, the parameter has none."""
        values = self.param.data
        found = self._origin(index).of(values if values.is_contiguous() else values.contiguous())
        return found.reshape(self.tiles[index].shape)

    def taken(self, index: int) -> None:
        """The values of a tile have been taken over."""
        self._taken += 1
        if self._taken == len(self.tiles):
            page = paging.owner_of(self.param)
            if page is not None:  # built under paged_construction
                page[0].context.retire(page[0])
            self.param.data = torch.empty(0, dtype=self.view_dtype)

    def install(self, computing: Callable[[], bool]) -> None:
        """Let every use of the parameter come here from now on.

        Args:
            computing: Tells whether a use is one of a step.
        """
        self._computing = computing
        paging.adopt(self.param, self, 0)  # type: ignore[arg-type]  # which faults in a way of its own
        self._hide()
        for module in self._users:
            module.__dict__["forward"] = EagerForward(module, self)

    def dissolve(self) -> None:
        """Put the values of the tiles, which are ordinary tensors by now, together, and forget the parameter."""
        whole = torch.empty(self.shape, dtype=self.view_dtype, device=self.device)
        with torch.no_grad():
            for index, tile in enumerate(self.tiles):
                self._origin(index).put(whole, tile.data)
                tile.data = torch.empty(0, dtype=self.view_dtype)
        self._show(whole)
        paging.disown(self.param)
        for module in self._users:
            if isinstance(module.__dict__.get("forward"), EagerForward):
                del module.__dict__["forward"]

    def _origin(self, index: int) -> paging.Origin:
        return paging.origin_of(self.tiles[index])

    def _hide(self) -> None:
        self.param.data = paging.stand_in(self.shape, self.view_dtype, self.device)
        self.param.__class__ = in_tiles_class(self._class)

    def _show(self, values: Tensor) -> None:
        self.param.__class__ = self._class
        self.param.data = values

    # ------------------------------------------------------------------ what a released parameter asks its owner

    @property
    def seen_dtype(self) -> torch.dtype:
        """Dtype that a use of the parameter would find now."""
        return self._place(0)[0].seen_dtype  # type: ignore[no-any-return]

    @property
    def computing(self) -> bool:
        """Whether a use now is one of a step."""
        return self._computing()

    def _place(self, index: int) -> tuple[Any, int]:
        found = paging.owner_of(self.tiles[index])
        assert found is not None, self.name
        return found

    # ------------------------------------------------------------------ as blocks

    @property
    def requires_grad(self) -> bool:
        """Whether the parameter does, which its tiles follow."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.param.requires_grad

    def use(self, index: int, function: Callable[..., Any], *args: Any) -> Any:
        """See :meth:`lightning_zinf.tiling.blocks.Blocks.use`."""
        return self.modules[index](function, *args)

    # ------------------------------------------------------------------ gradients

    @property
    @plainly
    def has_grad(self) -> bool:
        """Whether a tile has a gradient, here or elsewhere."""
        return any(tile.grad is not None for tile in self.tiles)

    def forget_grad(self) -> None:
        """Forget the gradient."""
        for index in range(len(self.tiles)):
            buffer, number = self._place(index)
            buffer.gradients.clear([number])

    def check_grad(self) -> None:
        """Refuse gradients that went past the tiles.

        Raises:
            RuntimeError: With the parameter's name.
        """
        if self.opened is not None and self.param.grad is not None:
            raise RuntimeError(
                f"parameter {self.name!r} is in tiles. Its data was taken as a whole in a step (p.data, or a change in "
                "place), and then it was used by code that is not the forward of its module, so its gradient did not "
                "reach the tiles: take its data outside of steps, or after it has been used, or leave it whole with a "
                "larger tiling.max_tile_bytes"
            )

    def set_requires_grad(self, value: bool) -> None:
        """Have tiles follow."""
        with torch._C.DisableTorchFunctionSubclass():
            for tile in self.tiles:
                tile.requires_grad_(value)

    # ------------------------------------------------------------------ the user's view

    def open(self) -> None:
        """Let the parameter be the whole master until the next step."""
        if self.opened is not None:
            return
        with torch.inference_mode(False), torch.no_grad():
            whole = torch.empty(self.shape, dtype=self.view_dtype, device=self.device)
            checksums = []
            for index, tile in enumerate(self.tiles):
                origin = self._origin(index)
                origin.put(whole, tile.data)
                checksums.append(_checksum(origin.of(whole)))
            self._show(whole)
        self.opened, self._opened_version = checksums, self.param._version

    def close(self) -> None:
        """Take back what code outside of steps has made of the parameter.

        Raises:
            ValueError: If it has another shape now.
        """
        if self.opened is None:
            return
        values, checksums = self.param.data, self.opened
        if tuple(values.shape) != self.shape:
            raise ValueError(
                f"parameter {self.name!r} was given data of shape {tuple(values.shape)}, but it has shape "
                f"{self.shape}: change the model before the strategy sets it up"
            )
        self.note_changes()
        self.opened = None
        with torch.inference_mode(False), torch.no_grad():
            values = values.to(self.view_dtype).contiguous()
            self.param.grad = None
            self._hide()
            for index, (tile, checksum) in enumerate(zip(self.tiles, checksums, strict=True)):
                new = self._origin(index).of(values)
                if _checksum(new) != checksum:
                    tile.data.copy_(new.reshape(tile.shape))
            # A graph built outside of a step may have saved the parameter: have it refuse, not read NaN.
            torch.autograd.graph.increment_version([self.param])

    def note_changes(self) -> None:
        """Have graphs that need the tiles refuse, as autograd would, if the parameter was changed in place since."""
        if self.opened is not None and self.param._version != self._opened_version:
            self._opened_version = self.param._version
            torch.autograd.graph.increment_version(self.tiles)

    def copy_(self, values: Tensor) -> None:
        """Set the master, tile by tile."""
        with torch.no_grad():
            values = values.expand(self.shape).contiguous()
            for index, tile in enumerate(self.tiles):
                tile.data.copy_(self._origin(index).of(values).reshape(tile.shape))
            torch.autograd.graph.increment_version(self.tiles)


def _checksum(tensor: Tensor) -> int:
    return crc32(tensor.cpu().contiguous())


class EagerForward:
    """The forward of a module that has a parameter in tiles: its own, outside of compiled graphs.

    Args:
        module: The module.
        owner: The parameter's owner; None for a copy of the module, whose parameter is whole.
    """

    def __init__(self, module: nn.Module, owner: TiledParameter | None = None) -> None:
        self.module, self._owner = module, owner

    @torch._dynamo.disable  # type: ignore[misc,untyped-decorator,unused-ignore]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the module's class."""
        if self._owner is not None:
            self._owner.close()
        return type(self.module).forward(self.module, *args, **kwargs)

    def __reduce__(self) -> Any:
        """A copy leads to the copied module."""
        return EagerForward, (self.module,)
