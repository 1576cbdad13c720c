"""What things cost, as formulas of `descompiler.cost_models.symbols`."""
