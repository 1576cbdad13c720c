"""From a captured program to its normal form: one pass a file; their order is `descompiler.passes.NORMALISE`.

`products_with_tables` and `requests_of_logits` are what `recognise_outputs` looks for.
"""
