"""What the ranks do in the tests of Lightning's contract."""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path
from typing import Any

import torch
from contract_models import Convolved, Quiet, Scheduled, Stream, SyncNorms, stream
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from lightning_cases import WIDTH, Net, loader, net
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader
from trainers import build

import lightning_zinf


def made(strategy: Any) -> Any:
    """Return a strategy: a dict has options of ours."""
    # Whole files, which DDP reads too; sharded ones have tests of their own.
    return (
        lightning_zinf.ZinfStrategy(**{"state_dict_type": "full", **strategy})
        if isinstance(strategy, dict)
        else strategy
    )


def _numbers(metrics: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def fit(
    rank: int, size: int, folder: Path, strategy: Any, kind: type[Net], options: dict[str, Any], batches: int = 12
) -> dict[str, Any]:
    """Fit and test a model; return all there is to compare with another strategy."""
    options = dict(options)
    if (schedule := options.pop("accumulation", None)) is not None:
        options["callbacks"] = [GradientAccumulationScheduler(scheduling=schedule)]
    if options.get("sync_batchnorm") == "replaced":
        options |= {"sync_batchnorm": False, "plugins": [SyncNorms()]}
    model = net(kind)
    running = build(size, made(strategy), folder, **{"max_epochs": 2, **options})
    running.fit(model, loader(batches), loader(4, seed=1))
    metrics = _numbers(running.callback_metrics)
    rates = [group["lr"] for optimizer in running.optimizers for group in optimizer.param_groups]
    tested = running.test(model, loader(4, seed=2), verbose=False)[0]
    return {
        "weights": lightning_zinf.full_state_dict(model),
        "metrics": metrics,
        "test": tested,
        "steps": running.global_step,
        "rates": rates,
        "seen": getattr(model, "seen", []),
        "chosen": getattr(model, "chosen", []),
    }


def unused(
    rank: int, size: int, folder: Path, strategy: Any, options: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[int, Any]]:
    """Train a layer on rank 0 alone, another on rank 1 alone, and a third nowhere; return the optimizer's steps too."""

    class Partly(Net):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.own[self.global_rank](x))

    model = net(Partly)
    running = build(size, made(strategy), folder, **options)
    running.fit(model, loader(8))
    state = running.optimizers[0].state_dict()["state"]
    return lightning_zinf.full_state_dict(model), {index: float(entry["step"]) for index, entry in state.items()}


def compiled(rank: int, size: int, folder: Path, strategy: Any, what: str) -> dict[str, Any]:
    """Fit with what is compiled, ``blocks``, the ``module`` or nothing; return the number of compiled graphs, too."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = net(Quiet)
    if what == "blocks":
        for part in model.blocks:
            part.forward = torch.compile(part.forward, backend=counter, fullgraph=True)
    running = build(size, made(strategy), folder, max_epochs=2)
    passed = torch.compile(model, backend=counter) if what == "module" else model
    running.fit(passed, loader(8), loader(4, seed=1))
    running.test(passed, loader(4, seed=2), verbose=False)
    return {"weights": lightning_zinf.full_state_dict(model), "seen": model.seen, "graphs": counter.frame_count}


def torch_sync_batch_norm(rank: int, size: int, folder: Path, strategy: Any) -> dict[str, Any]:
    """Validate with torch's own SyncBatchNorm, and try to train it."""
    model = net(Convolved)
    running = build(size, made(strategy), folder, sync_batchnorm=True, enable_checkpointing=False)
    metrics = running.validate(model, loader(4), verbose=False)[0]
    said = ""
    try:
        running.fit(model, loader(8))
    except Exception as error:
        said = str(error)
    return {"kind": type(model.norm).__name__, "metrics": metrics, "said": said}


# ---------------------------------------------------------------------- several calls


def every_entry_point(rank: int, size: int, folder: Path, strategy: Any) -> tuple[dict[str, Tensor], list[float]]:
    """Call one Trainer for one thing after the other."""
    model, running = net(), build(size, made(strategy), folder)
    results = [running.validate(model, loader(4), verbose=False)[0]["val_loss"]]
    running.fit(model, loader(8), loader(4))
    results.append(running.test(model, loader(4), verbose=False)[0]["test_loss"])
    predicted = running.predict(model, loader(4))
    assert predicted is not None
    results += [float(part.sum()) for part in predicted]
    running.fit_loop.max_epochs = 2
    running.fit(model, loader(8))
    results.append(running.validate(model, loader(4), verbose=False)[0]["val_loss"])
    return lightning_zinf.full_state_dict(model), results


def several_trainers(rank: int, size: int, folder: Path, strategies: list[Any]) -> list[dict[str, Tensor]]:
    """Fit one module with a Trainer for each strategy; return the weights after each."""
    model, found = net(), []
    for strategy in strategies:
        build(size, made(strategy), folder).fit(model, loader(8))
        found.append({k: v.clone() for k, v in lightning_zinf.full_state_dict(model).items()})
    return found


def taken_over(rank: int, size: int, folder: Path, first: Any, other: str) -> tuple[list[str], dict[str, Tensor]]:
    """Fit; have another strategy fit, test and fit again; fit again. Return what the others said, and the weights."""
    model, said = net(), []
    build(size, made(first), folder).fit(model, loader(8))
    for call in ("fit", "test", "fit"):
        try:
            getattr(build(size, other, folder), call)(model, loader(8))
        except ValueError as error:
            said.append(str(error))
    model.to(torch.device("cpu"))
    build(size, made(first), folder).fit(model, loader(8))
    return said, {k: v.clone() for k, v in lightning_zinf.full_state_dict(model).items()}


def backward_alone(rank: int, size: int, folder: Path, strategy: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fit, move the module, and have rank 1 look at gradients of its own; fit again."""
    model = net()
    build(size, made(strategy), folder).fit(model, loader(8))
    weights = {k: v.clone() for k, v in lightning_zinf.full_state_dict(model).items()}
    model.to(torch.device("cpu"))
    found: dict[str, Tensor] = {}
    if rank == 1:
        model.loss(next(iter(loader()))).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
    build(size, made(strategy), folder).fit(model, loader(8))
    return weights, found


def save_after_teardown(rank: int, size: int, folder: Path, strategy: Any) -> dict[str, Tensor]:
    """Save after ``fit``, again after ``test``, and use the module without a Trainer."""
    model, running = net(), build(size, made(strategy), folder)
    running.fit(model, loader(8))
    running.save_checkpoint(folder / "fitted.ckpt")
    running.test(model, loader(4), verbose=False)
    running.save_checkpoint(folder / "tested.ckpt")
    with torch.no_grad():
        direct = model(next(iter(loader())))
    return {**lightning_zinf.full_state_dict(model), "direct": direct}


# ---------------------------------------------------------------------- callbacks and checkpoints


def checkpoints(
    rank: int, size: int, folder: Path, strategy: Any, epochs: int, ckpt_path: str | None
) -> dict[str, Any]:
    """Fit with the callbacks that everybody has."""
    keeper = ModelCheckpoint(folder / "kept", "{epoch}", monitor="val_loss", save_top_k=2, save_last=True)
    model = net(Scheduled)
    running = build(size, made(strategy), folder, max_epochs=epochs, enable_checkpointing=True, callbacks=[keeper])
    running.fit(model, loader(8), loader(4, seed=1), ckpt_path=ckpt_path)
    return {
        "weights": lightning_zinf.full_state_dict(model),
        "steps": running.global_step,
        "best": keeper.best_model_path,
        "score": float(keeper.best_model_score),  # type: ignore[arg-type]
        "kept": sorted(keeper.best_k_models),
        "tested": running.test(ckpt_path="best", dataloaders=loader(4, seed=2), verbose=False)[0],
    }


class Late(Net):
    """Rank 1 comes late to the loading of a checkpoint, and with nothing gathered, while rank 0 needs no gathering."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        engine = self.trainer.strategy.engine
        if self.global_rank == 1 and self.trainer.state.fn == "test":
            engine.pager.forget_gathered()
            time.sleep(0.3)


def load_late(rank: int, size: int, folder: Path, strategy: Any) -> list[float]:
    """Return the loss of a checkpoint when it was saved, and when it was loaded again."""
    strategy = {**strategy, "memory": lightning_zinf.MemoryConfig(host_bytes=2**21)}
    model, running = net(Late), build(size, made(strategy), folder)
    running.fit(model, loader(8))
    running.save_checkpoint(folder / "first.ckpt")
    losses = [running.test(model, loader(4), verbose=False)[0]["test_loss"]]
    build(size, made(strategy), folder).fit(model, loader(8))
    again = build(size, made(strategy), folder)
    again.test(model, loader(4), verbose=False)  # every unit's weights are in a slot from here
    tested = again.test(model, loader(4), ckpt_path=folder / "first.ckpt", verbose=False)
    return [*losses, tested[0]["test_loss"]]


class Diverging(Net):
    """Its metric gets worse on rank 1 only, from the third epoch on."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        worse = self.current_epoch if self.global_rank == 1 and self.current_epoch > 1 else -self.current_epoch
        self.log("val_loss", float(worse))


def stop_early(rank: int, size: int, folder: Path, strategy: Any) -> tuple[int, int]:
    """Return the epoch and the step at which training stopped."""
    stop = EarlyStopping("val_loss", patience=0)
    options = {"callbacks": [stop], "num_sanity_val_steps": 0, "max_epochs": 6}
    running = build(size, made(strategy), folder, **options)
    running.fit(net(Diverging), loader(8), loader(4))
    return running.current_epoch, running.global_step


# ---------------------------------------------------------------------- data


class Summing(Net):
    """Sums over what a rank saw, besides a mean over all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.losses.append(float(loss))
        self.log("own_loss", loss, batch_size=len(batch))
        self.log("val_loss", loss, sync_dist=True, batch_size=len(batch))


def uneven_streams(rank: int, size: int, folder: Path, strategy: Any) -> dict[str, Any]:
    """Validate and predict streams that are longer on rank 1, within ``fit`` and without."""
    model = net(Summing)
    running = build(size, made(strategy), folder, num_sanity_val_steps=0)
    running.fit(model, loader(8), stream(18 if rank else 6, rank))
    inside, model.losses = model.losses, []
    metrics = running.validate(model, stream(18 if rank else 6, rank), verbose=False)[0]
    alone = model.losses
    predicted = running.predict(model, stream(3 if rank else 14, rank))
    return {
        "weights": lightning_zinf.full_state_dict(model),
        "inside": inside,
        "alone": alone,
        "metrics": metrics,
        "predicted": torch.cat(predicted),  # type: ignore[arg-type]
        "rows": torch.stack(list(Stream(3 if rank else 14, rank))),
    }


def predict_a_remainder(rank: int, size: int, folder: Path, strategy: Any) -> list[Tensor]:
    """Predict five rows by ones: Lightning's sampler gives three to rank 0 and two to rank 1."""
    rows = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    return build(size, made(strategy), folder).predict(net(), DataLoader(rows, batch_size=1))  # type: ignore[arg-type,return-value]


# ---------------------------------------------------------------------- the other package, and processes


def in_package(rank: int, size: int, folder: Path, package: str, strategy: str) -> tuple[dict[str, Tensor], str]:
    """Fit with a module and a Trainer of one of Lightning's two packages."""
    pl = importlib.import_module(package)

    class Model(pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = (self.inner(batch) - batch.sum(1, keepdim=True)).pow(2).mean()
            self.log("loss", loss, sync_dist=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    torch.manual_seed(1)
    model = Model()
    running = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=size,
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    running.fit(model, loader(8))
    return lightning_zinf.full_state_dict(model), type(running.strategy).__module__


def script(strategy: str, folder: Path) -> None:
    """Be a user's script: fit, test, and fit again with another Trainer; rank 0 saves what came of it."""
    torch.set_num_threads(1)
    model = net()
    running = build(2, strategy, folder)
    running.fit(model, loader(8), loader(4, seed=1))
    metrics = _numbers(running.callback_metrics)
    first = lightning_zinf.full_state_dict(model)
    tested = running.test(model, loader(4, seed=2), verbose=False)[0]
    build(2, strategy, folder).fit(model, loader(8))
    second = lightning_zinf.full_state_dict(model)
    if running.is_global_zero and os.environ.get("LOCAL_RANK", "0") == "0":
        found = {"first": first, "second": second, "metrics": metrics, "test": tested, "steps": running.global_step}
        torch.save(found, folder / "found.pt")


def as_script(rank: int, size: int, folder: Path, strategy: str) -> None:
    """Do what the script does, in ranks that are there already."""
    script(strategy, folder)
