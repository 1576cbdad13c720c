"""What things cost, as formulas of `descompiler.cost_models.symbols`; `table` is what all know of a table."""
