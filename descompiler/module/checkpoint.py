"""Checkpoints that know no world size: `torch.distributed.checkpoint` of a compiled module and its optimisers.

Names and shapes are the original's, and each rank writes its own pieces: what N ranks have saved under one plan is
loaded by M under another, or by the original in one process, the state of optimisers included.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from descompiler.errors import DescompilerError, InputError, UnsupportedError
from descompiler.module.checksums import check_sums, write_checksums
from descompiler.module.distributed import DistributedModule
from descompiler.module.dynamic import tables_of
from descompiler.module.dynamic_saved import SavedTables, aside, check_names, has_others, to_save
from descompiler.module.installed import ranks_for
from descompiler.runtime.ranks import Ranks

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


BEFORE, SAVING = ".before", ".saving"
"""Ends of the names of what is replaced by a checkpoint, and of one that is being written."""


MODULE, OPTIMIZERS, VALUES = "app.module.", "app.optimizers.", "app.values."


_DESCRIPTIONS = """
    BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata
    _MEM_FORMAT_ENCODING
"""


DESCRIBES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _DESCRIPTIONS.split()),
    *(("torch", n) for n, x in vars(torch).items() if isinstance(x, torch.dtype)),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
}
"""What the index of a checkpoint may call. A name with dots would lead on to what a module imports."""


class TrainingState(Stateful):
    """A module and its optimisers, for `torch.distributed.checkpoint`: ``dcp.save({"app": state}, checkpoint_id=...)``.

    Parameters
    ----------
    module : DistributedModule, a model that was compiled in place, or the original
    optimizers : torch.optim.Optimizer or sequence of them, optional
    values : mapping, optional
        What else is saved; what was loaded is found here.
    """

    def __init__(self, module: nn.Module, optimizers: Optimizers = None, values: Mapping[str, Any] | None = None):
        one = isinstance(optimizers, torch.optim.Optimizer)
        self.module, self.values = module, dict(values or {})
        self.optimizers: list[Any] = [optimizers] if one else list(optimizers or ())  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """By the original's names; of what is cut, this rank's pieces."""
        named = _named_parts(self.module)
        tables = to_save(named, self.optimizers, _ranks(named))
        return self._beside_tables() | ({"dynamic": tables} if tables else {})

    def _beside_tables(self) -> dict[str, Any]:
        """What is saved beside dynamic tables."""
        named = _named_parts(self.module)
        with aside(named, self.optimizers):
            several = [(i, o) for i, o in enumerate(self.optimizers) if has_others(o)]
            states = {str(i): get_optimizer_state_dict(named, o) for i, o in several}
            return {"module": get_model_state_dict(named), "optimizers": states, "values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `torch.distributed.checkpoint.load` has read into `state_dict`."""
        named = _named_parts(self.module)
        if tables_of(named):
            raise UnsupportedError("dynamic tables are read by des.load: how many rows they have is in the checkpoint")
        self._load_beside_tables(state)

    def _load_beside_tables(self, state: Mapping[str, Any]) -> None:
        named = _named_parts(self.module)
        with aside(named, self.optimizers):
            set_model_state_dict(named, state["module"])
            for i, optimizer in enumerate(self.optimizers):
                if has_others(optimizer):  # of parameters that had no gradient yet there is no state
                    options = StateDictOptions(strict=False)
                    set_optimizer_state_dict(named, optimizer, state["optimizers"][str(i)], options=options)
        self.values = dict(state["values"])


def _named_parts(module: nn.Module) -> nn.Module:
    """What has the parameters under the original's names."""
    named: nn.Module = vars(module).get("_descompiler", module)
    return named


def save(
    module: nn.Module, optimizers: Optimizers, path: str | os.PathLike[str], *, step: int = 0, **values: Any
) -> None:
    """Save a compiled module and its optimisers; what was at the path is there until the new one is whole.

    Collective: every rank calls it, with one path of a file system that all see. The directory is a checkpoint of
    `torch.distributed.checkpoint` of ``{"app": TrainingState(module, optimizers, {"step": step, **values})}``.

    Parameters
    ----------
    module : DistributedModule, a model that was compiled in place, or an original in one process
    optimizers : torch.optim.Optimizer or sequence of them, or None
    path : str or path
        A directory, which is replaced if it is a checkpoint.
    step : int
    **values
        Numbers, strings and tensors, the same on every rank.

    Raises
    ------
    InputError
        On every rank, if something else is at the path, or it can't be written.
    """
    for name, x in values.items():
        if not isinstance(x, Tensor | int | float | str | None):
            raise InputError(f"{name} is a {type(x).__name__}: a checkpoint holds numbers, strings and tensors beside")
    path, state = Path(path), TrainingState(module, optimizers, {"step": step, **values})
    ranks = _ranks_of(module, "des.save")
    first = ranks.rank == 0
    ranks.everywhere(lambda: _make_room(path) if first else None, "could not save")
    saving = path.with_name(path.name + SAVING)

    def write() -> None:
        with _named(f"{path} was not written"):
            dcp.save({"app": state}, checkpoint_id=saving, process_group=ranks.group)

    ranks.everywhere(write, "could not save")
    write_checksums(saving, ranks)
    ranks.everywhere(lambda: _replace(path, saving) if first else None, "could not save")


def load(module: nn.Module, optimizers: Optimizers, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load what `save` has saved, on any number of ranks and under any plan; training goes on as if it had not stopped.

    Collective: every rank calls it. The original loads it too, in one process.

    Returns
    -------
    dict
        ``step``, and the other values that were saved.

    Raises
    ------
    InputError
        On every rank, if there is no checkpoint, a file of it is missing, cut short or another one, or it is one of
        another model or of other optimisers.
    """
    state, ranks = TrainingState(module, optimizers), _ranks_of(module, "des.load")
    room = state._beside_tables()

    def look() -> SafeReader:
        """Whether it can be loaded: until every rank has said so, none reads."""
        found = whole_at(Path(path))
        if found is None:
            raise InputError(f"{path} is no checkpoint: it holds no .metadata; give the directory that des.save wrote")
        check_sums(found, ranks.rank, ranks.count)
        reader = SafeReader(found)
        metadata = reader.read_metadata()
        saved = set(metadata.state_dict_metadata)
        check_names(_named_parts(module), saved)
        _check_no_more(path, saved, room)
        room["values"] = dict(_values_of(metadata))
        _leave_out_unsaved(room["optimizers"], saved)
        return reader

    def read_into(reader: SafeReader, some: dict[str, Any]) -> None:
        dcp.load({"app": some}, storage_reader=reader, planner=_SafePlanner(), process_group=ranks.group)

    def read(reader: SafeReader) -> None:
        named = _named_parts(module)
        with _named(f"{path} is no checkpoint of this model and these optimisers"):
            of = named, state.optimizers, reader.read_metadata(), ranks
            tables = SavedTables(*of, partial(read_into, reader))
            read_into(reader, room | ({"dynamic": tables.room} if tables.room else {}))
            tables.take_in()
            state._load_beside_tables(room)

    with _named(f"{path} is no checkpoint that can be read"):
        reader = ranks.everywhere(look, "could not load")
    ranks.everywhere(lambda: read(reader), "could not load")
    return state.values


def _check_no_more(path: str | os.PathLike[str], saved: set[str], room: Mapping[str, Any]) -> None:
    """Raise if a checkpoint has more weights than the model, or more optimisers than are to be loaded."""
    of_module = {name for name in saved if name.startswith(MODULE)}
    # what modules keep beside tensors may be a dict of values, which lie there one by one
    more = sorted(of_module - {MODULE + name for name in flatten_state_dict(dict(room["module"]))[0]})
    given = room["optimizers"]
    if given:  # without any, weights alone are loaded
        more += sorted({name for name in saved if name.startswith(OPTIMIZERS) and name.split(".")[2] not in given})
    if more:
        names = ", ".join(name.removeprefix("app.") for name in more[:8])
        raise InputError(f"{path} is no checkpoint of this model and these optimisers: it has {names} beside")


def _leave_out_unsaved(optimizers: dict[str, Any], saved: set[str]) -> None:
    """Parameters that had no gradient when the checkpoint was made have no state in it."""
    for number, of_optimizer in optimizers.items():
        states = of_optimizer["state"]
        for name in list(states):
            if not any(key.startswith(f"app.optimizers.{number}.state.{name}.") for key in saved):
                del states[name]


def _values_of(metadata: Metadata) -> Iterator[tuple[str, Any]]:
    """Room for the values that were saved beside the states."""
    for name, kind in metadata.state_dict_metadata.items():
        if name.startswith(VALUES):
            is_tensor = isinstance(kind, TensorStorageMetadata)
            room = torch.empty(kind.size, dtype=kind.properties.dtype) if is_tensor else None  # type: ignore[union-attr]
            yield name.removeprefix(VALUES), room


class SafeReader(dcp.FileSystemReader):
    """Reads the index of a checkpoint, which is a pickle, without running what else a pickle may call."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As torch's.

        Raises
        ------
        InputError
            If it asks for more than torch's own descriptions of tensors.
        """
        try:
            with open(Path(self.path) / ".metadata", "rb") as file:
                metadata: Metadata = _Unpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError(f"it is a {type(metadata).__name__}")
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
        except Exception as error:  # what bytes at random may raise there
            raise InputError(f"{self.path} is no checkpoint: its .metadata can't be read: {error}") from error
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in DESCRIBES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


class _SafePlanner(DefaultLoadPlanner):
    """Numbers and strings of a checkpoint are pickles, too."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            found = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise InputError(f"{read_item.dest_index.fqn} of the checkpoint asks to run code: {error}") from error
        safe = io.BytesIO()
        torch.save(found, safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """What torch raises of any rank, which is no Exception, is an error with a title and without the tracebacks."""
    try:
        yield
    except CheckpointException as error:
        reasons = dict.fromkeys(f"{type(e).__name__}: {e}" for e, _ in error.failures.values())
        raise InputError(f"{what}: {'; '.join(reasons)}") from error
    except DescompilerError:
        raise
    except Exception as error:  # of what a file that is damaged says
        raise InputError(f"{what}: {type(error).__name__}: {error}") from error


def whole_at(path: Path) -> Path | None:
    """A checkpoint that was written to its end: the one at a path, or the one before, if that was being replaced."""
    for found in (path, path.with_name(path.name + BEFORE)):
        if (found / ".metadata").is_file():
            return found
    return None


def _ranks_of(module: nn.Module, what: str) -> Ranks:
    named = _named_parts(module)
    if not isinstance(named, DistributedModule):  # the original, in one process
        return Ranks(None, 0, 1)
    return ranks_for(named, what)


def _ranks(named: nn.Module) -> Ranks:
    """The ranks of what is under way already."""
    if not isinstance(named, DistributedModule):
        return Ranks(None, 0, 1)
    runtime = named._runtime
    return Ranks(runtime.group, runtime.rank, runtime.ranks, runtime.channels)


def _make_room(path: Path) -> None:
    """What a save that was broken off has left is no checkpoint."""
    if path.exists() and any(path.iterdir() if path.is_dir() else [path]) and not (path / ".metadata").is_file():
        raise InputError(f"{path} is no checkpoint, and not empty: give a directory that may be replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path.with_name(path.name + SAVING), ignore_errors=True)
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror}") from error


def _replace(path: Path, saving: Path) -> None:
    """A checkpoint takes the place of another. At each moment one of them is found by `whole_at`."""
    before = path.with_name(path.name + BEFORE)
    if (path / ".metadata").is_file():
        shutil.rmtree(before, ignore_errors=True)
        path.rename(before)
    elif path.is_dir():
        path.rmdir()
    saving.rename(path)
    shutil.rmtree(before, ignore_errors=True)
