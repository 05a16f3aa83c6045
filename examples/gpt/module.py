"""The training of the GPT, as an ordinary LightningModule: nothing here depends on the strategy."""

from __future__ import annotations

import math
import os
import shlex
import sys

import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from model import GPT
from torch import Tensor
from torchmetrics.text import Perplexity


class GPTModule(LightningModule):
    """Next-byte prediction with AdamW, a linear warm-up and a cosine decay.

    Args:
        block_size: longest context in bytes. The command line takes it from the data.
        width: size of the residual stream.
        depth: number of transformer blocks.
        heads: attention heads of each block.
        dropout: dropout rate.
        lr: the highest learning rate, reached after the warm-up.
        min_lr_ratio: the last learning rate, as a part of ``lr``.
        warmup_steps: optimizer steps of the warm-up.
        weight_decay: AdamW's weight decay of the matrices; biases and norms have none.
        beta2: AdamW's decay of the squared gradients.
        prompt: what the sample at the end of the training continues.
        sample_bytes: length of that sample; 0 prints none.
        temperature: of the sample; below 1 the likely bytes become likelier.
        top_k: the sample is drawn from this many likeliest bytes.
    """

    def __init__(
        self,
        block_size: int = 128,
        width: int = 256,
        depth: int = 8,
        heads: int = 4,
        dropout: float = 0.0,
        lr: float = 1e-3,
        min_lr_ratio: float = 0.1,
        warmup_steps: int = 20,
        weight_decay: float = 0.1,
        beta2: float = 0.95,
        prompt: str = "def ",
        sample_bytes: int = 300,
        temperature: float = 0.8,
        top_k: int = 40,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.block_size = block_size
        self.width = width
        self.depth = depth
        self.heads = heads
        self.dropout = dropout
        self.lr = lr
        self.min_lr_ratio = min_lr_ratio
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.beta2 = beta2
        self.prompt = prompt
        self.sample_bytes = sample_bytes
        self.temperature = temperature
        self.top_k = top_k
        self.model: GPT | None = None
        self.val_perplexity = Perplexity()

    def configure_model(self) -> None:
        """Build the network here and not in ``__init__``, so that the strategy can place it as it is built."""
        if self.model is not None:  # Lightning calls this hook again before validate, test and predict
            return
        self.model = GPT(
            block_size=self.block_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            dropout=self.dropout,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Give the logits of the byte after each of ``tokens``."""
        assert self.model is not None
        logits: Tensor = self.model(tokens)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        inputs, targets = batch
        loss = F.cross_entropy(self(inputs).float().flatten(0, 1), targets.flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure the held-out files."""
        inputs, targets = batch
        logits = self(inputs).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)
        self.val_perplexity.update(logits, targets)
        self.log("val/perplexity", self.val_perplexity, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Set up AdamW over two groups, and the learning rate of each step."""
        parameters = list(self.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, self.beta2))
        total = float(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            done = min(1.0, (step - self.warmup_steps) / max(1.0, total - self.warmup_steps))
            return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_end(self) -> None:
        """Print a text that the trained model writes, and where to look at the curves."""
        assert self.model is not None
        if self.sample_bytes:
            # On every rank, and not only on the one that prints: where parameters are spread over ranks, running
            # the model is a common effort.
            sample = self.model.generate(self.prompt.encode(), self.sample_bytes, self.temperature, self.top_k)
            self.print(f"\n{'-' * 32} a sample {'-' * 32}\n{sample.decode(errors='replace')}\n{'-' * 74}")
        if self.trainer.log_dir:
            # This interpreter has TensorBoard, whether or not its environment is active.
            command = [os.path.relpath(sys.executable), "-m", "tensorboard.main", "--logdir", self.trainer.log_dir]
            self.print(f"Curves: {shlex.join(command)}")
