"""Transformers from their shape: parameters, operations and activations of every unit.

Note [Sizes of a transformer]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
A block has four projections of attention and the perceptron's two or three, norms, and biases where the architecture
has them. Its forward takes 2 operations for each weight and token, and ``4 * seq * width`` for each token's attention
over all positions (half of which a causal kernel skips, which is not counted, as papers do not). What it saves for
backward, in elements for each token, counting what autograd of plain PyTorch keeps with a fused attention kernel: the
input of each norm and each projection, queries, keys and values, the attention's output, and the perceptron's
activations before and after its nonlinearity. Dropout masks are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_zinf.memory.planner.model import BufferSpec, ModelSpec, Precision, UnitSpec


@dataclass(frozen=True)
class Shape:
    """The shape of a transformer, decoder or encoder.

    Attributes:
        layers: Number of blocks.
        hidden: Width of the residual stream.
        heads: Attention heads.
        vocab: Tokens of the vocabulary; 0 for no embedding and no head.
        seq: Tokens of a sample.
        ffn: Width of the perceptron; None for four times ``hidden``.
        kv_heads: Heads of keys and values; None for as many as ``heads``.
        head_dim: Width of a head; None for ``hidden / heads``.
        gated: Whether the perceptron has a gate, so three projections.
        biases: Whether linear layers have biases.
        qkv_biases: Whether queries, keys and values have biases; None for as ``biases``.
        norm_biases: Whether norms have biases.
        positions: Rows of a learned table of positions; 0 for none.
        tied: Whether the head is the embedding.
        cross: Whether blocks attend to another sequence too, as a decoder does beside an encoder.
        name: For the reader.
    """

    layers: int
    hidden: int
    heads: int
    vocab: int = 0
    seq: int = 1024
    ffn: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    gated: bool = False
    biases: bool = True
    qkv_biases: bool | None = None
    norm_biases: bool = True
    positions: int = 0
    tied: bool = True
    cross: bool = False
    name: str = "transformer"

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "seq"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.head_dim is None and self.hidden % self.heads:
            raise ValueError(f"hidden must be a multiple of heads, got {self.hidden} and {self.heads}")

    @property
    def inner(self) -> int:
        """Width of the perceptron."""
        return 4 * self.hidden if self.ffn is None else self.ffn

    @property
    def query(self) -> int:
        """Width of all queries."""
        return self.heads * (self.head_dim or self.hidden // self.heads)

    @property
    def keys(self) -> int:
        """Width of all keys, and of all values."""
        return self.query // self.heads * (self.kv_heads or self.heads)


def block_numels(shape: Shape) -> list[int]:
    """Return the elements of every parameter of a block."""
    h, q, kv, f = shape.hidden, shape.query, shape.keys, shape.inner
    attention = [(h, q), (h, kv), (h, kv), (q, h)]
    qkv_biases = shape.biases if shape.qkv_biases is None else shape.qkv_biases
    numels: list[int] = []
    for _ in range(2 if shape.cross else 1):
        for (rows, columns), biased in zip(attention, [qkv_biases] * 3 + [shape.biases], strict=True):
            numels += [rows * columns] + [columns] * biased
    for rows, columns in [(h, f)] * (2 if shape.gated else 1) + [(f, h)]:
        numels += [rows * columns] + [columns] * shape.biases
    return numels + [h] * ((3 if shape.cross else 2) * (1 + shape.norm_biases))


def model_of(shape: Shape, precision: Precision) -> ModelSpec:
    """Describe a transformer whose blocks are units, as the engine cuts it.

    Args:
        shape: Its shape.
        precision: What it is trained in.
    """
    h, s = shape.hidden, shape.seq
    item = 4 if precision == "32-true" else 2
    block = block_numels(shape)
    projections = sum(n for n in block if n > max(h, shape.inner, shape.query))
    attends = 2 if shape.cross else 1
    flops = 2.0 * projections * s + attends * 4.0 * s * s * shape.query
    elements = (2 + attends * 2) * h + attends * (shape.query * 2 + shape.keys * 2)
    elements += (3 if shape.gated else 2) * shape.inner + h
    units = []
    if shape.vocab:
        rows = [shape.vocab * h]
        units.append(UnitSpec("embedding", (BufferSpec.of(rows, precision),), gathers=3 if shape.tied else 2))
    body = BufferSpec.of(block, precision)
    units += [
        UnitSpec(f"blocks.{i}", (body,), flops, float(elements * s * item), float(h * s * item))
        for i in range(shape.layers)
    ]
    if shape.vocab:
        head = () if shape.tied else (BufferSpec.of([shape.vocab * h], precision),)
        logits = float(shape.vocab * s * (item + 4 + 4))  # as they come, their float32 copy, and its softmax
        units.append(UnitSpec("head", head, 2.0 * shape.vocab * h * s, logits, gathers=2 if head else 0))
    root = [h] * (1 + shape.norm_biases) + ([shape.positions * h] if shape.positions else [])
    units.append(UnitSpec("", (BufferSpec.of(root, precision),)))
    return ModelSpec(shape.name, tuple(units), s)
