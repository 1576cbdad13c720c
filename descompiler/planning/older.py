"""Plan files of earlier versions, as they would be written now.

In version 2 a layout had a field for each kind of what crosses; since version 3 it has one list of transfers, of which
one had another name at first, and tables had fewer numbers. Who has which part of a dimension was written in three
ways; since version 4 it is in one. Until then everything crossed in the model's dtype; since version 5 a transfer says
so if it is another. Since version 6 a plan has the seconds of its ranks' own work; since version 7 its layout says
whether values are rounded where they cross, which a reader of version 6 would pass over; since version 8 lookups in
dynamic tables whose ids are known at the start are fetched together. Forms had other names in some files of version 2
(`descompiler.tables.aliases`); who edits a file may still write these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from descompiler.cost_models.table import Table
from descompiler.layout.division import Division
from descompiler.planning.json import encode
from descompiler.tables.aliases import current_name

VERSION = 8
"""Of the plan files that are written."""

DTYPES = {2: "float16", 4: "float32", 8: "float64"}
"""Of tables of which a file of version 3 says no more than the bytes of an element."""


NUMBERS = tuple(f.name for f in fields(Table))


RENAMED = {"Header": "StepHeader"}
"""Kinds of transfers that had another name in some files of version 3."""


def as_of_now(data: dict[str, Any]) -> dict[str, Any]:
    """What a plan file of any version that can be read holds; one of another version as it is."""
    if data["version"] == 2:
        data = {**data, "version": 3, "layout": _listed_layout(data["layout"])}
    if data["version"] == 3:
        data = _with_numbers(data)
        divided = {name: _divided(data[name]) for name in ("splits", "pieces", "layout")}
        data = {**data, "version": 4, **divided}
    if data["version"] == 4:
        data = {**data, "version": 5}
    if data["version"] == 5:
        data = {**data, "version": 6, "work_s": 0.0, "seconds": {}}
    if data["version"] == 6:
        data = {**data, "version": 7}
    if data["version"] == 7:
        data = {**data, "version": VERSION, "layout": _pulled_together(data["layout"])}
    return _in_current_names(data) if data["version"] == VERSION else data


def _in_current_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan file holds, with the names that forms and kinds of transfers have now."""

    def by_form(x: Mapping[str, Any]) -> dict[str, Any]:
        return {current_name(form): value for form, value in x.items()}

    transfers = [{**x, "is": RENAMED.get(x["is"], x["is"])} for x in data["layout"]["transfers"]]
    return {
        **data,
        "layout": {**data["layout"], "transfers": transfers},
        "forms": {table: current_name(form) for table, form in data["forms"].items()},
        "splits": {table: {**split, "form": current_name(split["form"])} for table, split in data["splits"].items()},
        "tables": [{**table, "refusals": by_form(table["refusals"])} for table in data["tables"]],
        **{what: {table: by_form(x) for table, x in data[what].items()} for what in ("prices", "seconds", "missing")},
    }


def _pulled_together(old: Mapping[str, Any]) -> dict[str, Any]:
    """The layout of a file of version 7, where each lookup in a dynamic table that is pulled was a fetch of its own."""
    of_dynamic = [x for x in old["transfers"] if x["is"] == "Fetch" and any(t.get("dynamic") for t in x["tables"])]
    if not of_dynamic:
        return dict(old)
    every = {t["name"]: t for x in reversed(of_dynamic) for t in x["tables"]}
    names = dict.fromkeys(t["name"] for x in of_dynamic for t in x["tables"])
    tables = sorted((every[n] for n in names), key=lambda t: (not t["trained"], t["sparse"], t["dtype"], t["dim"]))
    position = {t["name"]: i for i, t in enumerate(tables)}
    together = {
        **of_dynamic[0],
        "tables": tables,
        "lookups": [position[x["tables"][at]["name"]] for x in of_dynamic for at in x["lookups"]],
        **{what: [y for x in of_dynamic for y in x[what]] for what in ("names", "checks")},
        "early": not any(x["is"] == "Fetch" and x["early"] for x in old["transfers"]),
    }
    transfers = [together if x is of_dynamic[0] else x for x in old["transfers"] if x not in of_dynamic[1:]]
    return {**old, "transfers": transfers}


def _with_numbers(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of version 3 holds, with all numbers of its tables, those whose rows are fetched too."""
    tables = [{"dtype": DTYPES.get(t.get("itemsize")), **t} for t in data["tables"]]
    by_name = {t["name"]: {x: t[x] for x in NUMBERS if x in t} for t in tables}

    def fetched(table: Mapping[str, Any]) -> dict[str, Any]:
        numbers = by_name.get(table["name"]) or dict(zip(("rows", "dim"), table["pieces"]["shape"], strict=True))
        return {**numbers, **table, "dtype": table["dtype"].removeprefix("torch.")}

    transfers = [
        {**x, "tables": list(map(fetched, x["tables"]))} if x["is"] == "Fetch" else x
        for x in data["layout"]["transfers"]
    ]
    return {**data, "tables": tables, "layout": {**data["layout"], "transfers": transfers}}


def _divided(old: Any) -> Any:
    """What a file of version 3 holds, where pieces, values that leave the region and products have a `Division`."""
    if isinstance(old, list):
        return [_divided(x) for x in old]
    if not isinstance(old, dict):
        return old
    new = {name: _divided(x) for name, x in old.items()}
    if "runs" in old and "shape" in old:  # pieces
        new["division"] = {"runs": new.pop("runs")}
    elif "segments" in old:  # (size, owner) of a value that leaves the region; none of a sum
        segments = new.pop("segments")
        new["division"] = segments and encode(Division.of(segments))
    elif "ranges" in old:  # (owner, start, size, offset in the owner's piece) of the vocabulary of a product
        ranges = new.pop("ranges")
        first, rows = ranges[0][3], [(size + offset, owner) for owner, _, size, offset in ranges]
        new |= {"division": encode(Division.of(rows)), "first": first, "size": sum(n for n, _ in rows) - first}
    return new


def _listed_layout(old: Mapping[str, Any]) -> dict[str, Any]:
    """The layout of a file of version 2, as a list."""
    transfers: list[dict[str, Any]] = [{"is": "StepHeader"}]
    if old["wholes"]:
        transfers.append({"is": "WholeTables", "tables": old["wholes"]})
    if old["entries"]:
        transfers.append({"is": "IdsIn", "entries": old["entries"], "id_bytes": old["id_bytes"]})
        transfers.append({"is": "ValuesOut", "exits": old["exits"]})
    if old["norm_shares"]:
        transfers.append({"is": "NormsInside", "channels": old["norm_shares"]})
    if old["shared_columns"]:
        transfers.append({"is": "SharedColumns", "elements": old["shared_columns"]})
    counted = set[str]()
    for position, fetch in enumerate(old["fetches"]):
        tables = [{**t, "counted": t["name"] not in counted} for t in fetch["tables"]]
        transfers.append({**fetch, "is": "Fetch", "tables": tables, "early": old["early"] and not position})
        counted.update(t["name"] for t in tables)
    if old["leaves"] or old["leaves_backward"]:
        transfers.append({"is": "LeafStatus", "runs": old["leaves"], "backward": old["leaves_backward"]})
    transfers += [{"is": "NormOutside", "channels": n} for n in old["norm_channels"]]
    transfers += [{"is": "Vocabulary", **v} for v in old["vocabularies"]]
    for x in old["exchanges"]:
        value = {name: x[name] for name in ("name", "terms", "itemsize")}
        if x["kind"] == "total back":  # it follows its total
            transfers[-1]["backward"] = True
        elif x["calls"]:
            kind = {"gather": "GatherRows", "reduce": "SumTerms", "slice": "SliceRows", "spread": "SpreadValue"}
            total = {"is": "TableTotal", "backward": False}
            transfers.append({**({"is": kind[x["kind"]]} if x["kind"] in kind else total), "values": [value]})
        else:
            transfers[-1]["values"].append(value)
    if old["dense_elements"]:
        transfers.append({"is": "DenseGradients", "elements": old["dense_elements"]})
    return {"ranks": old["ranks"], "transfers": transfers, "id_bytes": old["id_bytes"]}
