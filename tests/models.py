"""A zoo of small models, each with batches and a loss.

They are small, but cut into several units: repeated blocks are units whatever their size, and ``Case.units`` names the
classes of what else should be one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCAB, WIDTH, LENGTH, BATCH = 48, 32, 8, 4
Batch = tuple[Tensor, ...]


def vectors(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, WIDTH, generator=generator), torch.randint(0, 10, (BATCH,), generator=generator)


def images(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 3, 8, 8, generator=generator), torch.randint(0, 10, (BATCH,), generator=generator)


def tokens(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def loss_of(model: nn.Module, batch: Batch, step: int) -> Tensor:
    """Cross entropy; the seed makes dropout and routing noise the same in every run."""
    torch.manual_seed(1000 + step)
    out = model(*batch[:-1])
    return F.cross_entropy(out.flatten(0, -2).float(), batch[-1].flatten())


def loss_at_step(model: nn.Module, batch: Batch, step: int) -> Tensor:
    """As ``loss_of``, for a model that does something else in later steps."""
    torch.manual_seed(1000 + step)
    out = model(*batch[:-1], step)
    return F.cross_entropy(out.flatten(0, -2).float(), batch[-1].flatten())


def same(model: nn.Module, precision: str) -> nn.Module:
    return model


@dataclass(frozen=True)
class Case:
    """A model of the zoo.

    Attributes:
        build: Makes the model; parameters are drawn from torch's global generator.
        batch: Makes the batch of a seed.
        loss: Computes the loss of a batch at a micro-step.
        units: Class names to take as units.
        tile_bytes: Option ``tiling.max_tile_bytes``.
        oracle: Makes of the model, for a precision, one that computes the same in plain PyTorch.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch, int], Tensor] = loss_of
    units: tuple[str, ...] = ()
    tile_bytes: int | None = None
    oracle: Callable[[nn.Module, str], nn.Module] = same

    def make(self, seed: int = 0) -> nn.Module:
        """Build the model with reproducible weights."""
        torch.manual_seed(seed)
        return self.build()


def mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def cnn() -> nn.Module:
    def block(inner: int, outer: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU())

    return nn.Sequential(block(3, 16), block(16, 16), nn.MaxPool2d(2), block(16, 16), nn.Flatten(), nn.Linear(256, 10))


def channels_last_cnn() -> nn.Module:
    return ChannelsLast(cnn()).to(memory_format=torch.channels_last)


class ChannelsLast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.contiguous(memory_format=torch.channels_last))
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.rnn = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.out = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(self.rnn(self.embed(ids))[0])
        return out


class Block(nn.Module):
    """A pre-norm transformer block without ``nn.MultiheadAttention``."""

    def __init__(self, width: int = WIDTH, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Embeddings tied to the head; ``recompute`` is the ``use_reentrant`` of activation checkpointing."""

    def __init__(self, blocks: int = 3, recompute: bool | None = None) -> None:
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position
        for block in self.blocks:
            x = block(x) if self.recompute is None else checkpoint(block, x, use_reentrant=self.recompute)
        out: Tensor = self.head(self.norm(x))
        return out


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 2, 2, 2, 2 * WIDTH, dropout=0.1, batch_first=True)
        self.out = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        out: Tensor = self.out(self.transformer(x, x, tgt_mask=mask, tgt_is_causal=True))
        return out


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.up(x)))
        return out


class Mixture(nn.Module):
    """One expert of eight for each token, by the data: in most steps some experts are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 8)
        self.experts = nn.ModuleList(Expert() for _ in range(8))
        self.out = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).float().softmax(-1)
        weight, chosen = gates.max(-1)
        parts = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            rows = chosen == number
            routed = self.experts[number](x[rows]) * weight[rows].unsqueeze(-1)
            parts = parts.index_put((rows.nonzero()[:, 0],), routed.to(parts.dtype), accumulate=True)
        out: Tensor = self.out(x + parts)
        return out


def frozen() -> nn.Module:
    """A frozen first half, and frozen biases in the second."""
    model = mlp()
    for name, param in model.named_parameters():
        param.requires_grad_(not (name.startswith(("0.", "3.")) or name == "6.bias"))
    return model


class Unused(nn.Module):
    """A whole block, and a bias of the root, that no step touches."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.spare = nn.Parameter(torch.randn(WIDTH))
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.out = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(self.blocks[2](self.blocks[0](self.embed(ids))))
        return out


class Late(nn.Module):
    """A block and a parameter of the root that come into use at the fifth micro-step."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.out = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor, step: int) -> Tensor:
        x = self.blocks[1](self.blocks[0](self.embed(ids)))
        if step >= 4:
            x = self.blocks[2](x) * self.scale
        out: Tensor = self.out(x)
        return out


class Attention(nn.Module):
    """``nn.TransformerEncoderLayer``, whose ``nn.MultiheadAttention`` reads weights of a submodule it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(self.encoder(self.embed(ids)))
        return out


def normed() -> nn.Module:
    model = mlp()
    for layer in (model[0], model[3]):
        nn.utils.parametrizations.weight_norm(layer)
    return model


def born_in_bfloat16() -> nn.Module:
    return InBfloat16(GPT(2).bfloat16())


class InBfloat16(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.inner(ids)
        return out


ZOO: dict[str, Case] = {
    "mlp": Case(mlp, vectors),
    "cnn": Case(cnn, images),
    "lstm": Case(Recurrent, tokens, units=("LSTM", "Embedding")),
    "gpt": Case(GPT, tokens, units=("Embedding",)),
    "gpt-recompute": Case(lambda: GPT(recompute=False), tokens),
    "gpt-recompute-reentrant": Case(lambda: GPT(recompute=True), tokens, units=("Embedding",)),
    "encoder-decoder": Case(EncoderDecoder, tokens),
    "mixture": Case(Mixture, vectors, units=("Expert",)),
    "frozen": Case(frozen, vectors),
    "unused": Case(Unused, tokens),
    "late": Case(Late, tokens, loss_at_step),
    "attention": Case(Attention, tokens),
    "weight-norm": Case(normed, vectors),
    "channels-last": Case(channels_last_cnn, images),
    "bfloat16-born": Case(born_in_bfloat16, tokens),
}
