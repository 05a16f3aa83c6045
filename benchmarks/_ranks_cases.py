"""What the ranks of benchmarks/ranks.py train, and the processes that they are.

Note. A crew is the processes of one case. They stay while the other cases have their turns: starting Python and torch
is paid once, and a case cannot disturb another's heap or thread pools. A crew that has no turn waits on a pipe and
uses no processor.
"""

from __future__ import annotations

import contextlib
import cProfile
import functools
import io
import multiprocessing.connection
import pstats
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F  # noqa: N812
from _process import peak_rss
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "gpt"))
from model import GPT

PATIENCE = timedelta(seconds=120)
BATCHES = 8
"""Batches of a rank, again and again: losses then fall, and a difference between cases would show."""
LR = 1e-4


class CrewError(RuntimeError):
    """Some rank of a case raised."""


@dataclass(frozen=True)
class Case:
    """How a model is trained.

    Attributes:
        name: For the tables.
        kind: ``ddp``, ``fsdp2``, ``zinf``, or ``plain``: torch alone, one rank.
        stage: ZeRO stage of zinf.
        offload: Where zinf keeps weights and state.
        world: Number of ranks; 0 is one process without a process group.
    """

    name: str
    kind: str
    stage: int = 3
    offload: str = "none"
    world: int = 2


@dataclass(frozen=True)
class Shape:
    """The model and its batches.

    Attributes:
        kind: ``gpt`` or ``tiny``: many small blocks, where all that is measured is what happens around them.
    """

    kind: str
    layers: int
    hidden: int
    batch: int
    seq: int = 0
    vocab: int = 0


class Tiny(nn.Module):
    """A row of small linear layers."""

    def __init__(self, layers: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x).tanh()
        return x


def make(shape: Shape) -> nn.Module:
    """Build the model; every rank and case gets the same values."""
    torch.manual_seed(0)
    if shape.kind == "tiny":
        return Tiny(shape.layers, shape.hidden)
    return GPT(shape.vocab, shape.seq, shape.hidden, shape.layers, max(1, shape.hidden // 64))


def batches(shape: Shape, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    if shape.kind == "tiny":
        return [torch.randn(shape.batch, shape.hidden, generator=generator) for _ in range(BATCHES)]
    size = (shape.batch, shape.seq + 1)
    return [torch.randint(shape.vocab, size, generator=generator) for _ in range(BATCHES)]


def loss_of(model: nn.Module, shape: Shape, batch: Tensor) -> Tensor:
    if shape.kind == "tiny":
        loss: Tensor = model(batch).square().mean()
        return loss
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


# ---------------------------------------------------------------------- one rank


class Plain:
    """Trains as torch does: alone, with DDP, or with FSDP2."""

    def __init__(self, case: Case, shape: Shape) -> None:
        self.model = make(shape)
        self.loss = functools.partial(loss_of, shape=shape)
        if case.kind == "ddp":
            self.model = nn.parallel.DistributedDataParallel(self.model)
        elif case.kind == "fsdp2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (case.world,))
            for block in self.model.blocks:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        # Built after the model was cut: FSDP2 puts other parameters in the place of the first ones.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)

    def backward(self, batch: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(self.model, batch=batch)
        loss.backward()
        return float(loss.detach())

    def update(self) -> None:
        self.optimizer.step()

    def kept(self) -> dict[str, int]:
        """Return the bytes of weights, gradients and state on this rank, as tensors: DDP's buckets are not seen."""
        params = list(self.model.parameters())
        states = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor) and v.ndim]
        grads = [p.grad for p in params if p.grad is not None]
        return {"weights": _local(params), "gradients": _local(grads), "state": _local(states), "slots": 0}

    def counters(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def _local(tensors: list[Any]) -> int:
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)


class Zinf:
    """Trains with the engine, driven as the strategy drives it."""

    def __init__(self, case: Case, shape: Shape, folder: str) -> None:
        from lightning_zinf.comm.group import ranks_of
        from lightning_zinf.config import PartitionConfig
        from lightning_zinf.engine.construction import paged_construction
        from lightning_zinf.engine.partition import partition
        from lightning_zinf.optim.binding import OptimizerBinding
        from lightning_zinf.optimizers import planes_of, rules_of

        offload: Any = case.offload
        config = PartitionConfig(
            device=torch.device("cpu"),
            offload_params=offload,
            offload_optimizer=offload,
            nvme_paths=(folder,),
            stage=case.stage,
        )
        ranks = ranks_of(None, PATIENCE, case.world) if case.world else None
        with paged_construction(config, max(1, case.world), ranks):  # as for configure_model
            self.model = make(shape)
        self.loss = functools.partial(loss_of, shape=shape)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)
        planes = planes_of([self.optimizer], rules_of([self.optimizer]))
        self.engine = partition(self.model, config, list(self.model.parameters()), ranks, planes)
        self.binding = OptimizerBinding(self.optimizer, self.engine)

    def backward(self, batch: Tensor) -> float:
        self.optimizer.zero_grad()
        with self.engine.frame("train") as outputs:
            loss = self.loss(self.model, batch=batch)
            outputs.append(loss)
        self.engine.before_backward()
        loss.backward()
        self.engine.after_backward()
        return float(loss.detach())

    def update(self) -> None:
        self.optimizer.step()

    def kept(self) -> dict[str, int]:
        """Return the bytes that the engine keeps, by its own account; slots are the budget of gathered weights."""
        from lightning_zinf.engine.partition import residency

        pages = self.engine.context.pages()
        (_, _, weights), *others = residency(self.engine)
        slots = sum(nbytes for _, _, nbytes in pages)
        buffers = [b for unit in self.engine.units for b in unit.buffers]
        gradients = sum(t.nbytes for b in buffers for t in _gradients(b))
        state = sum(nbytes for _, _, nbytes in others) - slots
        return {"weights": weights, "gradients": gradients, "state": state, "slots": slots}

    def counters(self) -> dict[str, float]:
        rounds = self.engine.rounds
        return {**self.engine.counters.snapshot(), "rounds": 0 if rounds is None else rounds.count}

    def close(self) -> None:
        self.engine.flush()
        self.engine.context.close()


def _gradients(buffer: Any) -> list[Tensor]:
    """Return the gradients of a buffer between backward and step; no account of the engine's has them."""
    from lightning_zinf.engine.guard import KeptGradient

    kept = buffer.gradients
    found = [p.grad for p in buffer.params if p.grad is not None and not isinstance(p.grad, KeptGradient)]
    found += [*getattr(kept, "_sums", {}).values(), *getattr(kept, "_hidden", {}).values()]
    shard = getattr(kept, "_shard", None)
    return found if shard is None else [*found, shard]


class Worker:
    """One rank of a case; its methods are what a crew can be asked for."""

    def __init__(self, rank: int, case: Case, folder: str) -> None:
        self.rank = rank
        self.case = case
        self.folder = folder
        self.number = 0
        self.running: Plain | Zinf

    def _make(self, shape: Shape) -> Plain | Zinf:
        return Zinf(self.case, shape, self.folder) if self.case.kind == "zinf" else Plain(self.case, shape)

    def build(self, shape: Shape) -> None:
        """Build the model, and train a smaller one first: what imports and first calls take is no part of it."""
        self.number = 0
        self.data = batches(shape, self.rank)
        self.running = self._make(replace(shape, layers=2, hidden=64))
        small = batches(replace(shape, hidden=64), self.rank)
        for batch in small[:2]:
            self.running.backward(batch)
            self.running.update()
        self.running.close()
        del self.running
        self.baseline = peak_rss(reset=True)
        self.running = self._make(shape)
        self.peak_building = peak_rss() - self.baseline

    def _step(self) -> float:
        loss = self.running.backward(self.data[self.number % BATCHES])
        self.running.update()
        self.number += 1
        return loss

    def steps(self, count: int) -> dict[str, Any]:
        """Train; return the seconds and the loss of each step, and what each step moved, in the mean."""
        if self.case.world:
            dist.barrier()
        times, losses, before = [], [], self.running.counters()
        for _ in range(count):
            start = time.perf_counter()
            losses.append(self._step())
            times.append(time.perf_counter() - start)
        moved = {name: (value - before[name]) / count for name, value in self.running.counters().items()}
        return {"times": times, "losses": losses, "moved": moved}

    def memory(self, count: int) -> dict[str, Any]:
        """Train; return what this rank keeps between backward and step, and its peaks above the baseline."""
        peak_rss(reset=True)
        moved = self.steps(count)["moved"]
        self.running.backward(self.data[0])
        kept = self.running.kept()
        self.running.update()
        return {**kept, "moved": moved, "building": self.peak_building, "training": peak_rss() - self.baseline}

    def profile(self, count: int, lines: int) -> str:
        """Train, on rank 0 under cProfile; return the functions that took longest, as milliseconds of a step."""
        if self.rank:
            self.steps(count)
            return ""
        profile = cProfile.Profile()
        profile.runcall(self.steps, count)
        stats = pstats.Stats(profile, stream=io.StringIO()).stats  # type: ignore[attr-defined]
        rows = sorted(stats.items(), key=lambda row: -row[1][2])[:lines]
        text = [f"{'own ms':>9}{'with calls':>12}{'calls':>9}  of a step"]
        for (file, line, name), (_, calls, own, total, _) in rows:
            place = f"{Path(file).name}:{line} " if line else ""
            figures = f"{1e3 * own / count:>9.3f}{1e3 * total / count:>12.3f}{calls / count:>9.1f}"
            text.append(f"{figures}  {place}{name}")
        return "\n".join(text)

    def close(self) -> None:
        if hasattr(self, "running"):
            self.running.close()
        if self.case.world:
            dist.destroy_process_group()


# ---------------------------------------------------------------------- the processes


class Crew:
    """The processes of one case, a thread each.

    Args:
        case: What they do.
        folder: For NVMe files.
    """

    def __init__(self, case: Case, folder: str) -> None:
        self.case = case
        world = max(1, case.world)
        self._store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
        context = mp.get_context("spawn")
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, case, folder, self._store.port, theirs), daemon=True)
            process.start()
            theirs.close()  # else the end of the process would not be seen
            self._pipes.append(ours)
            self._processes.append(process)

    def call(self, method: str, *args: Any, timeout: float = 300.0) -> list[Any]:
        """Have every rank call a method of its worker; return what each returned.

        Raises:
            CrewError: With the traceback of the rank that failed first. The crew is gone then.
        """
        for pipe in self._pipes:
            pipe.send((method, args))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < len(self._pipes):
            waiting = [p for r, p in enumerate(self._pipes) if r not in answers]
            ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"no answer within {timeout:g} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    good, answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    good, answers[rank] = False, "the process has died"
                if not good:
                    self._fail(f"rank {rank}: {answers[rank]}")
        return [answers[rank] for rank in range(len(self._pipes))]

    def _fail(self, reason: str) -> None:
        for process in self._processes:
            process.kill()
        raise CrewError(f"{self.case.name}: {reason}")

    def close(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(20)
            process.kill()


def _serve(rank: int, case: Case, folder: str, port: int, pipe: Any) -> None:
    from lightning_zinf.ops import set_num_threads

    torch.set_num_threads(1)
    set_num_threads(1)
    if case.world:
        store = dist.TCPStore("127.0.0.1", port, case.world, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=case.world, timeout=PATIENCE)
    worker = Worker(rank, case, folder)
    while (asked := pipe.recv()) is not None:
        method: Callable[..., Any] = getattr(worker, asked[0])
        try:
            pipe.send((True, method(*asked[1])))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            return
    worker.close()
