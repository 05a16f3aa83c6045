"""A linear layer and the cross entropy of what it gives, without ever holding all of the logits.

Note [Cross entropy in tiles]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
The loss of a token needs of its logits their log-sum-exp, the target's and, for label smoothing, their sum. Each tile
of classes gives its share of these three numbers a token, and autograd puts the shares together. In backward a tile
computes its logits again, and from them and the gradients of its three numbers the gradient of its logits:
``softmax * d_lse + onehot * d_target + d_sum``. Inside of a tile of classes, tokens are taken some at a time.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_zinf.tiling.blocks import Blocks, Views, apply
from lightning_zinf.tiling.dispatch import blocks_of
from lightning_zinf.tiling.grid import Grid
from lightning_zinf.tiling.ops import cast_once


class _Share(torch.autograd.Function):
    """The share of a tile of classes: log-sum-exp, target's logit and sum of logits of each token."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, x: Tensor, bias: Tensor | None, target: Tensor, first: int, tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the share of classes ``first`` and following, ``tokens`` tokens at a time."""
        wide = _wide(x)
        shares = torch.empty((3, x.size(0)), dtype=wide, device=x.device)
        for low in range(0, x.size(0), tokens):
            part = slice(low, low + tokens)
            logits = F.linear(x[part], weight, bias).to(wide)
            shares[0, part] = logits.logsumexp(1)
            shares[1, part] = _of_target(logits, target[part] - first)
            shares[2, part] = logits.sum(1)
        ctx.save_for_backward(weight, x, bias, target, shares[0])
        ctx.first, ctx.tokens = first, tokens
        return shares[0].clone(), shares[1], shares[2]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the logits again, and the gradients from them."""
        weight, x, bias, target, lse = ctx.saved_tensors
        on_weight, on_x, on_bias = ctx.needs_input_grad[:3]
        weight_grad = torch.zeros_like(weight) if on_weight else None
        x_grad = torch.empty_like(x) if on_x else None
        bias_grad = torch.zeros_like(bias, dtype=lse.dtype) if on_bias else None
        for low in range(0, x.size(0), ctx.tokens):
            part = slice(low, low + ctx.tokens)
            logits = F.linear(x[part], weight, bias).to(lse.dtype)
            grad = logits.sub_(lse[part, None]).exp_().mul_(grads[0][part, None]).add_(grads[2][part, None])
            inside, hit = _inside(target[part] - ctx.first, weight.size(0))
            grad.scatter_add_(1, inside[:, None], (grads[1][part] * hit)[:, None])
            if bias_grad is not None:
                bias_grad += grad.sum(0)
            low_grad = grad.to(weight.dtype)
            if weight_grad is not None:
                weight_grad.addmm_(low_grad.t(), x[part])
            if x_grad is not None:
                x_grad[part] = low_grad @ weight
        return weight_grad, x_grad, None if bias_grad is None else bias_grad.to(bias.dtype), None, None, None


def _wide(x: Tensor) -> torch.dtype:
    """Return the dtype that logits are computed on in."""
    return torch.promote_types(x.dtype, torch.float32)


def _inside(places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return indices that are valid, and which of them are meant."""
    return places.clamp(0, count - 1), (places >= 0) & (places < count)


def _of_target(logits: Tensor, places: Tensor) -> Tensor:
    inside, hit = _inside(places, logits.size(1))
    return logits.gather(1, inside[:, None]).squeeze(1) * hit


def tiled_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    classes: int = 8192,
    tokens: int = 1024,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return ``F.cross_entropy(F.linear(input, weight, bias).float(), target)`` without ever holding all of the logits.

    At most ``tokens x classes`` logits are in memory at once, in forward and in backward. Sums over classes are cut
    into partial sums, so results differ from the plain ones in rounding. A weight that the strategy has cut into tiles
    is used tile by tile.

    Args:
        input: ``(*, in_features)``.
        weight: ``(classes, in_features)``.
        target: Number of the class of each token, of the shape of ``input`` without its last dimension.
        bias: ``(classes,)`` or None.
        classes: Most classes whose logits are computed at a time; tiles of the strategy may be smaller or larger.
        tokens: Most tokens whose logits are computed at a time.
        ignore_index: Tokens of this class do not count.
        reduction: ``mean`` over the tokens that count, their ``sum``, or ``none`` for the losses of all tokens, of the
            shape of ``target``; in float32, or float64 for such inputs.
        label_smoothing: Share of the target that is spread over all classes.

    Raises:
        ValueError: If shapes do not match, or an option has a value that it cannot have.
    """
    if input.shape[:-1] != target.shape or weight.ndim != 2 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input {tuple(input.shape)}, weight {tuple(weight.shape)} and target {tuple(target.shape)} do not go "
            "together: expected (*, features), (classes, features) and (*)"
        )
    if reduction not in ("mean", "sum", "none") or not 0 <= label_smoothing <= 1 or classes < 1 or tokens < 1:
        raise ValueError(
            "reduction must be 'mean', 'sum' or 'none', label_smoothing from 0 to 1, classes and tokens at least 1; "
            f"got {reduction!r}, {label_smoothing!r}, {classes!r} and {tokens!r}"
        )
    count, width = weight.shape
    flat, x = target.reshape(-1), cast_once(input).reshape(-1, width)
    counts = flat != ignore_index
    if bool((counts & ((flat < 0) | (flat >= count))).any()):
        raise ValueError(f"target has classes that are not from 0 to {count - 1}, nor ignore_index = {ignore_index}")
    tiles = blocks_of(weight)
    if tiles is not None and len(tiles.grid.columns) > 1:
        weight, tiles = weight + 0, None  # a whole copy: tiles that are cut across classes have no logits
    blocks: Blocks = Views(weight, Grid.build(count, width, classes, width)) if tiles is None else tiles
    wanted = flat.where(counts, -1)
    shares = []
    for number, (low, high) in enumerate(blocks.grid.rows):
        part = None if bias is None else bias[low:high]
        shares.append(blocks.use(number, _share, x, part, wanted, low, tokens))
    lse = torch.stack([share[0] for share in shares]).logsumexp(0)
    chosen = torch.stack([share[1] for share in shares]).sum(0)
    losses = lse - chosen
    if label_smoothing:
        total = torch.stack([share[2] for share in shares]).sum(0)
        losses = (1 - label_smoothing) * losses + label_smoothing * (lse - total / count)
    losses = losses * counts
    if reduction == "none":
        return losses.view(target.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()


def _share(
    weight: Tensor, x: Tensor, bias: Tensor | None, target: Tensor, first: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    share: tuple[Tensor, Tensor, Tensor] = apply(_Share, weight, x, bias, target, first, tokens)
    return share
