"""Forms to force on every table, as `des.verify` takes them."""

from descompiler.passes import FORMS

LOOKED_UP = tuple(form.name for form in FORMS if form.name != "fsdp")
"""Forms of tables that are only looked up: fsdp is for those that are used whole."""

EVERY = [None, *({"*": form} for form in LOOKED_UP)]
SPLITS = [None, *({"*": form} for form in ("replicate", "field", "row", "column"))]
FETCHED = [{"*": form} for form in ("gather", "pull", "hot")]
"""Forms without a region: what follows a lookup is the original's graph, so a few models say it all."""
