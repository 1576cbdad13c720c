"""What a state dict has of a dynamic table: ids, rows, counters, sketch and step, as tensors, by slot.

Rows stay in their slots, as what optimisers keep for them is by slot too. Free slots are rows of zeros, of id 0; that
they are free says ``resident``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from descompiler.dynamic.hashing import signed
from descompiler.dynamic.rows import lasting
from descompiler.dynamic.table import Table
from descompiler.errors import InputError

NEEDED = ("weight", "ids", "resident", "step", "made_from", "sighted", "fresh")


BY_SLOT = ("ids", "resident", "last_seen", "counts")
KNOWN = frozenset([*NEEDED, *BY_SLOT, "sketch", "owners", "rank"])


def state_of(table: Table, *, rows: bool = True) -> dict[str, Tensor]:
    """Everything that a table of the same configuration needs to go on as this one."""
    residence, end = table.residence, table.residence.free.end
    slots = residence.resident()
    resident = torch.zeros(end, dtype=torch.bool)
    resident[slots] = True
    ids = torch.zeros(end, dtype=torch.int64)
    ids[slots] = table.ids_of(slots)
    state = {
        "ids": ids,
        "resident": resident,
        "step": torch.tensor(residence.step),
        "made_from": torch.tensor([signed(table.config.seed), table.config.salt]),
        "sighted": _joined(residence.sighted),
        "fresh": _joined(table.states.fresh),
    }
    if table.owners is not None:
        state |= {"owners": table.owners, "rank": torch.tensor(table.rank)}
    if rows:
        state["weight"] = table.rows.tensor[:end].clone()
    if residence.last is not None:
        state["last_seen"] = residence.last.tensor[:end].clone()
    if residence.counts is not None:
        state["counts"] = residence.counts.tensor[:end].clone()
    if residence.sketch is not None:
        state["sketch"] = residence.sketch.counters.clone()
    return state


@lasting
def load(table: Table, state: Mapping[str, Tensor], name: str) -> None:
    """Have what a state dict has, in the place of what the table has.

    Raises
    ------
    InputError
        If it is not of such a table; nothing has changed.
    """
    check(table, state, f"dynamic table {name!r}" if name else "the dynamic table")
    restore(table, state)
    weight = state["weight"]
    for ticket in table.rows.tickets:  # gradients of rows of before are nobody's
        ticket.gone.append(torch.arange(len(table.rows.tensor)))
    table.parameter.grad = None
    table.rows.need(len(weight))
    table.rows.tensor.zero_()
    table.rows.tensor[: len(weight)] = weight.to(table.rows.tensor)


def check(table: Table, state: Mapping[str, Tensor], what: str) -> None:
    """Raise unless a state is of such a table; ``what``: the table, for messages."""
    config, residence = table.config, table.residence
    if missing := [name for name in NEEDED if name not in state]:
        raise InputError(
            f"this state of {what} has no {', '.join(missing)}: "
            + (
                "it is a static embedding's. Load it into an nn.Embedding, and make the table with "
                "des.dynamic.from_embedding"
                if set(state) == {"weight"}
                else "it is not one that a DynamicEmbedding has saved"
            )
        )
    _check_part(table, state, what)
    rows, dim = state["weight"].shape
    if dim != config.dim:
        raise InputError(f"this state of {what} has rows of {dim} numbers, and the table of {config.dim}")
    if damaged := [n for n in BY_SLOT if n in state and state[n].shape != (rows,)]:
        raise InputError(f"this state of {what} is damaged: {rows} rows, and {', '.join(damaged)} of another number")
    if state["made_from"].tolist() != [signed(config.seed), config.salt]:
        seed = int(state["made_from"][0])
        other = f"seed={seed}, and the table's is {config.seed}" if seed != signed(config.seed) else "another name"
        raise InputError(
            f"this state of {what} is of a table with {other}: new ids would get other rows than they had there. Make "
            "the table with the seed and name of the one that was saved"
        )
    if config.max_rows is not None and (rows := int(state["resident"].sum())) > config.max_rows:
        raise InputError(f"this state of {what} has {rows} rows, more than max_rows={config.max_rows}")
    for name, mine in (("last_seen", residence.last), ("counts", residence.counts), ("sketch", residence.sketch)):
        if (name in state) != (mine is not None):
            option = "admit" if name == "sketch" else "evict"
            raise InputError(
                f"this state of {what} has {'a' if name in state else 'no'} {name!r}, unlike the table: it was saved "
                f"with another {option}=. Make the table with that one"
            )
    if residence.sketch is not None:
        there, here = state["sketch"], residence.sketch.counters
        if there.shape != here.shape or there.dtype != here.dtype:
            raise InputError(
                f"the sketch in this state of {what} has {there.numel()} counters of {there.dtype}, and the table's "
                f"{here.numel()} of {here.dtype}: make it with the admission and the capacity of the one that was saved"
            )


def _check_part(table: Table, state: Mapping[str, Tensor], what: str) -> None:
    """Raise unless a state is of the whole for a whole table, and of the same part for one of a rank's."""
    mine, theirs = table.owners, state.get("owners")
    if mine is None and theirs is None:
        return
    if mine is None or theirs is None or not torch.equal(mine, theirs) or int(state["rank"]) != table.rank:
        there = "the whole" if theirs is None else f"the part that rank {int(state['rank'])} had of it"
        here = "the whole" if mine is None else f"rank {table.rank}'s part"
        raise InputError(
            f"this state of {what} is {there}, and this is {here}: load des.full_state_dict(module) with "
            "des.load_full_state_dict, or a checkpoint of des.save with des.load, which know whose rows are where"
        )


@lasting
def restore(table: Table, state: Mapping[str, Tensor]) -> None:
    """Have the residents of a state, in their slots, without their rows."""
    residence = table.restart()
    end = len(state["ids"])
    slots = state["resident"].cpu().nonzero()[:, 0]
    residence.map.insert(table.keys(state["ids"].cpu()[slots]), slots)
    residence.free.restore(slots, end)
    residence.step = int(state["step"])
    residence.sighted = [state["sighted"].cpu()]
    table.states.fresh = [state["fresh"].cpu()]
    for seen, name in ((residence.last, "last_seen"), (residence.counts, "counts")):
        if seen is not None:
            seen.grow(end)
            seen.tensor[:end] = state[name].cpu()
    if residence.sketch is not None:
        residence.sketch.counters.copy_(state["sketch"])


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
