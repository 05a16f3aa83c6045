"""Training text that every Python installation has: the sources and help texts of its own standard library.

One token is one byte, so there is no tokenizer to download or to train.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

# Test suites and character tables are large, repetitive and unlike the code one would want to see sampled.
SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}


def library_documents() -> Iterator[tuple[bytes, Path | None]]:
    """Yield, for every document of the standard library, its key and its path (None for a help topic)."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix().encode(), path
    for topic in sorted(help_topics()):
        yield f"topics/{topic}".encode(), None


def help_topics() -> dict[str, str]:
    """Return the texts of ``help("...")``; some distributions leave them out."""
    try:
        # pydoc_data is not in the type stubs, hence no import statement.
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return {}
    return topics


def read_library(max_bytes: int, val_percent: int) -> tuple[Tensor, Tensor]:
    """Read at most ``max_bytes`` of the standard library.

    A file belongs to the train or the validation part by the hash of its name: which part does not depend on the
    machine, on the order of a folder or on how much is read. For the same reason the files are taken in the order
    of their hashes, so that a small ``max_bytes`` gets a fair sample and not only the modules from A to C.

    Args:
        max_bytes: bound on the bytes of both parts together.
        val_percent: share of the files for validation.

    Returns:
        The bytes of the train part and of the validation part.
    """
    topics = help_topics()
    documents = sorted((hashlib.blake2b(key, digest_size=8).digest(), key, path) for key, path in library_documents())
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    left = max_bytes
    for digest, key, path in tqdm(documents, desc="Reading the standard library", unit="file"):
        text = path.read_bytes() if path else topics[key.decode().removeprefix("topics/")].encode()
        parts[int.from_bytes(digest, "big") % 100 < val_percent].append(text[:left])
        left -= len(text)
        if left <= 0:
            break
    train, val = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts if part)
    return train, val


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text, each with the same window one byte later: the bytes to predict.

    Args:
        text: the bytes, as one uint8 tensor.
        block_size: length of a window.
        starts: where the windows begin.
    """

    def __init__(self, text: Tensor, block_size: int, starts: Tensor) -> None:
        self.text = text
        self.block_size = block_size
        self.starts = starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = int(self.starts[index])
        window = self.text[start : start + self.block_size + 1].long()
        return window[:-1], window[1:]


class PythonLibrary(LightningDataModule):
    """Random windows of the standard library of the running interpreter.

    Args:
        block_size: length of a window in bytes.
        batch_size: windows in a batch, per rank.
        max_bytes: how much of the library to read at most; the whole is about 10 MB.
        val_percent: share of the files that is held out for validation.
        val_windows: windows in a validation run.
        epoch_windows: training windows in an epoch, drawn once and shuffled anew for each epoch.
        seed: of the draw of the windows.
    """

    def __init__(
        self,
        block_size: int = 128,
        batch_size: int = 16,
        max_bytes: int = 16_000_000,
        val_percent: int = 10,
        val_windows: int = 128,
        epoch_windows: int = 16_000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.block_size = block_size
        self.batch_size = batch_size
        self.max_bytes = max_bytes
        self.val_percent = val_percent
        self.val_windows = val_windows
        self.epoch_windows = epoch_windows
        self.seed = seed
        self.train_text: Tensor | None = None
        self.val_text: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Read the text, once, in each process: it is small, and every process has the same library."""
        if self.train_text is not None:
            return
        self.train_text, self.val_text = read_library(self.max_bytes, self.val_percent)
        shortest = min(len(self.train_text), len(self.val_text))
        if shortest <= self.block_size:
            raise ValueError(f"max_bytes={self.max_bytes} leaves a part of {shortest} bytes; raise it")

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return batches of random windows.

        Every rank draws the same windows; Lightning's distributed sampler then gives each rank its share.
        """
        assert self.train_text is not None
        generator = torch.Generator().manual_seed(self.seed)
        starts = torch.randint(len(self.train_text) - self.block_size, (self.epoch_windows,), generator=generator)
        windows = Windows(self.train_text, self.block_size, starts)
        return DataLoader(windows, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the same windows every time, spread evenly over the held-out files."""
        assert self.val_text is not None
        starts = torch.linspace(0, len(self.val_text) - self.block_size - 1, self.val_windows).long()
        return DataLoader(Windows(self.val_text, self.block_size, starts), self.batch_size)
