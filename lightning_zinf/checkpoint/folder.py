"""Where a checkpoint is: a folder on this machine or on any file system that fsspec knows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec


class Folder:
    """A folder on any file system that fsspec knows.

    Args:
        path: A local path or a URL such as ``s3://bucket/run/step.ckpt``.
        storage_options: Options for the file system.
    """

    def __init__(self, path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = os.fspath(path).rstrip("/")
        self.fs, self.path = fsspec.core.url_to_fs(self.url, **(storage_options or {}))
        self.local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def at(self, name: str) -> str:
        """Return the path of a file."""
        return f"{self.path}/{name}"

    def put_aside(self, token: str) -> str:
        """Rename a file that has the folder's name, if there is one, and return its new path, or ""."""
        if not self.local or not os.path.isfile(self.path):
            return ""
        aside = f"{self.path}.replaced-{token}"
        os.rename(self.path, aside)
        return aside

    def put_back(self, aside: str) -> None:
        """Undo :meth:`put_aside`; the folder must be empty, or not there."""
        if os.path.isdir(self.path):
            os.rmdir(self.path)
        os.rename(aside, self.path)

    def make(self) -> None:
        """Make the folder."""
        self.fs.makedirs(self.path, exist_ok=True)

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return bool(self.fs.exists(self.at(name)))

    def names(self) -> list[str]:
        """Return the names of all files."""
        return [str(entry).rsplit("/", 1)[-1] for entry in self.fs.ls(self.path, detail=False)]

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        try:
            return bytes(self.fs.cat_file(self.at(name)))
        except OSError as error:
            raise named(error, f"{self.url}/{name}") from error

    def replace(self, name: str, content: bytes) -> None:
        """Write a file so that at every instant there is the old one or the new one."""
        if not self.local:
            self.fs.pipe_file(self.at(name), content)  # object stores show an object when it is complete
            return
        temporary = f"{self.at(name)}.new"
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.at(name))
        self.sync()

    def link(self, source: Folder, name: str) -> None:
        """Have a file of another local folder here too: the same one where the file system can, else a copy."""
        try:
            os.link(source.at(name), self.at(name))
        except OSError:
            shutil.copyfile(source.at(name), self.at(name))
            with open(self.at(name), "rb+") as file:
                os.fsync(file.fileno())

    def sync(self) -> None:
        """Have the names of new files on disk."""
        if self.local:
            handle = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def remove(self, names: Sequence[str]) -> None:
        """Remove files that may be there."""
        for name in names:
            if self.exists(name):
                self.fs.rm_file(self.at(name))


def named(error: OSError, where: str) -> OSError:
    """Return an error that says which file it is about; what the system says of reading and writing does not."""
    if error.filename is not None or error.errno is None:
        return error
    return OSError(error.errno, error.strerror, where)  # of the class that the number stands for


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is on this machine's file systems."""
    return "://" not in os.fspath(path) or os.fspath(path).startswith("file://")


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return a local path of a path or ``file://`` URL."""
    return Path(os.fspath(path).removeprefix("file://"))
