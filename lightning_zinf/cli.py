"""The ``zinf`` command: plan a run, look into checkpoints, and turn them into files that anything loads."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning_zinf import __version__
from lightning_zinf.cli_bench import add_bench, bench
from lightning_zinf.cli_plan import add_plan, plan

_EXAMPLES = """\
examples:
  $ zinf inspect last.ckpt
  last.ckpt: 2 shards, 26,300,416 parameters in 25 tensors
  ...
  $ zinf verify last.ckpt
  last.ckpt: 4 files, 0.29 GiB, all checksums match
  $ zinf consolidate last.ckpt model.ckpt
  model.ckpt: 0.29 GiB; load it with load_from_checkpoint or Trainer.fit(ckpt_path=...)
"""


def _size(text: str) -> int:
    """Read a number of bytes such as ``512MB`` or ``2GiB``."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    try:
        value = int(float(number) * units[text[len(number) :].strip().lower()])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 512MB or 2GiB") from None
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not positive")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zinf",
        description="Tools of lightning-zinf: what fits, how fast, and sharded checkpoints.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lightning-zinf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    inspect = _add(
        commands,
        "inspect",
        "show what a checkpoint has",
        "  $ zinf inspect last.ckpt\n  last.ckpt: 2 shards, 26,300,416 parameters in 25 tensors",
    )
    inspect.add_argument("--params", action="store_true", help="list every parameter")
    _add(
        commands,
        "verify",
        "compare every file with its checksums",
        "  $ zinf verify last.ckpt\n  last.ckpt: 4 files, 0.29 GiB, all checksums match",
    )
    _add_consolidate(commands)
    _add_convert(commands)
    reshard = _add(
        commands,
        "reshard",
        "write a checkpoint again in another number of shards",
        "  $ zinf reshard last.ckpt one-shard.ckpt --shards 1",
    )
    reshard.add_argument("output", help="the folder to write")
    reshard.add_argument("--shards", type=int, required=True, metavar="N", help="number of shard files")
    add_plan(commands, _size)
    add_bench(commands)
    return parser


def _add(commands: Any, name: str, text: str, example: str) -> argparse.ArgumentParser:
    """Add a command that works on a checkpoint."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("checkpoint", help="folder of a sharded checkpoint, or a URL that fsspec opens")
    command.add_argument("--json", action="store_true", help="print JSON on stdout")
    return command


def _add_consolidate(commands: Any) -> None:
    consolidate = _add(
        commands,
        "consolidate",
        "write one Lightning .ckpt file, or the weights as safetensors",
        "  $ zinf consolidate last.ckpt model.ckpt\n  $ zinf consolidate last.ckpt hf/ --format safetensors",
    )
    option = consolidate.add_argument
    option("output", help="the file to write, or the folder for safetensors")
    option("--format", choices=("ckpt", "safetensors"), help="by default ckpt, or safetensors if output ends with /")
    option("--weights-only", action="store_true", help="leave out optimizers, loops and callbacks")
    option("--current", action="store_true", help="take the last step's weights, not ZinfEMA's average of them")
    option("--strip-prefix", default="", metavar="P", help="safetensors: only names that begin with P, without it")
    option("--max-shard-size", type=_size, default=5 * 10**9, metavar="SIZE", help="safetensors: of one file (5GB)")
    option("--memory-budget", type=_size, default=2**28, metavar="SIZE", help="most memory for tensors (256MiB)")
    option("--force", action="store_true", help="overwrite what is there")
    option("--no-verify", action="store_true", help="do not compare checksums first")
    option("--trust-pickle", action="store_true", help="load Python objects of any class, which may run code")


def _add_convert(commands: Any) -> None:
    convert = _add(
        commands,
        "convert",
        "convert to or from torch.distributed.checkpoint (FSDP2), or from DeepSpeed's ZeRO-1, 2 and 3",
        "  $ zinf convert last.ckpt fsdp2.ckpt --to dcp\n  fsdp2.ckpt: 0.29 GiB\n"
        "  $ zinf convert fsdp2.ckpt my.ckpt --from dcp --trust-pickle\n  my.ckpt: 0.29 GiB\n"
        "  $ zinf convert deepspeed.ckpt my.ckpt --from deepspeed --trust-pickle\n  my.ckpt: 0.29 GiB",
    )
    convert.add_argument("output", help="the folder to write")
    direction = convert.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=("dcp",), help="write this")
    direction.add_argument("--from", dest="origin", choices=("dcp", "deepspeed"), help="read this; it has pickles")
    convert.add_argument("--trust-pickle", action="store_true", help="load pickles, which may run code")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 for a failure, or 2 for wrong usage."""
    given = _parser().parse_args(arguments)
    from lightning_zinf.checkpoint.manifest import CheckpointError

    try:
        told, text = _COMMANDS[given.command](given)
    except (CheckpointError, OSError) as error:
        print(f"zinf {given.command}: {error}", file=sys.stderr)
        return 1
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "Unsupported" in line), str(error))
        print(f"zinf {given.command}: {reason}\nIf you trust {given.checkpoint}, say --trust-pickle", file=sys.stderr)
        return 1
    except _UsageError as error:
        print(f"zinf {given.command}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(told) if given.json else text)
    return 0


class _UsageError(Exception):
    """Arguments that do not go together."""


def _inspect(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from lightning_zinf.checkpoint.source import Checkpoint

    with Checkpoint(given.checkpoint) as source:
        manifest = source.manifest
        params = source.params()
    numel = sum(p.numel for p in params)
    nbytes = sum(info.nbytes for info in manifest.files)
    dtypes: dict[str, set[str]] = {}
    for buffer in manifest.buffers:
        for plane, dtype in buffer.planes.items():
            dtypes.setdefault(plane, set()).add(dtype)
    planes = {plane: "/".join(sorted(found)) for plane, found in dtypes.items()}
    told: dict[str, Any] = {
        "checkpoint": given.checkpoint,
        "shards": len(manifest.shards),
        "parameters": numel,
        "tensors": len(params),
        "bytes": nbytes,
        "planes": planes,
        "optimizers": [len(names) for names in manifest.optimizers],
        "versions": manifest.versions,
    }
    lines = [
        f"{given.checkpoint}: {len(manifest.shards)} shards, {numel:,} parameters in {len(params)} tensors",
        f"  size        {nbytes / 2**30:.2f} GiB in {len(manifest.files)} files",
        f"  planes      {', '.join(f'{plane} ({dtype})' for plane, dtype in planes.items())}",
        f"  optimizers  {', '.join(f'{len(n)} parameters' for n in manifest.optimizers) or 'none (weights only)'}",
        f"  written by  {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}",
    ]
    if given.params:
        told["params"] = [
            {
                "names": list(p.names),
                "shape": list(p.shape),
                "dtype": p.dtype,
                "buffer": p.places[0][0].name,
                "parts": len(p.places),
            }
            for p in params
        ]
        lines += [f"  {' = '.join(p.names)}  {list(p.shape)}  {p.dtype}" for p in params]
    return told, "\n".join(lines)


def _verify(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from lightning_zinf.checkpoint.source import Checkpoint

    with Checkpoint(given.checkpoint) as source:
        files = source.manifest.files
        nbytes = sum(info.nbytes for info in files)
        with _progress("Verifying", nbytes) as advance:
            for info in files:
                source.verify([info.path])
                advance(info.nbytes)
    told = {"checkpoint": given.checkpoint, "files": len(files), "bytes": nbytes, "ok": True}
    return told, f"{given.checkpoint}: {len(files)} files, {nbytes / 2**30:.2f} GiB, all checksums match"


def _consolidate(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from lightning_zinf.checkpoint.consolidate import to_ckpt, to_safetensors
    from lightning_zinf.checkpoint.source import Checkpoint

    kind = given.format or ("safetensors" if given.output.endswith(("/", ".safetensors")) else "ckpt")
    if kind == "safetensors" and given.output.endswith(".safetensors"):
        raise _UsageError("give a folder for safetensors: it may take several files")
    there = os.path.exists(given.output) and (kind == "ckpt" or any(os.scandir(given.output)))
    if there and not given.force:
        raise _UsageError(f"{given.output} is there already: give another name, or --force to overwrite it")
    if there and kind == "ckpt" and os.path.isdir(given.output):
        raise _UsageError(f"{given.output} is a folder: remove it first, or give another name")
    chunk = max(given.memory_budget // 4, 4096)
    with Checkpoint(given.checkpoint) as source:
        if not given.no_verify:
            with _progress("Verifying", sum(i.nbytes for i in source.manifest.files)) as advance:
                for info in source.manifest.files:
                    source.verify([info.path])
                    advance(info.nbytes)
        with _progress("Writing", sum(i.nbytes for i in source.manifest.files)) as advance:
            if kind == "ckpt":
                to_ckpt(
                    source,
                    given.output,
                    weights_only=given.weights_only,
                    current=given.current,
                    chunk_bytes=chunk,
                    trust_pickle=given.trust_pickle,
                    progress=advance,
                )
                files = [given.output]
            else:
                names = to_safetensors(
                    source,
                    given.output,
                    max_shard_bytes=given.max_shard_size,
                    strip_prefix=given.strip_prefix,
                    current=given.current,
                    chunk_bytes=chunk,
                    trust_pickle=given.trust_pickle,
                    progress=advance,
                )
                files = [os.path.join(given.output, name) for name in names]
    nbytes = sum(os.path.getsize(f) for f in files)
    how = "load it with load_from_checkpoint or Trainer.fit(ckpt_path=...)" if kind == "ckpt" else f"{len(files)} files"
    return {"files": files, "bytes": nbytes}, f"{given.output}: {nbytes / 2**30:.2f} GiB; {how}"


def _convert(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from lightning_zinf.checkpoint.convert import from_dcp, to_dcp
    from lightning_zinf.checkpoint.deepspeed import from_deepspeed
    from lightning_zinf.checkpoint.source import Checkpoint

    if os.path.exists(given.output):
        raise _UsageError(f"{given.output} is there already: give another name")
    if given.origin and not given.trust_pickle:
        what = {
            "dcp": "the metadata of torch.distributed.checkpoint is a pickle",
            "deepspeed": "DeepSpeed's files are pickles",
        }
        raise _UsageError(
            f"{what[given.origin]}, which can run code: if you trust {given.checkpoint}, say --trust-pickle"
        )
    notes: list[str] = []
    if given.origin == "dcp":
        from_dcp(given.checkpoint, given.output)
    elif given.origin:
        with _progress("Writing", _bytes_below(given.checkpoint)) as advance:
            notes = from_deepspeed(given.checkpoint, given.output, progress=advance)
    else:
        with Checkpoint(given.checkpoint) as source:
            source.verify([info.path for info in source.manifest.files])
            with _progress("Writing", sum(i.nbytes for i in source.manifest.files)) as advance:
                to_dcp(source, given.output, trust_pickle=given.trust_pickle, progress=advance)
    nbytes = _bytes_below(given.output)
    lines = [f"{given.output}: {nbytes / 2**30:.2f} GiB", *(f"  {note}" for note in notes)]
    return {"output": given.output, "bytes": nbytes, "notes": notes}, "\n".join(lines)


def _bytes_below(folder: str) -> int:
    return sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(folder) for name in names)


def _reshard(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from lightning_zinf.checkpoint.reshard import cut, reshard
    from lightning_zinf.checkpoint.source import Checkpoint

    if given.shards < 1:
        raise _UsageError(f"--shards must be at least 1, got {given.shards}")
    if os.path.exists(given.output):
        raise _UsageError(f"{given.output} is there already: give another name")
    with Checkpoint(given.checkpoint) as source:
        try:
            cut(source.manifest.buffers, given.shards)
        except ValueError as error:
            raise _UsageError(f"--shards: {error}") from error
        source.verify([info.path for info in source.manifest.files])
        with _progress("Writing", sum(i.nbytes for i in source.manifest.files)) as advance:
            reshard(source, given.output, given.shards, progress=advance)
    return {"output": given.output, "shards": given.shards}, f"{given.output}: {given.shards} shards"


def _asked_well(
    command: Callable[[argparse.Namespace], tuple[dict[str, Any], str]], given: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    """Run a command whose ValueErrors are all about what it was given."""
    try:
        return command(given)
    except ValueError as error:
        raise _UsageError(str(error)) from error


_COMMANDS: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], str]]] = {
    "inspect": _inspect,
    "verify": _verify,
    "consolidate": _consolidate,
    "convert": _convert,
    "reshard": _reshard,
    "plan": lambda given: _asked_well(plan, given),
    "bench": lambda given: _asked_well(bench, given),
}


@contextmanager
def _progress(text: str, total: int) -> Iterator[Any]:
    """Show a bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


if __name__ == "__main__":
    sys.exit(main())
