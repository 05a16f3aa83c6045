"""Real models of ``transformers``, built from small configurations: what the tools write is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_cases import assert_same, trainer
from safetensors.torch import load_file
from sharded_cases import everything, strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_zinf
from lightning_zinf import load_pretrained
from lightning_zinf.cli import main

transformers = pytest.importorskip("transformers")

VOCAB = 160


def gpt2() -> Any:
    """Tied embeddings; the first block and the positions are frozen."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=64, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    for part in (model.transformer.h[0], model.transformer.wpe):
        part.requires_grad_(False)
    return model


def llama() -> Any:
    """Input and output embeddings of their own, grouped heads, a gated MLP."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


MODELS = {"gpt2": gpt2, "llama": llama}


class Language(pl.LightningModule):
    def __init__(self, kind: str, pretrained: Path | None = None) -> None:
        super().__init__()
        self.save_hyperparameters("kind")
        self.kind, self.pretrained = kind, pretrained
        self.model: nn.Module | None = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = MODELS[self.kind]()
            if self.pretrained is not None:
                load_pretrained(self.model, self.pretrained)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert self.model is not None
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    validation_step = training_step  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def tokens() -> DataLoader[Tensor]:
    data = torch.randint(0, VOCAB, (16, 16), generator=torch.Generator().manual_seed(3))
    return DataLoader(data, batch_size=4)  # type: ignore[arg-type]


def fit(folder: Path, setting: str, kind: str, epochs: int, path: Path | None = None, how: Any = None) -> Any:
    torch.manual_seed(4)
    model = Language(kind)
    used = trainer(folder, how or strategy(setting), max_epochs=epochs)
    used.fit(model, tokens(), ckpt_path=path)
    return model, used


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint after one epoch, its consolidated file, and what was live when it was saved."""
    folder = tmp_path_factory.mktemp(request.param)
    model, used = fit(folder, "nvme", request.param, 1)
    used.save_checkpoint(folder / "a.ckpt")
    live = everything(model, used)
    assert main(["consolidate", str(folder / "a.ckpt"), str(folder / "one.ckpt")]) == 0
    return request.param, folder, live


def test_one_file_is_the_live_model(trained: Any, tmp_path: Path) -> None:
    kind, folder, live = trained
    weights = {k: v for k, v in live.items() if not k.startswith("optimizer")}
    whole = torch.load(folder / "one.ckpt", weights_only=True)
    assert_same(dict(whole["state_dict"]), weights)
    for index, entry in whole["optimizer_states"][0]["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, live[f"optimizer 0, parameter {index}, {name}"])
    loaded = Language(kind)
    loaded.configure_model()
    start = {k: v.clone() for k, v in loaded.state_dict().items()}
    loaded.load_state_dict(whole["state_dict"])
    assert_same(dict(loaded.state_dict()), weights)
    assert loaded.model is not None
    tied = kind == "gpt2"
    assert (loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight) == tied
    first, second = (whole["state_dict"][f"model.{n}.weight"] for n in EMBEDDINGS[kind])
    assert (first.data_ptr() == second.data_ptr()) == tied
    frozen = [n for n, p in loaded.named_parameters() if not p.requires_grad]
    assert bool(frozen) == tied
    torch.manual_seed(4)
    untrained = Language(kind)
    untrained.configure_model()
    for name in frozen:
        assert torch.equal(weights[name], untrained.state_dict()[name]), name
    assert start.keys() == weights.keys()


EMBEDDINGS = {"gpt2": ("transformer.wte", "lm_head"), "llama": ("model.embed_tokens", "lm_head")}


def test_training_goes_on(trained: Any, tmp_path: Path) -> None:
    kind, folder, _ = trained
    uninterrupted = everything(*fit(tmp_path, "none", kind, 2))
    assert_same(everything(*fit(tmp_path, "cpu", kind, 2, folder / "a.ckpt")), uninterrupted)
    assert_same(everything(*fit(tmp_path, "nvme", kind, 2, folder / "one.ckpt")), uninterrupted)
    plain, _ = fit(tmp_path, "", kind, 2, folder / "one.ckpt", how="auto")
    for name, value in plain.state_dict().items():
        if name.endswith("c_attn.bias"):  # attention does not see the keys' bias: Adam follows noise
            continue
        torch.testing.assert_close(uninterrupted[name], value, atol=1e-4, rtol=0)


def test_from_pretrained_and_back(trained: Any, tmp_path: Path) -> None:
    """Hugging Face's own loader reads what we write, and we read what it writes."""
    kind, folder, live = trained
    out = tmp_path / "hf"
    sizes = ["--strip-prefix", "model.", "--max-shard-size", "100kB"]
    assert main(["consolidate", str(folder / "a.ckpt"), f"{out}/", *sizes]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 2
    MODELS[kind]().config.save_pretrained(out)
    model = type(MODELS[kind]()).from_pretrained(out, dtype=torch.float32)
    expected = {n.removeprefix("model."): v for n, v in live.items() if not n.startswith("optimizer")}
    if kind == "llama":  # whose own names begin with "model." too
        expected = {n.replace("model.", "", 1): v for n, v in live.items() if not n.startswith("optimizer")}
    assert_same(dict(model.state_dict()), expected)

    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert {n for f in (tmp_path / "theirs").glob("*.safetensors") for n in load_file(f)} <= expected.keys()
    for source in (out, tmp_path / "theirs"):
        torch.manual_seed(11)
        module = Language(kind, source)
        used = trainer(tmp_path, strategy("nvme"))
        used.validate(module, tokens(), verbose=False)
        found = lightning_zinf.full_state_dict(module)
        assert_same({n.replace("model.", "", 1): v for n, v in found.items()}, expected)
