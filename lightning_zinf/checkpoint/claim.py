"""Two that save to one path.

Note [Claims]
~~~~~~~~~~~~~
Files of a save have names of their own, so two saves do not write over each other. But after its commit each removes
what it finds to be left over, and that may be what another is about to name in its manifest. So rank 0 holds a lock on
the folder (``flock``, which the system takes back from a process that dies) from the beginning to the commit, and who
comes second is told. Where there are no such locks, on object stores and some network file systems, a save looks before
its commit whether all its files are still there: then the second commit fails, and the first one's checkpoint stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Sequence

from lightning_zinf.checkpoint.folder import Folder
from lightning_zinf.checkpoint.manifest import FileInfo


class Claim:
    """The right to save to a folder, which one process has at a time; it ends with this object, if not before.

    Args:
        folder: The folder, which is there.

    Raises:
        BlockingIOError: If somebody else is saving to it.
    """

    def __init__(self, folder: Folder) -> None:
        self._handle: int | None = None
        self._folder = folder
        if not folder.local:
            return
        handle = os.open(folder.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise BlockingIOError(
                f"another run is saving to {folder.url} at this moment: give each run a folder of its own"
            ) from None
        except OSError:  # a file system without locks
            os.close(handle)
        else:
            self._handle = handle

    def check(self, files: Sequence[FileInfo]) -> None:
        """Look whether files are still as they were written.

        Args:
            files: What is about to be committed.

        Raises:
            FileNotFoundError: If somebody else has removed or changed one.
        """
        for info in files:
            try:
                size = self._folder.fs.size(self._folder.at(info.path))
            except FileNotFoundError:
                size = None
            if size != info.nbytes:
                raise FileNotFoundError(
                    f"{self._folder.url}/{info.path} is gone: another run saves to this folder. What that one saved "
                    "stays; give each run a folder of its own"
                )

    def release(self) -> None:
        """Give the right back."""
        if self._handle is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._handle, fcntl.LOCK_UN)  # children that were forked meanwhile have the handle too
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        """Give it back, whatever happened."""
        self.release()
