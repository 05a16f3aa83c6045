"""The shape of a transformer from a Hugging Face ``config.json``, without the transformers package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_zinf.memory.planner import Shape

Config = Mapping[str, Any]


class ConfigError(ValueError):
    """A configuration that cannot be used."""


def _llama(c: Config) -> dict[str, Any]:
    return {
        "layers": c["num_hidden_layers"],
        "hidden": c["hidden_size"],
        "heads": c["num_attention_heads"],
        "kv_heads": c.get("num_key_value_heads"),
        "head_dim": c.get("head_dim"),
        "ffn": c["intermediate_size"],
        "gated": True,
        "biases": bool(c.get("mlp_bias", False)),
        "qkv_biases": bool(c.get("attention_bias", False)),
        "norm_biases": False,
        "tied": bool(c.get("tie_word_embeddings", False)),
    }


def _qwen2(c: Config) -> dict[str, Any]:
    return {**_llama(c), "qkv_biases": True}


def _qwen3(c: Config) -> dict[str, Any]:
    return {**_llama(c), "qk_norm": True}


def _gemma(c: Config) -> dict[str, Any]:
    return {**_llama(c), "tied": bool(c.get("tie_word_embeddings", True))}


def _gemma2(c: Config) -> dict[str, Any]:
    return {**_gemma(c), "norms": 4}


def _mixtral(c: Config) -> dict[str, Any]:
    return {**_llama(c), "experts": c["num_local_experts"], "active": c["num_experts_per_tok"]}


def _gpt2(c: Config) -> dict[str, Any]:
    return {
        "layers": c["n_layer"],
        "hidden": c["n_embd"],
        "heads": c["n_head"],
        "ffn": c.get("n_inner"),
        "positions": c.get("n_positions", 1024),
        "tied": bool(c.get("tie_word_embeddings", True)),
    }


def _neox(c: Config) -> dict[str, Any]:
    return {
        "layers": c["num_hidden_layers"],
        "hidden": c["hidden_size"],
        "heads": c["num_attention_heads"],
        "ffn": c["intermediate_size"],
        "tied": bool(c.get("tie_word_embeddings", False)),
    }


def _opt(c: Config) -> dict[str, Any]:
    if c.get("word_embed_proj_dim", c["hidden_size"]) != c["hidden_size"]:
        raise ConfigError("OPT with a projected embedding (word_embed_proj_dim) is not known")
    return {
        "layers": c["num_hidden_layers"],
        "hidden": c["hidden_size"],
        "heads": c["num_attention_heads"],
        "ffn": c["ffn_dim"],
        "positions": c["max_position_embeddings"] + 2,
        "tied": bool(c.get("tie_word_embeddings", True)),
    }


def _bloom(c: Config) -> dict[str, Any]:
    hidden = c.get("hidden_size") or c["n_embed"]
    return {
        "layers": c.get("n_layer") or c["num_hidden_layers"],
        "hidden": hidden,
        "heads": c.get("n_head") or c["num_attention_heads"],
        "extra": (hidden, hidden),  # the norm of the embedding
        "tied": bool(c.get("tie_word_embeddings", True)),
    }


def _bert(c: Config) -> dict[str, Any]:
    hidden = c["hidden_size"]
    return {
        "layers": c["num_hidden_layers"],
        "hidden": hidden,
        "heads": c["num_attention_heads"],
        "ffn": c["intermediate_size"],
        "positions": c["max_position_embeddings"] + c.get("type_vocab_size", 2),
        "extra": (hidden * hidden, hidden),  # the pooler; the norm is the embedding's
        "headless": True,
    }


_FAMILIES: dict[str, Callable[[Config], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "mixtral": _mixtral,
    "gpt2": _gpt2,
    "gpt_neox": _neox,
    "opt": _opt,
    "bloom": _bloom,
    "bert": _bert,
    "roberta": _bert,
}


def known(kind: str | None) -> bool:
    """Whether the shapes of this ``model_type`` are known here."""
    return kind in _FAMILIES or kind == "t5"


def read_config(path: str) -> dict[str, Any]:
    """Read a ``config.json``, or the one in a folder.

    Raises:
        ConfigError: If it is not one.
        OSError: If it cannot be read.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: this is not JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConfigError(f"{file}: there is no model_type in it, so it is no config.json of transformers")
    return config


def shapes_of(config: Config, seq: int | None = None) -> tuple[Shape, Shape | None]:
    """Return the shape of a model, or of its decoder and its encoder.

    Args:
        config: The content of its ``config.json``.
        seq: Tokens of a sample; by default as many as it has positions, at most 4096.

    Raises:
        ConfigError: If the architecture is not known, or a number is missing.
    """
    kind = config["model_type"]
    if not known(kind):
        raise ConfigError(
            f"the sizes of model_type {kind!r} are not known here ({', '.join([*_FAMILIES, 't5'])} are): install "
            "transformers, which builds it without memory, or give --layers, --hidden and --heads"
        )
    limit = config.get("max_position_embeddings") or config.get("n_positions") or 1024
    tokens = seq or min(int(limit), 4096)
    try:
        if kind == "t5":
            return _t5(config, tokens)
        return Shape(**_FAMILIES[kind](config), vocab=config["vocab_size"], seq=tokens, name=kind), None
    except KeyError as error:
        raise ConfigError(f"{error.args[0]!r} is missing from the configuration of a {kind}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _t5(c: Config, tokens: int) -> tuple[Shape, Shape]:
    buckets = c.get("relative_attention_num_buckets", 32) * c["num_heads"]
    both: dict[str, Any] = {
        "hidden": c["d_model"],
        "heads": c["num_heads"],
        "head_dim": c["d_kv"],
        "ffn": c["d_ff"],
        "gated": str(c.get("feed_forward_proj", "relu")).startswith("gated"),
        "biases": False,
        "norm_biases": False,
        "seq": tokens,
        "name": "t5",
    }
    decoder = Shape(
        layers=c.get("num_decoder_layers") or c["num_layers"],
        vocab=c["vocab_size"],
        cross=True,
        extra=(buckets, buckets),
        tied=bool(c.get("tie_word_embeddings", True)),
        **both,
    )
    return decoder, Shape(layers=c["num_layers"], **both)
