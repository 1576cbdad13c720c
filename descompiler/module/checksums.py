"""Checksums of a checkpoint's files, so that none is cut short, changed or another rank's without a word.

What `torch.distributed.checkpoint` writes has no check of its own: a file that takes another's place is read as if it
were that one. `CHECKSUMS` lies beside the files, and nothing of torch's reads it. Each rank sums the files that it
wrote; when they are read, ranks share them, and each file is looked at once.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

from descompiler.errors import InputError
from descompiler.runtime.ranks import Ranks

CHECKSUMS = ".checksums"
"""A file of JSON: by name, the size and the CRC-32 of each of the others."""


BLOCK_BYTES = 1 << 22
"""That are read at a time."""


def write_checksums(folder: Path, ranks: Ranks) -> None:
    """Sum the files that ranks have written. Collective."""

    def own() -> dict[str, tuple[int, int]]:
        names = [p.name for p in folder.glob(f"__{ranks.rank}_*")]
        return _sums(folder, [*names, ".metadata"] if ranks.rank == 0 else names)

    every = ranks.of_every(ranks.everywhere(own, "could not save"))
    text = json.dumps({name: sums for of_rank in every for name, sums in of_rank.items()})
    ranks.everywhere(lambda: (folder / CHECKSUMS).write_text(text) if ranks.rank == 0 else None, "could not save")


def check_sums(folder: Path, rank: int, count: int) -> None:
    """Raise unless all files are there, and this rank's share of them is as they were written.

    A checkpoint without sums, as users' own calls of torch write it, is taken as it is.

    Raises
    ------
    InputError
        Which file is another.
    """
    try:
        listed = json.loads((folder / CHECKSUMS).read_bytes())
        expected = {str(name): (int(size), int(crc)) for name, (size, crc) in listed.items()}
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / CHECKSUMS} can't be read: {type(error).__name__}: {error}") from error
    there = {p.name for p in folder.iterdir() if p.is_file()} - {CHECKSUMS}
    for names, what in ((set(expected) - there, "lacks"), (there - set(expected), "was written without")):
        if names:
            raise InputError(f"{folder} is not as it was saved: it {what} {', '.join(sorted(names)[:8])}")
    for name, sums in _sums(folder, sorted(expected)[rank::count]).items():
        if sums != expected[name]:
            raise InputError(
                f"{folder} is not as it was saved: {name} has {sums[0]:,} B of checksum {sums[1]:08x}, and had "
                f"{expected[name][0]:,} B of {expected[name][1]:08x}"
            )


def _sums(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    result = {}
    for name in names:
        size = crc = 0
        with (folder / name).open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                size, crc = size + len(block), zlib.crc32(block, crc)
        result[name] = size, crc
    return result
