"""Forms: how a table is divided among ranks, one a file; see `descompiler.tables.form`."""
