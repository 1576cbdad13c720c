"""Plan files of earlier versions, as they would be written now.

In version 2 a layout had a field for each kind of what crosses; since version 3 it has one list of transfers. Forms had
other names in some files of version 2 (`descompiler.tables.aliases`); who edits a file may still write these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from descompiler.tables.aliases import current_name

VERSION = 3
"""Of the plan files that are written."""

KINDS = {"Header": "StepHeader"}
"""Names that kinds of transfers had, to those that they have: the name of the class is in the file."""


def as_of_now(data: dict[str, Any]) -> dict[str, Any]:
    """What a plan file of any version that can be read holds; one of another version as it is."""
    if data["version"] == 2:
        data = {**data, "version": VERSION, "layout": _layout(data["layout"])}
    return _in_current_names(data) if data["version"] == VERSION else data


def _in_current_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan file holds, with the names that forms and kinds of transfers have now."""

    def by_form(x: Mapping[str, Any]) -> dict[str, Any]:
        return {current_name(form): value for form, value in x.items()}

    transfers = [{**x, "is": KINDS.get(x["is"], x["is"])} for x in data["layout"]["transfers"]]
    return {
        **data,
        "layout": {**data["layout"], "transfers": transfers},
        "forms": {table: current_name(form) for table, form in data["forms"].items()},
        "splits": {table: {**split, "form": current_name(split["form"])} for table, split in data["splits"].items()},
        "tables": [{**table, "refusals": by_form(table["refusals"])} for table in data["tables"]],
        **{what: {table: by_form(x) for table, x in data[what].items()} for what in ("prices", "missing")},
    }


def _layout(old: Mapping[str, Any]) -> dict[str, Any]:
    """The layout of a file of version 2, as a list."""
    transfers: list[dict[str, Any]] = [{"is": "Header"}]
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
