"""Whole weights for code outside of a training step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_zinf.checkpoint import full
from lightning_zinf.engine.partition import engine_of, engines_of

Params = nn.Module | nn.Parameter | Iterable[nn.Parameter]


@contextmanager
def gathered(params: Params, write: bool = False) -> Iterator[None]:
    """Hold the master weights of some parameters in host memory, for as long as the context is open.

    A parameter comes by itself when it is used, but goes again when other units are used. Use this to look at several
    units at once, or to be sure that changes have been taken over at the end. Parameters that no engine manages stay as
    they are.

    Args:
        params: A parameter, some, or a module for all of its.
        write: Say that the weights will be changed. In one process changes stay either way. With several ranks, all of
            them must open the context then, and all get what rank 0 made of the weights, so it is enough if rank 0
            changes them; without it every rank has to make the same changes.
    """
    if isinstance(params, nn.Module):
        params = params.parameters()
    wanted = [params] if isinstance(params, nn.Parameter) else list(params)
    # The engine closes no unit that somebody sees.
    held: list[Tensor] = [param.detach() for param in wanted]
    try:
        yield
        if write:
            for engine in engines_of(wanted):
                opened = [p.data for p in wanted if engine.places_of(p)]
                engine.broadcast(opened, "the end of `with gathered(..., write=True)`")
    finally:
        held.clear()
        for engine in engines_of(wanted):
            engine.release_host()


def full_state_dict(module: nn.Module) -> dict[str, Any]:
    """Return ``module.state_dict()`` with every weight whole, as the masters on the CPU, unit by unit.

    Args:
        module: A module that the strategy has set up, a part of one, or any other.
    """
    engine = engine_of(module)
    if engine is not None:
        return dict(full.full_state_dict(engine))
    copies: dict[int, Tensor] = {}
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in state.items():
            if isinstance(value, Tensor):  # tied entries share one copy
                if id(value) not in copies:
                    copies[id(value)] = value.detach().to("cpu", copy=True)
                state[name] = copies[id(value)]
    return state
