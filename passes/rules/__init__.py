"""Placement rules: how operators stay in the substituted region, one family a file; see `descompiler.region.rule`."""
