"""What plans are made from: configurations, clusters, and measurements."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lightning_zinf.engine.drafts import describe_model, draft_buffers
from lightning_zinf.engine.units import find_units
from lightning_zinf.memory.planner import Machine, PlanOptions, Rates, Shape, make_plan, model_of
from lightning_zinf.planning import cache, measure
from lightning_zinf.planning.clusters import ClusterError, amount, load_cluster, machine_of
from lightning_zinf.planning.hugging_face import ConfigError, read_config, shapes_of
from lightning_zinf.planning.lightning_config import read_run
from lightning_zinf.planning.modules import build_on_meta, describe_module, from_transformers, import_class

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
LLAMA_3 = {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
GEMMA = {"num_hidden_layers": 18, "hidden_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 1}
GEMMA_2 = {"num_hidden_layers": 42, "hidden_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 8}
QWEN_2 = {"num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4}
QWEN_3 = {"num_hidden_layers": 36, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
MISTRAL = {"model_type": "mistral", "num_key_value_heads": 8, "intermediate_size": 14336}
NEOX = {"num_hidden_layers": 44, "hidden_size": 6144, "num_attention_heads": 64, "vocab_size": 50432}
OPT = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "max_position_embeddings": 2048}
BERT = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "max_position_embeddings": 512}
T5 = {"model_type": "t5", "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
GPT_2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": (GPT_2, 124_439_808),
    "Llama-2-7b": (LLAMA, 6_738_415_616),
    "Llama-3-8B": ({**LLAMA, **LLAMA_3}, 8_030_261_248),
    "Mistral-7B": ({**LLAMA, **MISTRAL}, 7_241_732_096),
    "Mixtral-8x7B": (
        {**LLAMA, **MISTRAL, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
        46_702_792_704,
    ),
    "Qwen2-7B": (
        {**LLAMA, **QWEN_2, "model_type": "qwen2", "intermediate_size": 18944, "vocab_size": 152064},
        7_615_616_512,
    ),
    "Qwen3-8B": ({**LLAMA, **QWEN_3, "model_type": "qwen3", "intermediate_size": 12288}, 8_190_735_360),
    "gemma-2b": (
        {**LLAMA, **GEMMA, "model_type": "gemma", "head_dim": 256, "intermediate_size": 16384, "vocab_size": 256000},
        2_506_172_416,
    ),
    "gemma-2-9b": (
        {**LLAMA, **GEMMA_2, "model_type": "gemma2", "head_dim": 256, "intermediate_size": 14336, "vocab_size": 256000},
        9_241_705_984,
    ),
    "gpt-neox-20b": ({**LLAMA, **NEOX, "model_type": "gpt_neox", "intermediate_size": 24576}, 20_554_567_680),
    "opt-125m": ({**OPT, "model_type": "opt", "ffn_dim": 3072, "vocab_size": 50272}, 125_239_296),
    "bloom-560m": (
        {"model_type": "bloom", "n_layer": 24, "n_embed": 1024, "n_head": 16, "vocab_size": 250880},
        559_214_592,
    ),
    "bert-base-uncased": (
        {**BERT, "model_type": "bert", "intermediate_size": 3072, "vocab_size": 30522, "type_vocab_size": 2},
        109_482_240,
    ),
    "t5-small": ({**T5, "vocab_size": 32128}, 60_506_624),
}
"""Configurations of well-known models, and the parameters that their cards and frameworks count."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_known_models(name: str) -> None:
    config, count = PUBLISHED[name]
    shape, encoder = shapes_of(config)
    for finer in (False, True):
        assert model_of(shape, "bf16-mixed", encoder=encoder, finer=finer).numel == count
    assert model_of(shape, "32-true", encoder=encoder, tile_bytes=2**20).numel == count


def test_a_transformer_by_its_shape_is_the_module_of_that_shape() -> None:
    """Parameters, padding, units and operations of the zoo's GPT as torch counts them."""
    from models import LENGTH, VOCAB, WIDTH, Block
    from torch.utils.flop_counter import FlopCounterMode

    shape = Shape(3, WIDTH, 2, VOCAB, LENGTH, ffn=2 * WIDTH, positions=LENGTH)
    block = Block()
    expected = describe_model(draft_buffers(find_units(block, 2**24), "bf16-mixed", ()), "block")
    (buffer,) = next(u.buffers for u in model_of(shape, "bf16-mixed").units if u.name == "blocks.0")
    assert sorted(buffer.numels) == sorted(
        (*(n for u in expected.units for b in u.buffers for n in b.numels if n != 3 * WIDTH**2 and n != 3 * WIDTH),)
        + (WIDTH**2,) * 3
        + (WIDTH,) * 3
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(torch.randn(1, LENGTH, WIDTH))
    assert next(u.flops for u in model_of(shape, "32-true").units if u.name == "blocks.0") == pytest.approx(
        counter.get_total_flops(), rel=0.1
    )


def test_unknown_configurations_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_type 'mamba' are not known here .*install transformers"):
        shapes_of({"model_type": "mamba"})
    with pytest.raises(ConfigError, match="'intermediate_size' is missing from the configuration of a llama"):
        shapes_of({k: v for k, v in LLAMA.items() if k != "intermediate_size"})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="this is not JSON"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="there is no model_type in it"):
        read_config(str(tmp_path / "config.json"))


class Tiny(nn.Module):
    def __init__(self, width: int = 8, bad: bool = False) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        if bad:
            torch.ones(1).item()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


def test_a_module_is_described_without_memory() -> None:
    module = build_on_meta(Tiny, {"width": 2**14})
    assert all(p.is_meta for p in module.parameters())
    spec = describe_module(module, "32-true", name="tiny")
    assert spec.numel == 2 * (2**28 + 2**14)
    assert spec.measured
    assert spec.flops == pytest.approx(2 * 2 * 2**28)
    # The inputs of both layers, of which the second is what ReLU saves too.
    assert sum(u.saved_bytes for u in spec.units) == pytest.approx(4 * 2 * 2**14)
    with pytest.raises(ConfigError, match=r"Tiny cannot be built on torch's meta device.*--layers"):
        build_on_meta(Tiny, {"bad": True})
    with pytest.raises(ConfigError, match="cannot be imported"):
        import_class("no_such_package.Thing")


def test_transformers_builds_on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package, since it is not installed: an unknown type is handed to it without memory."""
    fake = types.ModuleType("transformers")
    built: list[Any] = []

    class AutoConfig:
        @staticmethod
        def for_model(kind: str, **settings: Any) -> dict[str, Any]:
            return {"kind": kind, **settings}

    class AutoModel:
        @staticmethod
        def from_config(config: dict[str, Any]) -> nn.Module:
            built.append(config)
            return nn.Linear(config["width"], config["width"])

    fake.AutoConfig, fake.AutoModel = AutoConfig, AutoModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", fake)
    spec = from_transformers({"model_type": "mamba", "width": 4096}, "bf16-mixed", 128)
    assert built == [{"kind": "mamba", "width": 4096}]
    assert spec.numel == 4096**2 + 4096
    assert spec.flops == 2 * spec.numel * 128


# ---------------------------------------------------------------------- configurations of runs


def test_what_a_lightning_configuration_says(tmp_path: Path) -> None:
    trainer = {
        "precision": "bf16-mixed",
        "accumulate_grad_batches": 4,
        "devices": 2,
        "num_nodes": 3,
        "gradient_clip_val": 1.0,
        "strategy": "zinf_stage_2_offload",
    }
    model = {"class_path": "a.B", "init_args": {"width": 3}}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"fit": {"model": model, "trainer": trainer, "data": {"batch_size": 5}}}))
    run = read_run(str(file))
    assert (run.class_path, run.arguments, run.precision, run.accumulate) == ("a.B", {"width": 3}, "bf16-mixed", 4)
    assert (run.batch, run.devices, run.nodes, run.clip) == (5, 2, 3, True)
    assert run.strategy == {"stage": 2, "offload_optimizer": "cpu"}
    file.write_text("trainer: {}")
    with pytest.raises(ConfigError, match="there is no model in it"):
        read_run(str(file))
    file.write_text(yaml.safe_dump({"model": {}, "trainer": {"precision": "64-true"}}))
    with pytest.raises(ConfigError, match="precision '64-true'"):
        read_run(str(file))


# ---------------------------------------------------------------------- clusters


def test_amounts() -> None:
    assert [amount(t, "x") for t in ("32GB", "1.5TiB", "28GB/s", "3 k", 7, "2e9")] == [
        32e9, 1.5 * 2**40, 28e9, 3000, 7, 2e9,
    ]  # fmt: skip
    for text in ("lots", "3 bananas", None, True):
        with pytest.raises(ClusterError, match="is no amount: write 32GB"):
            amount(text, "x")


def test_a_cluster_shares_what_its_nodes_have() -> None:
    base = {"gpus_per_node": 4, "hbm_per_gpu": "80GB", "dram_per_node": "1TB", "nvme_per_node": "4TB", "usable": 0.5}
    machine = machine_of({**base, "nodes": 2, "nvme_read_per_node": "8GB/s", "network_per_node": "10GB/s"}, "c")
    assert (machine.world_size, machine.device_bytes, machine.host_bytes) == (8, 40 * 10**9, 5 * 10**11)
    assert machine.rates == Rates(nvme_read=2e9, gather=20e9)
    alone = machine_of({**base, "network_per_node": "10GB/s", "gather_per_gpu": "70GB/s"}, "c")
    assert alone.rates == Rates(gather=70e9)
    for change, text in [
        ({"gpus": 4}, "unknown key 'gpus'"),
        ({"nodes": 0}, "nodes must be a positive whole number"),
        ({"usable": 2}, "usable must be"),
        ({"tflops_per_gpu": 0}, "the rate flops must be positive"),
    ]:
        with pytest.raises(ClusterError, match=text):
            machine_of({**base, **change}, "c")
    with pytest.raises(ClusterError, match="hbm_per_gpu is missing"):
        machine_of({"gpus_per_node": 1}, "c")


def test_the_clusters_that_come_along() -> None:
    folder = Path(__file__).parents[2] / "configs" / "clusters"
    one, many = (load_cluster(str(folder / name)) for name in ("dgx2.yaml", "dgx2x32.yaml"))
    assert asdict(many) == {**asdict(one), "nodes": 32, "name": "32 DGX-2"}


# ---------------------------------------------------------------------- measurements


def test_measurements_are_kept_for_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(cache.StaleError, match=r"has not been measured: run `zinf bench`"):
        cache.load()
    file = cache.save({"adam": 5e10}, tmp_path)
    assert cache.load().rates == {"adam": 5e10}
    assert [p.name for p in (tmp_path / "zinf").iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"host": "elsewhere"}, "are of elsewhere"),
        ({"processor": "abacus"}, "are of abacus"),
        ({"version": "0.0"}, "are of version 0.0"),
        ({"when": 0.0}, "days old"),
        ({"when": 4e9}, "are from the future"),
        ({"format": 0}, "have another format"),
        ({"rates": {"adam": -1.0}}, "rate that is not positive"),
        ({"rates": []}, "are not complete"),
    ],
)
def test_stale_measurements_are_named(
    change: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = cache.save({"adam": 5e10}, tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(cache.StaleError, match=reason):
        cache.load()
    file.write_text("{")
    with pytest.raises(cache.StaleError, match="cannot be read"):
        cache.load()


def test_links_are_measured(tmp_path: Path) -> None:
    rates = measure.disk_rates(tmp_path, 0.05, size=2**25, request=2**22)
    assert set(rates) == {"nvme_read", "nvme_write", "nvme_mixed"}
    rates |= {
        "adam": measure.adam_rate(0.05, 2**18),
        "copy": measure.copy_rate(0.05, 2**20),
        "flops": measure.compute_rate(torch.float32, 0.05, width=64, batch=1, seq=16),
        "gather": measure.gather_rate(0.1, 2**20),
    }
    assert all(rate > 0 for rate in rates.values())
    assert list(tmp_path.iterdir()) == []


def test_plans_are_of_the_machine_as_a_whole() -> None:
    """Twice the nodes: half of the state on each, and the same weights to gather."""
    model = model_of(Shape(4, 1024, 8, seq=64), "bf16-mixed")
    machine = Machine("m", 2**30, 2**34, 2**40, Rates(), ranks_per_node=2)
    one, two = (make_plan(model, machine.with_nodes(n), PlanOptions("nvme", "nvme")) for n in (1, 2))
    on_disk = [next(t.needed for t in plan.tiers if t.tier == "nvme") for plan in (one, two)]
    assert on_disk[0] == pytest.approx(2 * on_disk[1], rel=1e-3)  # shards are padded
    assert one.traffic.all_gather == pytest.approx(two.traffic.all_gather, rel=1e-3)
