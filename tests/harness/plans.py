"""Forms to force on every table, as `des.verify` takes them."""

from descompiler.passes import FORMS

LOOKED_UP = tuple(form.name for form in FORMS if form.name != "fsdp")
"""Forms of tables that are only looked up: fsdp is for those that are used whole."""

EVERY = [None, *({"*": form} for form in LOOKED_UP)]
SPLITS = [None, *({"*": form} for form in ("replicate", "table_wise", "row_wise", "column_wise"))]
FETCHED = [{"*": form} for form in ("sparse_all_gather", "unique_rows", "hot_rows")]
"""Forms without a region: what follows a lookup is the original's graph, so a few models say it all."""
