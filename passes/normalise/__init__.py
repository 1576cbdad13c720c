"""From a captured program to its normal form: one pass a file; their order is `descompiler.passes.NORMALISE`."""
