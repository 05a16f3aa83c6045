"""Models for the tests of Lightning's contract on several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed.nn.functional as collectives
import torchmetrics
from lightning.pytorch.plugins.layer_sync import LayerSync
from lightning_cases import WIDTH, Net, block
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset


class Manual(Net):
    """One optimizer: two backwards, clipping and a step, all by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(0.5 * loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        self.log("train_loss", loss)


class Alternating(Manual):
    """Two optimizers, and a step within the training step whose weights the second backward uses."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        with first.toggle_model():
            first.zero_grad()
            self.manual_backward(self.loss(batch))
            first.step()
        self.toggle_optimizer(second)
        if batch_idx % 2 == 0:  # gradients of two batches for each step
            second.zero_grad()
        self.manual_backward(self.loss(batch))
        if batch_idx % 2:
            second.step()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.blocks.parameters(), lr=1e-2),
            torch.optim.Adam(self.head.parameters(), lr=1e-2),
        ]


class Gan(Net):
    """``blocks`` generate, ``head`` and ``critic`` judge: the loop of Lightning's documentation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Sequential(block(), block())

    def judge(self, x: Tensor) -> Tensor:
        return self.head(self.critic(x))

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        generator, judge = self.optimizers()
        real, fake = torch.ones(len(batch), 1), torch.zeros(len(batch), 1)
        bce = nn.functional.binary_cross_entropy_with_logits

        self.toggle_optimizer(generator)
        loss = bce(self.judge(self.blocks(batch)), real)
        self.log("generator_loss", loss)
        self.manual_backward(loss)
        generator.step()
        generator.zero_grad()
        self.untoggle_optimizer(generator)

        self.toggle_optimizer(judge)
        loss = bce(self.judge(batch), real) + bce(self.judge(self.blocks(batch).detach()), fake)
        self.log("judge_loss", loss)
        self.manual_backward(loss)
        judge.step()
        judge.zero_grad()
        self.untoggle_optimizer(judge)

    def configure_optimizers(self) -> Any:
        judging = [*self.critic.parameters(), *self.head.parameters()]
        return [
            torch.optim.Adam(self.blocks.parameters(), lr=1e-3, betas=(0.5, 0.999)),
            torch.optim.Adam(judging, lr=1e-3, betas=(0.5, 0.999)),
        ]


class Convolved(Net):
    """Convolution and BatchNorm in front, whose output is as wide as the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.relu(self.norm(self.conv(x[:, None]))).mean(1))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))  # not synced: each rank's own, by the buffers that it evaluates with


class _SyncedNorm(nn.BatchNorm1d):
    """What SyncBatchNorm computes, which torch has for accelerators only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * torch.distributed.get_world_size()
        mean = collectives.all_reduce(x.sum((0, 2))) / count
        centred = x - mean[None, :, None]
        var = collectives.all_reduce(centred.pow(2).sum((0, 2))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return centred * scale[None, :, None] + self.bias[None, :, None]


class SyncNorms(LayerSync):
    """Puts the same parameters and buffers into a layer that talks to other ranks, as TorchSyncBatchNorm does."""

    def apply(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if type(module) is nn.BatchNorm1d:
                module.__class__ = _SyncedNorm
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        return model


class Scheduled(Net):
    """A schedule for each step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ByEpoch(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class OnPlateau(Net):
    """A threshold that no progress reaches, so that every epoch lowers the rate."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class Metered(Net):
    """Metrics and collectives in every step; ``seen`` is what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.train_error = torchmetrics.MeanSquaredError()
        self.errors = torchmetrics.MetricCollection([torchmetrics.MeanAbsoluteError(), torchmetrics.R2Score()])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        found, target = self(batch), batch.sum(1, keepdim=True)
        # Between a forward and its backward, and with a gradient through the collective.
        everyone = self.all_gather(found, sync_grads=True)
        self.seen.append(everyone.detach().clone())
        self.train_error(found, target)
        self.log("train_error", self.train_error, on_step=True, on_epoch=True)
        loss = nn.functional.mse_loss(found, target) + 0.1 * everyone.pow(2).mean()
        self.log("train_loss", loss, sync_dist=True, on_step=True, on_epoch=True)
        self.log("rank", float(self.global_rank), sync_dist=True, reduce_fx="sum")
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        found = self(batch)
        self.seen.append(self.all_gather({"mean": found.mean()})["mean"])
        self.errors.update(found, batch.sum(1, keepdim=True))
        self.log_dict(self.errors)
        self.log("val_loss", found.pow(2).mean(), sync_dist=True)
        self.log("val_rank", float(self.global_rank), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        total = self.trainer.strategy.reduce(torch.tensor(float(self.global_rank + 1)), reduce_op="sum")
        self.seen += [total, self.head(torch.ones(WIDTH)).detach()]


class Routed(Net):
    """Experts that a rank chooses by its own data; a batch uses one or two of four, and nobody ever the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(block() for _ in range(4))
        self.chosen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        first = int(x[0, 0] > 0) + int(x[0, 1] > 0)
        self.chosen.append(first)
        x = self.blocks[0](x) + self.experts[first](x)
        if first == 2:
            x = x + self.experts[0](x)  # more units on this rank than on the other
        return self.head(self.blocks[1](x)) * self.scale


class Zeroed(Net):
    """Drops gradients as a module does, which no optimizer hears of: between backwards, and before a step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.zero_grad()
        self.manual_backward(self.loss(batch))
        self.blocks.zero_grad()
        self.head.bias.grad = None
        self.manual_backward(0.5 * self.loss(batch))
        if batch_idx % 2:
            self.head.weight.grad = None
            self.blocks[0].zero_grad()
        self.optimizers().step()


class Clipped(Net):
    """Its own clipping: by value for some steps, by norm for others, and without for the rest."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if self.global_step % 3 == 0:
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="value")
        elif self.global_step % 3 == 1:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")


class Quiet(Net):
    """Logs nothing: dynamo of torch 2.13 cannot look into Lightning's ``log``, whatever the strategy."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def on_validation_batch_end(self, outputs: Tensor, *args: Any) -> None:
        self.seen.append(outputs)

    def test_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)


class Stream(IterableDataset[Tensor]):
    """A stream of ``count`` rows whose length nobody is told."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.randn(self.count, WIDTH, generator=torch.Generator().manual_seed(self.seed))


def stream(count: int, seed: int) -> DataLoader[Tensor]:
    return DataLoader(Stream(count, seed), batch_size=4)
