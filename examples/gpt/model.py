"""A byte-level GPT in plain PyTorch.

Nothing in this file knows how or where it is trained: no strategy, no offloading, no flags for either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + half]) by the angle of its position (rotary position embedding)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Mix the positions of ``x`` (batch, time, width), each with those before it."""
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        # The rotation is in the dtype of the buffers: back to that of v, as attention wants all three alike.
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply the block to ``x`` (batch, time, width)."""
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder-only transformer whose embedding is also its output layer.

    Args:
        vocabulary: number of tokens; 256 for bytes.
        block_size: longest context in tokens.
        width: size of the residual stream.
        depth: number of blocks.
        heads: attention heads of each block; ``width / heads`` must be even.
        dropout: dropout of the embedding, the attention and the perceptrons.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        vocabulary: int = 256,
        block_size: int = 128,
        width: int = 256,
        depth: int = 8,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads or (width // heads) % 2:
            raise ValueError(f"width / heads must be an even integer, got {width} / {heads}")
        self.block_size = block_size
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

        half = width // heads // 2
        frequencies = 10000.0 ** -(torch.arange(half) / half)
        angles = torch.arange(block_size)[:, None] * frequencies
        # Not persistent: computed from the arguments, so it has no place in a checkpoint.
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # The layers that write to the residual stream start smaller, so that its variance does not grow
                # with depth (GPT-2).
                writes = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Give the logits (batch, time, vocabulary) of the token that follows each of ``tokens`` (batch, time)."""
        time = tokens.shape[1]
        x = self.dropout(self.embedding(tokens))
        cos, sin = self.cos[:time], self.sin[:time]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @torch.no_grad()
    def generate(
        self,
        prompt_bytes: bytes,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> bytes:
        """Continue a text.

        Args:
            prompt_bytes: what to continue; at least one byte.
            max_new_tokens: how many bytes to add.
            temperature: below 1 the likely bytes become likelier; 0 always takes the likeliest.
            top_k: draw only among this many likeliest bytes.
            seed: the same seed gives the same text, on every rank of a distributed run too.

        Returns:
            The prompt and its continuation.
        """
        if not prompt_bytes:
            raise ValueError("the prompt must have at least one byte")
        generator = torch.Generator().manual_seed(seed)
        tokens = list(prompt_bytes)
        was_training = self.training
        self.eval()
        for _ in range(max_new_tokens):
            context = torch.tensor([tokens[-self.block_size :]], device=self.cos.device)
            # Drawn on the CPU: the generator then needs no device of its own.
            logits = self(context)[0, -1].float().cpu()
            if temperature == 0:
                tokens.append(int(logits.argmax()))
                continue
            if top_k is not None:
                threshold = logits.topk(min(top_k, logits.numel())).values[-1]
                logits = logits.masked_fill(logits < threshold, float("-inf"))
            probabilities = (logits / temperature).softmax(dim=-1)
            tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        self.train(was_training)
        return bytes(tokens)
