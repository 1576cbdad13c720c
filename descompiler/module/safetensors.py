"""Weights in safetensors files, Hugging Face's format: names and shapes of the original, and no code to run.

Rank 0 writes a file (`descompiler.tensor_file`), block by block, as the rows come from the ranks that hold them: bytes
of one page that two machines write are not safe on every file system that they share. Each rank reads its own pieces.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.errors import InputError, UnsupportedError
from descompiler.layout.pieces import Pieces
from descompiler.module.distributed import DistributedModule
from descompiler.module.dynamic import tables_of
from descompiler.module.installed import module_of, ranks_for
from descompiler.module.state import is_extra, pieces_by_name
from descompiler.ops.local import plain
from descompiler.runtime.blocks import BLOCK_ELEMENTS, collect_rows
from descompiler.runtime.ranks import Ranks
from descompiler.tensor_file import NAMES, header_of

INDEX = ".index.json"
"""The end of the name of what says which of several files a tensor is in."""


END_BYTES = 1 << 16
"""Of the ends of a file, by which ranks know that they read the same one."""


def save_safetensors(
    module: nn.Module, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Save a compiled module's weights and buffers in a file that `safetensors.torch.load_file` reads.

    Collective: every rank calls it; rank 0 writes, and holds a block beside its own share. The file has what the
    original's ``state_dict`` has, so ``original.load_state_dict(load_file(path))`` takes it; what was at the path is
    there until the new file is whole. For optimisers and to go on with training there is `descompiler.save`.

    Parameters
    ----------
    module : DistributedModule, or a model that was compiled in place
    path : str or path
        A file on rank 0's machine.
    metadata : mapping of str to str, optional
        For the file's header, beside the format "pt".

    Raises
    ------
    InputError
        On every rank, if the file can't be written, or a tensor has a layout or dtype that the format lacks.
    UnsupportedError
        If the module has dynamic tables, or a ``state_dict`` with more than tensors.
    """
    compiled = module_of(module)
    _check_static(compiled)
    ranks = ranks_for(compiled, "des.save_safetensors")
    held = {n: plain(x).detach() for n, x in compiled.state_dict().items()}
    cut, path = pieces_by_name(compiled), Path(path)
    header, order = ranks.everywhere(lambda: _header(held, cut, dict(metadata or {})), "could not save")
    saving = path.with_name(path.name + ".saving")
    file = ranks.everywhere(lambda: _Out(path, saving) if ranks.rank == 0 else None, "could not save")

    def write(data: bytes | Tensor) -> None:
        if file is not None:
            file.write(data)

    write(header)
    for name in order:
        pieces = cut[name]
        for block in [held[name]] if pieces is None else _rows_of(held[name], pieces, ranks):
            write(block)
    ranks.everywhere(lambda: None if file is None else file.finish(), "could not save")


def _check_static(module: DistributedModule) -> None:
    if tables := tables_of(module):
        raise UnsupportedError(
            f"dynamic tables ({', '.join(tables)}) have as many rows as there are ids, which a file of the original's "
            "shapes does not say: use des.save and des.load, or des.full_state_dict"
        )
    if extra := [name for name in module.state_dict() if is_extra(name)]:
        raise UnsupportedError(
            f"a safetensors file holds tensors alone, and the model's state_dict has {', '.join(extra)}, of modules "
            "with a get_extra_state: use des.save and des.load, or des.full_state_dict"
        )


def _rows_of(mine: Tensor, pieces: Pieces, ranks: Ranks) -> Iterator[Tensor]:
    """The rows of an original, block by block, on rank 0. Collective."""
    if pieces.is_replicated or ranks.count == 1:
        if ranks.rank == 0:
            yield mine
        return
    step = max(1, min(BLOCK_ELEMENTS // max(prod(pieces.shape[1:]), 1), BLOCK_ELEMENTS >> 2))
    for start in range(0, pieces.shape[0], step):
        block = collect_rows(mine, pieces, ranks, start, min(start + step, pieces.shape[0]))
        if block is not None:
            yield block


def _header(
    held: Mapping[str, Tensor], cut: Mapping[str, Pieces | None], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """What stands in front of the tensors, and their order.

    Raises
    ------
    InputError
        For what the format lacks.
    """
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InputError(f"metadata of a safetensors file is text, and {key!r} is {value!r}")
    for name, x in held.items():
        if x.layout is not torch.strided or x.dtype not in NAMES:
            raise InputError(f"{name!r} is {x.layout}, {x.dtype}: a safetensors file can't hold that; use des.save")
    shapes = {n: tuple(x.shape) if (pieces := cut[n]) is None else pieces.shape for n, x in held.items()}
    return header_of({n: (x.dtype, shapes[n]) for n, x in held.items()}, {"format": "pt", **metadata})


class _Out:
    """A file that takes its name when it is whole. What fails is raised at the end: until then ranks send."""

    def __init__(self, path: Path, saving: Path) -> None:
        self.path, self.saving = path, saving
        self.error: OSError | None = None
        if path.is_dir():
            raise InputError(f"{path} is a directory: give the name of a file, as {path.name}/model.safetensors")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = saving.open("wb")
        except OSError as error:
            raise InputError(f"{path} can't be written: {error.strerror}") from error

    def write(self, data: bytes | Tensor) -> None:
        if self.error is not None:
            return
        if isinstance(data, Tensor):
            parts: Iterable[Any] = (
                x.cpu().contiguous().view(torch.uint8).numpy() for x in data.reshape(-1).split(BLOCK_ELEMENTS)
            )
        else:
            parts = [data]
        try:
            for part in parts:
                self.file.write(part)
        except OSError as error:
            self.error = error

    def finish(self) -> None:
        """Give the file its name.

        Raises
        ------
        InputError
            If it could not be written; what was there before is there.
        """
        try:
            with self.file:
                if self.error is not None:
                    raise self.error
                self.file.flush()
                os.fsync(self.file.fileno())
            self.saving.replace(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.saving.unlink()
            raise InputError(f"{self.path} was not written: {error.strerror}") from error


def load_safetensors(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load weights and buffers of the original from a safetensors file, or from several; each rank reads its pieces.

    Collective: every rank calls it, with a file that has what the original's ``state_dict`` has. Of a parameter with
    several names one is enough, as `safetensors.torch.save_model` writes it. Values take the module's dtypes.

    Parameters
    ----------
    module : DistributedModule, or a model that was compiled in place
    path : str or path
        A file, or the ``*.index.json`` of several beside it, as Hugging Face's libraries write large models.

    Raises
    ------
    InputError
        On every rank, if a file can't be read, or names or shapes are not those of the model; nothing is loaded then.
    RankError
        If ranks read other files.
    UnsupportedError
        If safetensors is not installed, or the module has dynamic tables, or a ``state_dict`` with more than tensors.
    """
    compiled = module_of(module)
    _check_static(compiled)
    ranks = ranks_for(compiled, "des.load_safetensors")
    held, cut = {n: plain(x) for n, x in compiled.state_dict().items()}, pieces_by_name(compiled)
    files = ranks.everywhere(lambda: _checked(Path(path), compiled, held, cut), "could not load")
    ranks.same("safetensors file", ranks.everywhere(lambda: _digest(files.values()), "could not load"), doing="load")

    def read() -> None:
        for name, file in files.items():
            pieces = cut[name] or Pieces.replicate(tuple(held[name].shape), ranks.count)
            for there, here in pieces.blocks(ranks.rank, BLOCK_ELEMENTS):
                with _opened(file) as opened:  # anew for each: what was read is not kept in memory
                    part = opened.get_slice(name)[there] if there else opened.get_tensor(name)
                held[name][here] = part.to(held[name])

    with torch.no_grad():
        ranks.everywhere(read, "could not load")


def _checked(
    path: Path, module: DistributedModule, held: Mapping[str, Tensor], cut: Mapping[str, Pieces | None]
) -> dict[str, Path]:
    """By name, the file that has it.

    Raises
    ------
    InputError
        If names or shapes are not those of the module.
    """
    files = _files(path)
    owners = {n: id(x) for n, x in (*module.named_parameters(remove_duplicate=False), *_buffers(module))}
    there = {owners.get(n, n) for n in files}
    missing = sorted(n for n in held if n not in files and owners.get(n, n) not in there)
    unexpected = sorted(set(files) - set(held))
    if missing or unexpected:
        raise InputError(f"{path} does not fit: missing {missing}, unexpected {unexpected}")
    for file in dict.fromkeys(files.values()):
        with _opened(file) as opened:
            for name in (n for n, f in files.items() if f == file):
                found, pieces = tuple(opened.get_slice(name).get_shape()), cut[name]
                shape = tuple(held[name].shape) if pieces is None else pieces.shape
                if found != shape:
                    raise InputError(f"{name!r} has shape {found} in {file}; the model's is {shape}")
    return files


def _digest(files: Iterable[Path]) -> str:
    """A number that tells files apart: of their sizes and ends. Each rank reads other parts of the middle."""
    result = 0
    for file in dict.fromkeys(files):
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            for position in (0, max(0, size - END_BYTES)):
                opened.seek(position)
                result = zlib.crc32(opened.read(END_BYTES), result)
        result = zlib.crc32(str(size).encode(), result)
    return f"{result:08x}"


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return module.named_buffers(remove_duplicate=False)


def _files(path: Path) -> dict[str, Path]:
    """The file of each tensor: the one at a path, or those that an index names."""
    if not path.name.endswith(INDEX):
        with _opened(path) as opened:
            return dict.fromkeys(opened.keys(), path)
    try:
        names = json.loads(path.read_bytes())["weight_map"]
        files = {str(n): path.with_name(str(file)) for n, file in names.items()}
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no index of safetensors files: {type(error).__name__}: {error}") from error
    for file in dict.fromkeys(files.values()):
        with _opened(file) as opened:
            if lacks := sorted({n for n, f in files.items() if f == file} ^ set(opened.keys())):
                raise InputError(f"{path} and {file} differ in {', '.join(lacks[:8])}")
    return files


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, checked by the library: its header, and that the file is as long as it says."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        library = "safetensors is not installed; pip install descompiler[safetensors]"
        raise UnsupportedError(f"load_safetensors: {library}") from error
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is no safetensors file that can be read: {error}") from error
