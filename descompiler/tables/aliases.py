"""Other names of forms: what people write, at the boundary alone; inside a form has one name."""

ALIASES = {"rows": "row", "columns": "column", "table": "field", "tables": "field", "fields": "field"}
"""Names that people use for forms."""
