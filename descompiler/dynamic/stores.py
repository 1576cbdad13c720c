"""Where checkpoints and updates of tables lie: names and bytes, each of which is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from descompiler.errors import InputError

WRITING = ".writing"
"""The end of the name of a file that is being written."""


class Store(Protocol):
    """Bytes by name, for owners that write each their own, and for readers."""

    def names(self) -> list[str]:
        """All names, also of what was being written when a process died."""
        ...

    def read(self, name: str) -> bytes:
        """What a name has.

        Raises
        ------
        FileNotFoundError
            If it is not there.
        InputError
            If it can't be read.
        """
        ...

    def write(self, name: str, parts: Iterable[Any]) -> tuple[int, int]:
        """Let a name have these bytes, in the place of what it had; their number and CRC-32.

        Raises
        ------
        InputError
            If they can't be written; the name has what it had.
        """
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Names that are not there any more; those that were not are passed over."""
        ...


def store_of(place: str | os.PathLike[str] | Store) -> Store:
    """The store of a place: a directory, if it is a path."""
    return Folder(place) if isinstance(place, str | os.PathLike) else place


class Summed:
    """Bytes that pass, counted and summed."""

    def __init__(self) -> None:
        self.bytes = self.crc = 0

    def __call__(self, part: Any) -> Any:
        self.bytes, self.crc = self.bytes + len(part), zlib.crc32(part, self.crc)
        return part


class Folder:
    """Files of a directory. A file is written under another name, brought to the disk, and then takes its own.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as path:
    ...     folder = Folder(path)
    ...     _ = folder.write("a", [b"xy", b"z"])
    ...     folder.names(), folder.read("a")
    (['a'], b'xyz')
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.path))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"{self.path} can't be read: {error.strerror}") from error

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise InputError(f"{self.path / name} can't be read: {error.strerror}") from error

    def write(self, name: str, parts: Iterable[Any]) -> tuple[int, int]:
        writing, passed = self.path / (name + WRITING), Summed()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with writing.open("wb") as file:
                for part in parts:
                    file.write(passed(part))
                file.flush()
                os.fsync(file.fileno())
            os.replace(writing, self.path / name)
            self._settle()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(writing)
            raise InputError(f"{self.path / name} was not written: {error.strerror}") from error
        return passed.bytes, passed.crc

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                os.unlink(self.path / name)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise InputError(f"{self.path / name} can't be removed: {error.strerror}") from error

    def _settle(self) -> None:
        """Bring the directory's names to the disk."""
        opened = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
