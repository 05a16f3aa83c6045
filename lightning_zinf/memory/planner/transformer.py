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

from dataclasses import dataclass, replace

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
        qk_norm: Whether queries and keys have norms of the width of a head.
        norms: Norms of a block; None for 2, or 3 with ``cross``.
        experts: Perceptrons of a block among which a router chooses; 0 for one that all tokens use.
        active: Experts that a token uses.
        positions: Rows of a learned table of positions; 0 for none.
        extra: Elements of further parameters outside of blocks.
        tied: Whether the head is the embedding.
        headless: Whether there is no head.
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
    qk_norm: bool = False
    norms: int | None = None
    experts: int = 0
    active: int = 0
    positions: int = 0
    extra: tuple[int, ...] = ()
    tied: bool = True
    headless: bool = False
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


@dataclass(frozen=True)
class _Layer:
    """A linear layer of a block: elements of its parameters, and how many copies of it a token goes through."""

    numels: tuple[int, ...]
    uses: float = 1.0


def _layers(shape: Shape) -> list[_Layer]:
    h, q, kv, f = shape.hidden, shape.query, shape.keys, shape.inner
    qkv_biases = shape.biases if shape.qkv_biases is None else shape.qkv_biases
    found = []
    for _ in range(2 if shape.cross else 1):
        for columns in (q, kv, kv):
            found.append(_Layer((h * columns, *[columns] * qkv_biases)))
        found.append(_Layer((q * h, *[h] * shape.biases)))
    if shape.experts:
        found.append(_Layer((h * shape.experts,)))
    uses = shape.active / shape.experts if shape.experts else 1.0
    for _ in range(max(1, shape.experts)):
        for rows, columns in [(h, f)] * (2 if shape.gated else 1) + [(f, h)]:
            found.append(_Layer((rows * columns, *[columns] * shape.biases), uses))
    return found


def _norms(shape: Shape) -> tuple[int, ...]:
    count = shape.norms if shape.norms is not None else 3 if shape.cross else 2
    heads = (shape.query // shape.heads,) * (2 if shape.qk_norm else 0)
    return (shape.hidden,) * (count * (1 + shape.norm_biases)) + heads


def block_numels(shape: Shape) -> tuple[int, ...]:
    """Return the elements of every parameter of a block."""
    return tuple(n for layer in _layers(shape) for n in layer.numels) + _norms(shape)


def _flops(layer: _Layer, seq: int) -> float:
    return 2.0 * layer.numels[0] * seq * layer.uses


def _tiled(layers: list[_Layer], item: int, tile_bytes: int | None) -> list[_Layer]:
    """Cut layers whose weights are larger than a tile into equal tiles, whose biases go with the first."""
    if tile_bytes is None:
        return layers
    found = []
    for layer in layers:
        weight, *rest = layer.numels
        count = min(weight, -(-weight * item // tile_bytes))
        sizes = [weight * (i + 1) // count - weight * i // count for i in range(count)]
        found += [_Layer((n, *(rest if not i else ())), layer.uses) for i, n in enumerate(sizes)]
    return found


def _blocks(shape: Shape, precision: Precision, *, finer: bool, tile_bytes: int | None) -> list[UnitSpec]:
    """Describe the blocks: each a unit, or each linear layer or tile of one, the norms with the first."""
    h, s, item = shape.hidden, shape.seq, 4 if precision == "32-true" else 2
    attends = 2 if shape.cross else 1
    perceptron = ((3 if shape.gated else 2) * shape.inner + h) * (shape.active or 1)
    saved = float(((2 + attends * 2) * h + attends * 2 * (shape.query + shape.keys) + perceptron) * s * item)
    attention = attends * 4.0 * s * s * shape.query
    if not finer and tile_bytes is None:
        body = BufferSpec.of(block_numels(shape), precision)
        flops = sum(_flops(layer, s) for layer in _layers(shape)) + attention
        return [
            UnitSpec(f"blocks.{i}", (body,), flops, saved, float(h * s * item), block=True) for i in range(shape.layers)
        ]
    layers = _tiled(_layers(shape), item, tile_bytes)
    specs = [
        BufferSpec.of(layer.numels + (_norms(shape) if not j else ()), precision) for j, layer in enumerate(layers)
    ]
    return [
        # Attention itself and what the block saves are counted with its first layer, where the block begins.
        UnitSpec(
            f"blocks.{i}.{j}",
            (specs[j],),
            _flops(layer, s) + (attention if not j else 0.0),
            0.0 if j else saved,
            0.0 if j else float(h * s * item),
            block=True,
        )
        for i in range(shape.layers)
        for j, layer in enumerate(layers)
    ]


def model_of(
    shape: Shape,
    precision: Precision,
    *,
    encoder: Shape | None = None,
    finer: bool = False,
    tile_bytes: int | None = None,
) -> ModelSpec:
    """Describe a transformer whose blocks are units, as the engine cuts it.

    Args:
        shape: Its shape; of the decoder if there is an encoder.
        precision: What it is trained in.
        encoder: The shape of the encoder's blocks beside it; its embedding is that of the decoder.
        finer: Take each linear layer for a unit (``units=["Linear"]``).
        tile_bytes: Take each tile of a linear layer for a unit, of at most so many bytes of weights (tiling).
    """
    h, s, item = shape.hidden, shape.seq, 4 if precision == "32-true" else 2
    units = []
    if shape.vocab:
        rows = BufferSpec.of([shape.vocab * h], precision)
        units.append(UnitSpec("embedding", (rows,), gathers=3 if shape.tied and not shape.headless else 2))
    if encoder is not None:
        units += [
            replace(u, name=f"encoder.{u.name}")
            for u in _blocks(encoder, precision, finer=finer, tile_bytes=tile_bytes)
        ]
    units += _blocks(shape, precision, finer=finer, tile_bytes=tile_bytes)
    if shape.vocab and not shape.headless:
        head = () if shape.tied else (BufferSpec.of([shape.vocab * h], precision),)
        logits = float(shape.vocab * s * (item + 4 + 4))  # as they come, their float32 copy, and its softmax
        units.append(UnitSpec("head", head, 2.0 * shape.vocab * h * s, logits, gathers=2 if head else 0))
    root = [h] * (1 + shape.norm_biases) * (2 if encoder is not None else 1)
    root += ([shape.positions * h] if shape.positions else []) + list(shape.extra)
    units.append(UnitSpec("", (BufferSpec.of(root, precision),)))
    return ModelSpec(shape.name, tuple(units), s)
